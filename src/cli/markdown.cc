#include "cli/markdown.h"

#include <algorithm>
#include <cctype>

namespace torpor::cli {
namespace {

enum Style : unsigned { kBold = 1, kFaint = 2, kItalic = 4, kUnderlined = 8, kCode = 16 };

constexpr size_t kWait = std::string_view::npos;  // what comes next decides

std::string sgr(unsigned style) {
  std::string codes = "\x1b[0";
  if (style & kBold) codes += ";1";
  if (style & kFaint) codes += ";2";
  if (style & kItalic) codes += ";3";
  if (style & kUnderlined) codes += ";4";
  if (style & kCode) codes += ";36";
  return codes + "m";
}

/// What counts of the line that a text begins with.
struct Line {
  std::string_view text;  // without its end
  bool known;             // nothing more of it counts

  Line(std::string_view rest, bool ended) : text(rest.substr(0, MarkdownStream::kLongestSpan)) {
    const size_t end = text.find('\n');
    known = ended || end != text.npos || text.size() == MarkdownStream::kLongestSpan;
    text = text.substr(0, end);
  }
  /// It was cut off where a span would be too long.
  bool too_long() const { return text.size() == MarkdownStream::kLongestSpan; }
  /// How often the byte at `i` stands there; kWait when it may come once more.
  size_t run(size_t i) const {
    const size_t end = std::min(text.find_first_not_of(text[i], i), text.size());
    return end == text.size() && !known ? kWait : end - i;
  }
  char at(size_t i) const { return i < text.size() ? text[i] : '\n'; }
};

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n'; }
bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; }

/// Where the backticks stand that close the `run` of them that ends at `from`. kWait while that is not known; the line's size
/// where there are none.
size_t end_of_code(const Line& line, size_t run, size_t from) {
  for (size_t i = line.text.find('`', from); i != line.text.npos; i = line.text.find('`', i)) {
    const size_t length = line.run(i);
    if (length == kWait) return kWait;
    if (length == run) return i;
    i += length;
  }
  return line.known ? line.text.size() : kWait;
}

/// The same for the `run` of asterisks or underscores that the line begins with.
size_t end_of_emphasis(const Line& line, size_t run) {
  const char mark = line.text[0];
  bool inner = false;  // italics in bold, or bold in italics
  for (size_t i = run; i < line.text.size();) {
    const char c = line.text[i];
    if (c == '\\') {
      i += 2;
    } else if (c == '`') {
      const size_t length = line.run(i);
      const size_t end = length == kWait ? kWait : end_of_code(line, length, i + length);
      if (end == kWait) return kWait;
      i = end < line.text.size() ? end + length : i + length;
    } else if (c == mark) {
      const size_t length = line.run(i);
      if (length == kWait) return kWait;
      const char before = line.text[i - 1], after = line.at(i + length);
      const bool closes = !is_space(before) && (mark == '*' || !is_word(after));
      if (closes && length == run) return i;
      if (closes && length == 3) return i + (inner ? 3 - run : 0);
      if (length + run == 3) inner = inner ? !closes : !is_space(after) && !is_word(before);
      i += length;
    } else {
      ++i;
    }
  }
  return line.known ? line.text.size() : kWait;
}

void show_inline(std::string_view text, char before, unsigned style, std::string& out);

/// Shows what `rest`, which is not empty and begins with no line's end, begins with, and gives how many bytes that are; or kWait.
size_t show_piece(std::string_view rest, bool ended, char before, unsigned style, std::string& out) {
  const auto as_written = [&](size_t bytes) {
    out += rest.substr(0, bytes);
    return bytes;
  };
  const size_t plain = rest.find_first_of("*_`\\\n");
  if (plain != 0) return as_written(std::min(plain, rest.size()));
  if (rest[0] == '\\') {
    if (rest.size() == 1) return ended ? as_written(1) : kWait;
    if (rest[1] == '\\') return as_written(2);
    if (rest[1] != '*' && rest[1] != '_' && rest[1] != '`') return as_written(1);
    out += rest[1];
    return 2;
  }
  const Line line(rest, ended);
  const size_t run = line.run(0);
  if (run == kWait) return kWait;
  if (rest[0] == '`') {
    const size_t end = end_of_code(line, run, run);
    if (end == kWait) return kWait;
    if (end == line.text.size()) return as_written(run);
    std::string_view code = line.text.substr(run, end - run);
    if (code.starts_with(' ') && code.ends_with(' ') && code.find_first_not_of(' ') != code.npos) {
      code = code.substr(1, code.size() - 2);
    }
    out += sgr(style | kCode) + std::string(code) + sgr(style);
    return end + run;
  }
  const unsigned emphasis = (run & 1 ? kItalic : 0u) | (run & 2 ? kBold : 0u);
  const bool opens = run <= 3 && !is_space(line.at(run)) && !is_word(before);
  if (!opens) return as_written(run);
  const size_t end = end_of_emphasis(line, run);
  if (end == kWait) return kWait;
  if (end == line.text.size()) return as_written(run);
  out += sgr(style | emphasis);
  show_inline(line.text.substr(run, end - run), rest[0], style | emphasis, out);
  out += sgr(style);
  return end + run;
}

void show_inline(std::string_view text, char before, unsigned style, std::string& out) {
  while (!text.empty()) {
    const size_t taken = show_piece(text, true, before, style, out);
    before = text[taken - 1];
    text.remove_prefix(taken);
  }
}

std::string faint(std::string_view text) { return sgr(kFaint) + std::string(text) + sgr(0); }

}  // namespace

std::string MarkdownStream::feed(std::string_view text) {
  rest_ += text;
  return advance(false);
}

std::string MarkdownStream::finish() {
  std::string out = advance(true);
  if (line_style_ != 0) out += sgr(0);
  *this = MarkdownStream();
  return out;
}

std::string MarkdownStream::advance(bool ended) {
  std::string out;
  std::string_view rest = rest_;
  while (!rest.empty()) {
    size_t taken = 0;
    if (line_begins_) {
      taken = fence_length_ > 0 ? begin_code_line(rest, ended, out) : begin_line(rest, ended, out);
      if (taken == kWait) break;
      line_begins_ = false;
    } else if (rest[0] == '\n') {
      if (line_style_ != 0) out += sgr(0);
      line_style_ = 0;
      out += '\n';
      line_begins_ = true;
      taken = 1;
    } else if (fence_length_ > 0) {
      taken = std::min(rest.find('\n'), rest.size());
      out += rest.substr(0, taken);
    } else {
      taken = show_piece(rest, ended, before_, line_style_, out);
      if (taken == kWait) break;
    }
    if (taken > 0) before_ = rest[taken - 1];
    rest.remove_prefix(taken);
  }
  rest_.erase(0, rest_.size() - rest.size());
  return out;
}

/// Shows the mark of a heading, of a list's item or of a fence, and gives its bytes: 0 for other lines.
size_t MarkdownStream::begin_line(std::string_view rest, bool ended, std::string& out) {
  const Line line(rest, ended);
  const size_t indent = line.text.find_first_not_of(' ');
  if (indent == line.text.npos) return line.known ? 0 : kWait;
  const char mark = line.text[indent];
  if (std::string_view("`~#-+*").find(mark) == std::string_view::npos) return 0;
  const size_t run = line.run(indent);
  if (run == kWait) return kWait;
  const size_t next = indent + run;
  if (mark == '`' || mark == '~') {
    if (run < 3 || (mark == '`' && line.text.find('`', next) != line.text.npos)) return 0;
    if (!line.known) return kWait;
    if (line.too_long()) return 0;
    fence_ = mark;
    fence_length_ = run;
    out += faint(line.text);
    return line.text.size();
  }
  if (line.at(next) != ' ') return 0;
  if (mark == '#') {
    if (run > 6) return 0;
    line_style_ = kBold | (run <= 2 ? kUnderlined : 0u);
    out += std::string(line.text.substr(0, indent)) + sgr(line_style_);
    return next + 1;
  }
  if (run > 1) return 0;
  const bool rule = line.text.find_first_not_of(std::string{mark, ' '}, indent) == line.text.npos;
  if (rule) return line.known ? 0 : kWait;  // "* * *", or an item that is empty
  out += std::string(line.text.substr(0, indent)) + "\u2022 ";
  return next + 1;
}

/// The same for a line of fenced code, whose mark is the fence's end.
size_t MarkdownStream::begin_code_line(std::string_view rest, bool ended, std::string& out) {
  const Line line(rest, ended);
  const size_t indent = line.text.find_first_not_of(' ');
  if (indent == line.text.npos && !line.known) return kWait;
  if (line.at(indent) == fence_) {
    const size_t run = line.run(indent);
    if (run == kWait) return kWait;
    if (run >= fence_length_ && line.text.find_first_not_of(' ', indent + run) == line.text.npos) {
      if (!line.known) return kWait;
      if (!line.too_long()) {
        fence_length_ = 0;
        out += faint(line.text);
        return line.text.size();
      }
    }
  }
  if (line.text.empty()) return 0;
  line_style_ = kCode;
  out += sgr(kCode);
  return 0;
}

}  // namespace torpor::cli
