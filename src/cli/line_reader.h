#pragma once
/// The lines of standard input, one after the other: typed at a terminal, or from a pipe or file.

#include <functional>
#include <optional>
#include <string>
#include <vector>

struct torpor_line_editor;

namespace torpor::cli {

/// On a terminal a line can be edited, Tab completes words, and the arrow keys bring earlier lines back. A text that is pasted is
/// one line there, however many lines it has and however long it is, and a line that ends with a backslash goes on in the next.
/// One lives at a time, beside an InterruptScope.
class LineReader {
 public:
  /// What the last word of a line's beginning may become.
  using Complete = std::function<std::vector<std::string>(const std::string& before)>;

  /// An Error of `complete` offers nothing.
  explicit LineReader(Complete complete);
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  /// Standard input is a terminal.
  bool interactive() const { return interactive_; }
  /// The next line, without its end; nullopt at the end of input or when a signal came. On a terminal `prompt` stands
  /// before it. kIo.
  std::optional<std::string> read(const std::string& prompt);
  /// The arrow keys bring this back, too.
  void remember(const std::string& text);

 private:
  std::optional<std::string> read_one(const std::string& prompt);
  std::optional<std::string> edit(const std::string& prompt);

  const Complete complete_;
  const bool interactive_;
  torpor_line_editor* editor_ = nullptr;  // nullptr where input or output is no terminal
};

}  // namespace torpor::cli
