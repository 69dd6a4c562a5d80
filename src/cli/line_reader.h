#pragma once
/// The lines of standard input, one after the other: typed at a terminal, or from a pipe or file.

#include <optional>
#include <string>

struct torpor_line_editor;

namespace torpor::cli {

/// On a terminal a line can be edited, the arrow keys bring earlier ones back, and a text that is pasted is one line,
/// however
/// many lines it has and however long it is. One lives at a time, beside an InterruptScope.
class LineReader {
 public:
  LineReader();
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  /// Standard input is a terminal.
  bool interactive() const { return interactive_; }
  /// The next line, without its end; nullopt at the end of input or when a signal came. On a terminal `prompt` stands
  /// before it.
  /// kIo.
  std::optional<std::string> read(const std::string& prompt);

 private:
  std::optional<std::string> edit(const std::string& prompt);

  const bool interactive_;
  torpor_line_editor* editor_ = nullptr;  // nullptr where input or output is no terminal
};

}  // namespace torpor::cli
