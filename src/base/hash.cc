#include "base/hash.h"

#include <cstdint>

#ifdef TORPOR_XXH_DISPATCH
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include "torpor/error.h"

namespace torpor {
namespace {

std::string to_hex(XXH128_hash_t hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(2 * sizeof(canonical.digest));
  for (unsigned char byte : canonical.digest) {
    hex.push_back(kDigits[byte >> 4]);
    hex.push_back(kDigits[byte & 15]);
  }
  return hex;
}

}  // namespace

struct Hasher::State {
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
};

std::string hash_hex(std::span<const std::byte> bytes) { return to_hex(XXH3_128bits(bytes.data(), bytes.size())); }

std::string with_checksum(std::string text, size_t at) { return text.replace(at, kNoChecksum.size(), hash_hex(text)); }

bool has_checksum(std::string_view text, std::string_view beginning) {
  const size_t at = beginning.size(), n = kNoChecksum.size();
  if (!text.starts_with(beginning) || text.size() < at + n) return false;
  return text.substr(at, n) == hash_hex(std::string(text).replace(at, n, kNoChecksum));
}

Hasher::Hasher() : state_(std::make_unique<State>()) {
  if (state_->xxh == nullptr || XXH3_128bits_reset(state_->xxh) != XXH_OK) {
    throw Error(ErrorCode::kResourceExhausted, "Out of memory for a checksum.");
  }
}
Hasher::~Hasher() = default;
Hasher::Hasher(Hasher&&) noexcept = default;
Hasher& Hasher::operator=(Hasher&&) noexcept = default;

Hasher& Hasher::update(std::span<const std::byte> bytes) {
  XXH3_128bits_update(state_->xxh, bytes.data(), bytes.size());
  return *this;
}

Hasher& Hasher::update_field(std::string_view text) {
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(uint64_t(text.size()) >> (8 * i));
  update(std::as_bytes(std::span(length)));
  return update(std::as_bytes(std::span(text.data(), text.size())));
}

std::string Hasher::hex() const { return to_hex(XXH3_128bits_digest(state_->xxh)); }

}  // namespace torpor
