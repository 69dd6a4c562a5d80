#pragma once
/// Checksums and names: XXH3 with 128 bits, as 32 lower-case hex digits. Not cryptographic: whatever is found by such a
/// name is compared with what was looked for before it is used.

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace torpor {

/// Hash of one span of bytes.
std::string hash_hex(std::span<const std::byte> bytes);
inline std::string hash_hex(std::string_view text) {
  return hash_hex(std::as_bytes(std::span(text.data(), text.size())));
}

/// A text that says its own checksum: 32 digits behind its beginning, the hash of the text with zeros in their place.
inline constexpr std::string_view kNoChecksum = "00000000000000000000000000000000";
/// `text`, which has kNoChecksum at `at`, with its checksum there.
std::string with_checksum(std::string text, size_t at);
/// Whether `text` begins so, and its checksum follows.
bool has_checksum(std::string_view text, std::string_view beginning);

/// The same hash over bytes that arrive in pieces. Not thread-safe.
class Hasher {
 public:
  Hasher();
  ~Hasher();
  Hasher(Hasher&&) noexcept;
  Hasher& operator=(Hasher&&) noexcept;

  Hasher& update(std::span<const std::byte> bytes);
  /// Text with its length before it, so that ("ab", "c") and ("a", "bc") differ.
  Hasher& update_field(std::string_view text);
  std::string hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace torpor
