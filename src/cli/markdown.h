#pragma once
/// Markdown that streams to a terminal.

#include <cstddef>
#include <string>
#include <string_view>

namespace torpor::cli {

/// Shows bold, italics, code, fenced code, headings and lists by SGR escapes, without their marks. All other bytes are unchanged.
/// A mark that is not closed in its line is a byte like others, as is one of a span longer than kLongestSpan. Text that is to
/// obey nothing must have been made printable before. One thread.
class MarkdownStream {
 public:
  static constexpr size_t kLongestSpan = 256;  // bytes, with their marks

  /// What can be shown now: less than kLongestSpan bytes are held back. All that is returned together does not depend on how the
  /// text is cut into pieces.
  std::string feed(std::string_view text);
  /// The rest, after which the terminal's own style counts again. Then another text may begin.
  std::string finish();

 private:
  std::string advance(bool ended);
  size_t begin_line(std::string_view rest, bool ended, std::string& out);
  size_t begin_code_line(std::string_view rest, bool ended, std::string& out);

  std::string rest_;          // not decided yet
  char before_ = '\n';        // the byte before it
  bool line_begins_ = true;   // and no mark of a line was looked for
  unsigned line_style_ = 0;   // of a heading or a line of code
  char fence_ = 0;            // '`' or '~' within fenced code
  size_t fence_length_ = 0;
};

}  // namespace torpor::cli
