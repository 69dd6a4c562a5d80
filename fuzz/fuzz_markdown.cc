/// Markdown that a model writes: however it is cut, the same is shown; nothing but marks is taken away, and no style stays.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cli/markdown.h"
#include "require.h"

namespace {

constexpr size_t kLongest = torpor::cli::MarkdownStream::kLongestSpan;

/// What is cut by turns into one byte and `piece` bytes.
std::string shown(const std::string& text, size_t piece) {
  torpor::cli::MarkdownStream stream;
  std::string out;
  for (size_t at = 0, next = piece; at < text.size(); at += next, next = next == 1 ? piece : 1) {
    out += stream.feed(std::string_view(text).substr(at, next));
  }
  return out + stream.finish();
}

/// Without escapes of style and whatever is or becomes a mark.
std::string without_marks(std::string text) {
  for (size_t at = 0; (at = text.find("\x1b[0", at)) != text.npos;) text.erase(at, text.find('m', at) + 1 - at);
  for (size_t at = 0; (at = text.find("\u2022", at)) != text.npos;) text.erase(at, 3);
  std::erase_if(text, [](char c) { return std::string_view("*_`\\#+- ").find(c) != std::string_view::npos; });
  return text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), std::min<size_t>(size, 8192));
  std::replace(text.begin(), text.end(), '\x1b', '~');  // it comes printable
  std::replace(text.begin(), text.end(), '\xe2', '`');  // nor can a bullet's bytes be told from marks that it is made of
  torpor::cli::MarkdownStream stream;
  std::string whole = stream.feed(text);
  require(without_marks(whole).size() + kLongest > without_marks(text).size());
  whole += stream.finish();
  require(stream.finish().empty());
  for (const size_t piece : {size_t(1), 2 + size % 7, kLongest - 1 + size % 3}) require(shown(text, piece) == whole);
  require(without_marks(whole) == without_marks(text));
  const size_t last = whole.rfind("\x1b[");
  require(last == whole.npos || whole.substr(last, 4) == "\x1b[0m");
  return 0;
}
