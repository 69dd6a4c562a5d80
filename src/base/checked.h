#pragma once
/// Arithmetic on sizes that come from files: nullopt, or the largest number, instead of wrapping around.

#include <concepts>
#include <limits>
#include <optional>

namespace torpor {

template <std::integral T>
[[nodiscard]] constexpr std::optional<T> checked_add(T a, T b) noexcept {
  T result;
  if (__builtin_add_overflow(a, b, &result)) return std::nullopt;
  return result;
}

template <std::integral T>
[[nodiscard]] constexpr std::optional<T> checked_mul(T a, T b) noexcept {
  T result;
  if (__builtin_mul_overflow(a, b, &result)) return std::nullopt;
  return result;
}

/// The sum of two that are not negative.
template <std::integral T>
[[nodiscard]] constexpr T saturating_add(T a, T b) noexcept {
  return checked_add(a, b).value_or(std::numeric_limits<T>::max());
}

}  // namespace torpor
