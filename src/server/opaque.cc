#include "server/opaque.h"

#include <algorithm>
#include <cstdint>

namespace torpor::server {
namespace {

constexpr std::string_view kMark = "dG9ycG9y";  // "torpor"
constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

}  // namespace

std::string to_opaque(std::string_view thinking) {
  std::string encoded(kMark);
  for (size_t i = 0; i < thinking.size(); i += 3) {
    uint32_t group = 0;
    const size_t n = std::min<size_t>(3, thinking.size() - i);
    for (size_t j = 0; j < 3; ++j) group = group << 8 | (j < n ? uint8_t(thinking[i + j]) : 0);
    for (size_t j = 0; j < 4; ++j) encoded += j <= n ? kAlphabet[group >> (18 - 6 * j) & 63] : '=';
  }
  return encoded;
}

std::optional<std::string> from_opaque(std::string_view opaque) {
  if (!opaque.starts_with(kMark) || opaque.size() % 4 != 0) return std::nullopt;
  opaque.remove_prefix(kMark.size());
  std::string thinking;
  for (size_t i = 0; i < opaque.size(); i += 4) {
    uint32_t group = 0;
    size_t n = 0;
    for (; n < 4 && opaque[i + n] != '='; ++n) {
      const size_t digit = kAlphabet.find(opaque[i + n]);
      if (digit == std::string_view::npos) return std::nullopt;
      group |= uint32_t(digit) << (18 - 6 * n);
    }
    if (n < 2 || (n < 4 && i + 4 != opaque.size())) return std::nullopt;
    for (size_t j = 0; j + 1 < n; ++j) thinking += char(group >> (16 - 8 * j) & 255);
  }
  return thinking;
}

}  // namespace torpor::server
