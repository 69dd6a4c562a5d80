#include "server/http.h"

#include <algorithm>

#include "base/hash.h"

namespace torpor::server {
namespace {

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

/// A '%' that two hexadecimal digits don't follow stands for itself.
std::string percent_decoded(std::string_view text, bool plus_is_space) {
  std::string decoded;
  decoded.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    const int high = text[i] == '%' && i + 2 < text.size() ? hex_digit(text[i + 1]) : -1;
    const int low = high >= 0 ? hex_digit(text[i + 2]) : -1;
    if (low >= 0) {
      decoded += static_cast<char>(high * 16 + low);
      i += 2;
    } else {
      decoded += plus_is_space && text[i] == '+' ? ' ' : text[i];
    }
  }
  return decoded;
}

/// Calls `take` with each part of `text` between separators, until it returns false.
template <typename Take>
void split(std::string_view text, char separator, Take take) {
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    if (!take(text.substr(begin, end - begin))) return;
    begin = end + 1;
  }
}

}  // namespace

std::optional<std::string_view> HttpRequest::header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return std::nullopt;
}

bool HttpRequest::background() const {
  const std::string_view value = header("x-torpor-background").value_or("");
  return !value.empty() && value != "0" && value != "false";
}

std::string HttpRequest::turn_id() const {
  const std::string_view key = method == "POST" ? header("idempotency-key").value_or("") : "";
  const bool plain = std::all_of(key.begin(), key.end(), [](char c) { return c > ' ' && c <= '~'; });
  return key.size() > 256 || !plain ? hash_hex(key) : std::string(key);
}

std::optional<std::string> HttpRequest::parameter(std::string_view name) const {
  std::optional<std::string> found;
  split(query, '&', [&](std::string_view pair) {
    const size_t equals = std::min(pair.find('='), pair.size());
    if (percent_decoded(pair.substr(0, equals), true) != name) return true;
    found = percent_decoded(pair.substr(std::min(equals + 1, pair.size())), true);
    return false;
  });
  return found;
}

std::vector<std::string> HttpRequest::path_parts() const {
  std::vector<std::string> parts;
  const std::string_view text = path;
  split(text.substr(text.empty() ? 0 : 1), '/', [&](std::string_view part) {
    parts.push_back(percent_decoded(part, false));
    return true;
  });
  if (!parts.empty() && parts.back().empty()) parts.pop_back();
  return parts;
}

}  // namespace torpor::server
