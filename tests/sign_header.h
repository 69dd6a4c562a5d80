#pragma once
/// The checksum of a store file's header, for tests that change what is behind it.

#include <cstring>
#include <span>
#include <string>

#include "base/hash.h"

namespace torpor::testing {

/// Where the header's checksum stands in every file (docs/format.md).
inline constexpr size_t kChecksumAt = 8 + sizeof(R"({"__metadata__":{"checksum":")") - 1;
inline constexpr size_t kChecksumLength = 32;

/// Puts the right checksum into the header, or every change would end there and the rules behind it stay untried.
inline void sign(std::span<std::byte> bytes) {
  uint64_t length = 0;
  if (bytes.size() < kChecksumAt + kChecksumLength) return;
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length > bytes.size() - 8 || 8 + length < kChecksumAt + kChecksumLength) return;
  const std::span<const std::byte> header = bytes.first(8 + size_t(length));
  Hasher hasher;
  const std::string zeros(kChecksumLength, '0');
  hasher.update(header.first(kChecksumAt));
  hasher.update(std::as_bytes(std::span(zeros.data(), zeros.size())));
  hasher.update(header.subspan(kChecksumAt + kChecksumLength));
  const std::string digest = hasher.hex();
  std::memcpy(bytes.data() + kChecksumAt, digest.data(), kChecksumLength);
}

}  // namespace torpor::testing
