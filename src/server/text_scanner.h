#pragma once
/// Reads a text that may not have come to its end yet.

#include <string>
#include <string_view>
#include <vector>

#include "server/call_syntax.h"
#include "server/chat.h"

namespace torpor::server {

class Scanner {
 public:
  enum class Read { kYes, kNo, kMore };

  explicit Scanner(std::string_view text) : text_(text) {}

  size_t position() const { return position_; }
  bool at_end() const { return position_ == text_.size(); }
  char peek() const { return at_end() ? '\0' : text_[position_]; }
  std::string_view rest() const { return text_.substr(position_); }
  void back(size_t n) { position_ -= n; }
  void skip_space();
  /// Goes past `word` when it stands here.
  bool take(std::string_view word);
  bool starts_with(const std::vector<std::string>& words) const;
  /// Whether all that is left is the beginning of one of these words, but no whole one. Nothing left is such a
  /// beginning.
  bool may_become(const std::vector<std::string>& words) const;
  /// The text up to `word`, and goes past it. False, and stays, when it has not come.
  bool until(std::string_view word, std::string& text);
  /// Goes past a JSON object or array. False, and stays, when its end has not come. Strings may hold brackets.
  bool json(std::string_view& value);
  /// Goes past a literal of Python's: string, number, True, False, None, list, tuple, dict.
  Read python_value(Json& value, int depth = 0);
  /// A name of Python's, with dots; empty when there is none.
  std::string_view identifier();
  /// Goes past a value of Gemma's: strings stand between `quote`s, keys stand bare.
  Read gemma_value(std::string_view quote, Json& value, int depth = 0);

 private:
  Read python_string(Json& value);
  Read bare(Json& value);

  std::string_view text_;
  size_t position_ = 0;
};

/// `name(key=value, ...)`, one or a list in brackets; the scanner stands at the first. The length counts from the
/// text's begin.
CallReading read_python_calls(Scanner& scan, const std::vector<Tool>& tools, bool last);

}  // namespace torpor::server
