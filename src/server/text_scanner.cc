#include "server/text_scanner.h"

#include <algorithm>
#include <cctype>

namespace torpor::server {
namespace {

constexpr int kDeepest = 100;

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

void append_utf8(std::string& text, uint32_t code) {
  if (code < 0x80) {
    text += char(code);
  } else if (code < 0x800) {
    text += {char(0xC0 | code >> 6), char(0x80 | (code & 63))};
  } else if (code < 0x10000) {
    text += {char(0xE0 | code >> 12), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
  } else {
    text += {char(0xF0 | code >> 18), char(0x80 | (code >> 12 & 63)), char(0x80 | (code >> 6 & 63)),
             char(0x80 | (code & 63))};
  }
}

}  // namespace

void Scanner::skip_space() {
  while (!at_end() && is_space(peek())) ++position_;
}

bool Scanner::take(std::string_view word) {
  if (!rest().starts_with(word)) return false;
  position_ += word.size();
  return true;
}

bool Scanner::starts_with(const std::vector<std::string>& words) const {
  return std::any_of(words.begin(), words.end(), [&](const std::string& word) { return rest().starts_with(word); });
}

bool Scanner::may_become(const std::vector<std::string>& words) const {
  return std::any_of(words.begin(), words.end(), [&](std::string_view word) {
    return rest().size() < word.size() && word.starts_with(rest());
  });
}

bool Scanner::until(std::string_view word, std::string& text) {
  const size_t found = text_.find(word, position_);
  if (found == std::string_view::npos) return false;
  text = text_.substr(position_, found - position_);
  position_ = found + word.size();
  return true;
}

bool Scanner::json(std::string_view& value) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = position_; i < text_.size(); ++i) {
    const char c = text_[i];
    if (in_string) {
      if (c == '\\') ++i;
      else if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      ++depth;
    } else if ((c == '}' || c == ']') && --depth == 0) {
      value = text_.substr(position_, i + 1 - position_);
      position_ = i + 1;
      return true;
    }
  }
  return false;
}

std::string_view Scanner::identifier() {
  size_t end = position_;
  while (end < text_.size() && (std::isalnum(uint8_t(text_[end])) || text_[end] == '_' || text_[end] == '.' ||
                                text_[end] == '-')) {
    ++end;
  }
  const std::string_view name = text_.substr(position_, end - position_);
  position_ = end;
  return name;
}

Scanner::Read Scanner::python_string(Json& value) {
  const char quote = peek();
  const std::string triple(3, quote);
  const std::string end = rest().starts_with(triple) ? triple : std::string(1, quote);
  if (end.size() == 1 && may_become({triple})) return Read::kMore;  // '' may be the beginning of '''
  position_ += end.size();
  std::string text;
  while (!at_end()) {
    if (take(end)) {
      value = text;
      return Read::kYes;
    }
    const char c = text_[position_++];
    if (c != '\\') {
      text += c;
      continue;
    }
    if (at_end()) return Read::kMore;
    const char escaped = text_[position_++];
    static constexpr std::string_view kNames = "ntrabfv0", kCodes("\n\t\r\a\b\f\v\0", 8);
    if (const size_t at = kNames.find(escaped); at != std::string_view::npos) {
      text += kCodes[at];
    } else if (escaped == 'x' || escaped == 'u' || escaped == 'U') {
      const size_t digits = escaped == 'x' ? 2 : escaped == 'u' ? 4 : 8;
      if (rest().size() < digits) return Read::kMore;
      uint32_t code = 0;
      for (const char digit : rest().substr(0, digits)) {
        if (!std::isxdigit(uint8_t(digit))) return Read::kNo;
        code = code * 16 + uint32_t(digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10);
      }
      if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return Read::kNo;
      position_ += digits;
      append_utf8(text, code);
    } else if (escaped == '\\' || escaped == '\'' || escaped == '"') {
      text += escaped;
    } else if (escaped != '\n') {  // an escaped line end is nothing; other letters keep the backslash
      text += {'\\', escaped};
    }
  }
  return Read::kMore;
}

/// A number, or a word that stands for a constant.
Scanner::Read Scanner::bare(Json& value) {
  size_t end = position_;
  const auto belongs = [](char c) { return std::isalnum(uint8_t(c)) || c == '+' || c == '-' || c == '.' || c == '_'; };
  while (end < text_.size() && belongs(text_[end])) ++end;
  if (end == text_.size()) return Read::kMore;
  const std::string word(text_.substr(position_, end - position_));
  if (word == "True" || word == "true") value = true;
  else if (word == "False" || word == "false") value = false;
  else if (word == "None" || word == "null") value = nullptr;
  else value = parse_json<Json>(word, nullptr, false);
  if (value.is_discarded()) return Read::kNo;
  position_ = end;
  return Read::kYes;
}

Scanner::Read Scanner::python_value(Json& value, int depth) {
  skip_space();
  if (at_end()) return Read::kMore;
  if (depth > kDeepest) return Read::kNo;
  const char first = peek();
  if (first == '\'' || first == '"') return python_string(value);
  if (first != '[' && first != '(' && first != '{') return bare(value);
  const char close = first == '[' ? ']' : first == '(' ? ')' : '}';
  value = first == '{' ? Json::object() : Json::array();
  ++position_;
  for (;;) {
    skip_space();
    if (at_end()) return Read::kMore;
    if (peek() == close) {
      ++position_;
      return Read::kYes;
    }
    Json item;
    if (const Read read = python_value(item, depth + 1); read != Read::kYes) return read;
    skip_space();
    if (first == '{') {
      if (at_end()) return Read::kMore;
      if (!item.is_string() || !take(":")) return Read::kNo;
      Json member;
      if (const Read read = python_value(member, depth + 1); read != Read::kYes) return read;
      value[item.get<std::string>()] = std::move(member);
      skip_space();
    } else {
      value.push_back(std::move(item));
    }
    if (at_end()) return Read::kMore;
    if (!take(",") && peek() != close) return Read::kNo;
  }
}

Scanner::Read Scanner::gemma_value(std::string_view quote, Json& value, int depth) {
  skip_space();
  if (at_end()) return Read::kMore;
  if (depth > kDeepest) return Read::kNo;
  if (take(quote)) {
    std::string text;
    if (!until(quote, text)) return Read::kMore;
    value = text;
    return Read::kYes;
  }
  if (may_become({std::string(quote)})) return Read::kMore;
  const char first = peek();
  if (first == '"') {
    std::string_view string;
    size_t end = position_ + 1;
    while (end < text_.size() && text_[end] != '"') end += text_[end] == '\\' ? 2 : 1;
    if (end >= text_.size()) return Read::kMore;
    string = text_.substr(position_, end + 1 - position_);
    value = parse_json<Json>(string, nullptr, false);
    position_ = end + 1;
    return value.is_discarded() ? Read::kNo : Read::kYes;
  }
  if (first != '[' && first != '{') return bare(value);
  const char close = first == '[' ? ']' : '}';
  value = first == '{' ? Json::object() : Json::array();
  ++position_;
  for (;;) {
    skip_space();
    if (at_end()) return Read::kMore;
    if (peek() == close) {
      ++position_;
      return Read::kYes;
    }
    std::string key;
    if (first == '{') {
      Json quoted;
      if (rest().starts_with(quote) || peek() == '"') {
        if (const Read read = gemma_value(quote, quoted, depth + 1); read != Read::kYes) return read;
        key = quoted.get<std::string>();
      } else if (may_become({std::string(quote)})) {
        return Read::kMore;
      } else {
        key = identifier();
      }
      skip_space();
      if (at_end()) return Read::kMore;
      if (key.empty() || !take(":")) return Read::kNo;
    }
    Json item;
    if (const Read read = gemma_value(quote, item, depth + 1); read != Read::kYes) return read;
    if (first == '{') value[key] = std::move(item);
    else value.push_back(std::move(item));
    skip_space();
    if (at_end()) return Read::kMore;
    if (!take(",") && peek() != close) return Read::kNo;
  }
}

CallReading read_python_calls(Scanner& scan, const std::vector<Tool>& tools, bool last) {
  using State = CallReading::State;
  const CallReading none{State::kText, std::max<size_t>(scan.position(), 1), {}};
  const CallReading more = last ? none : CallReading{};
  CallReading reading{State::kCalls, 0, {}};
  const bool list = scan.take("[");
  for (;;) {
    scan.skip_space();
    const std::string_view name = scan.identifier();
    // A name that no declared one begins with need not wait for its end.
    const auto begins = [&](const Tool& tool) { return std::string_view(tool.name).starts_with(name); };
    if (scan.at_end()) return std::any_of(tools.begin(), tools.end(), begins) ? more : none;
    const Tool* tool = find_tool(tools, name);
    if (!tool || !scan.take("(")) return none;
    ReadCall call{tool->name, Json::object()};
    for (;;) {
      scan.skip_space();
      if (scan.take(")")) break;
      const std::string key(scan.identifier());
      scan.skip_space();
      if (scan.at_end()) return more;
      if (key.empty() || !scan.take("=")) return none;
      Json value;
      const Scanner::Read read = scan.python_value(value);
      if (read != Scanner::Read::kYes) return read == Scanner::Read::kMore ? more : none;
      call.arguments[key] = std::move(value);
      scan.skip_space();
      if (scan.at_end()) return more;
      if (!scan.take(",") && scan.peek() != ')') return none;
    }
    call.arguments = conform(std::move(call.arguments), tool->parameters);
    reading.calls.push_back(std::move(call));
    reading.length = scan.position();
    if (!list) return reading;
    scan.skip_space();
    if (scan.take("]")) {
      reading.length = scan.position();
      return reading;
    }
    if (scan.at_end()) return more;
    if (!scan.take(",")) return none;
  }
}

}  // namespace torpor::server
