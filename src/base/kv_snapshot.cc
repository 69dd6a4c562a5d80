#include "torpor/kv_snapshot.h"

#include <algorithm>
#include <cctype>
#include <new>

#include "base/checked.h"
#include "base/hash.h"
#include "base/safetensors.h"
#include "torpor/error.h"

namespace torpor {

size_t kv_dtype_size(KvDtype dtype) noexcept {
  return dtype == KvDtype::kF32 || dtype == KvDtype::kU32 ? 4 : 2;
}

const char* kv_dtype_name(KvDtype dtype) noexcept {
  switch (dtype) {
    case KvDtype::kF32: return "F32";
    case KvDtype::kF16: return "F16";
    case KvDtype::kBF16: return "BF16";
    case KvDtype::kU32: return "U32";
  }
  return "?";
}

std::optional<KvDtype> parse_kv_dtype(std::string_view name) noexcept {
  for (KvDtype dtype : {KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16, KvDtype::kU32}) {
    if (name == kv_dtype_name(dtype)) return dtype;
  }
  return std::nullopt;
}

std::string KvFormat::name() const {
  std::string float_name = kv_dtype_name(dtype);
  for (char& c : float_name) c = char(std::tolower(static_cast<unsigned char>(c)));
  if (bits == 0) return float_name;
  return std::string("q").append(std::to_string(bits)) + " group " + std::to_string(group) + " " + float_name;
}

std::optional<KvFormat> KvFormat::parse(std::string_view name) {
  for (const KvDtype dtype : {KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16}) {
    for (const int bits : {0, 8, 4}) {
      for (const int group : {32, 64, 128}) {
        if (const KvFormat format(dtype, bits, bits == 0 ? 64 : group); format.name() == name) return format;
      }
    }
  }
  return std::nullopt;
}

bool KvLayout::has_windows() const noexcept {
  return std::any_of(tensors.begin(), tensors.end(), [](const KvTensorSpec& tensor) { return tensor.window > 0; });
}

bool KvLayout::attended(const KvTensorSpec& tensor, int64_t first, int64_t n, int64_t length) noexcept {
  return tensor.window == 0 || first + n > length - tensor.window;
}

size_t KvLayout::bytes_per_token() const noexcept { return offset(tensors.size(), 1); }

size_t KvLayout::offset(size_t i, int n_tokens) const noexcept {
  size_t bytes = 0;
  for (size_t t = 0; t < i; ++t) bytes += tensors[t].bytes_per_token() * size_t(n_tokens);
  return bytes;
}

std::vector<std::pair<std::string, std::string>> Identity::fields() const {
  return {{"architecture", architecture}, {"config", config}, {"weights", weights},
          {"tokenizer", tokenizer},       {"chat_template", chat_template}, {"rope", rope},
          {"kv", kv}};
}

Identity Identity::from_fields(const std::vector<std::pair<std::string, std::string>>& fields) {
  Identity identity;
  for (const auto& [name, value] : fields) {
    std::string* field = name == "architecture"    ? &identity.architecture
                         : name == "config"        ? &identity.config
                         : name == "weights"       ? &identity.weights
                         : name == "tokenizer"     ? &identity.tokenizer
                         : name == "chat_template" ? &identity.chat_template
                         : name == "rope"          ? &identity.rope
                         : name == "kv"            ? &identity.kv
                                                   : nullptr;
    if (field == nullptr) {
      throw Error(ErrorCode::kIncompatible,
                  "The identity has a field '" + name + "' that this version of Torpor does not know; use a newer one.");
    }
    *field = value;
  }
  return identity;
}

std::optional<std::string> Identity::first_difference(const Identity& other) const {
  const auto mine = fields();
  const auto theirs = other.fields();
  for (size_t i = 0; i < mine.size(); ++i) {
    if (mine[i].second != theirs[i].second) return mine[i].first;
  }
  return std::nullopt;
}

std::string Identity::digest() const {
  Hasher hasher;
  for (const auto& [name, value] : fields()) hasher.update_field(name).update_field(value);
  return hasher.hex();
}

size_t KvRun::size() const noexcept {
  size_t size = 0;
  for (const auto& span : spans()) size += span.size();
  return size;
}

void KvSnapshot::validate() const {
  auto fail = [](const std::string& what) {
    throw Error(ErrorCode::kInvalidArgument, "The KV snapshot is inconsistent: " + what + ".");
  };
  size_t covered = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const KvRun& run = runs[i];
    const bool last = i + 1 == runs.size();
    if (last ? run.n_tokens < 1 || run.n_tokens > kSegmentTokens : run.n_tokens != kSegmentTokens) {
      fail("run " + std::to_string(i) + " of " + std::to_string(runs.size()) + " holds " +
           std::to_string(run.n_tokens) + " tokens");
    }
    const size_t expected = layout.offset(layout.tensors.size(), run.n_tokens);
    if (run.size() != expected) {
      fail("run " + std::to_string(i) + " has " + std::to_string(run.size()) + " bytes, its layout needs " +
           std::to_string(expected));
    }
    covered += size_t(run.n_tokens);
  }
  if (covered != tokens.size()) {
    fail("its runs hold " + std::to_string(covered) + " rows for " + std::to_string(tokens.size()) + " tokens");
  }
  for (const KvState& tensor : state) {
    std::optional<uint64_t> size = safetensors_dtype_size(tensor.dtype);
    for (const uint64_t n : tensor.shape) size = size ? checked_mul(*size, n) : size;
    if (size.value_or(0) == 0 || *size != tensor.bytes.size()) {
      fail("the state '" + tensor.name + "' has " + std::to_string(tensor.bytes.size()) + " bytes, which its dtype and shape do not need");
    }
  }
}

void name_unknown_tokens(std::span<int32_t> ids, const std::string& rows_digest) {
  for (size_t i = 0; i < ids.size(); ++i) {
    const uint32_t part = uint32_t(std::stoul(rows_digest.substr(i % 4 * 8, 8), nullptr, 16));
    ids[i] = int32_t(part | 0x80000000u);
  }
}

bool has_unknown_tokens(std::span<const int32_t> ids) noexcept {
  return std::any_of(ids.begin(), ids.end(), [](int32_t id) { return id < 0; });
}

std::shared_ptr<std::byte> allocate_heap_buffer(size_t size) {
  constexpr std::align_val_t kAlignment{64};
  auto* bytes = static_cast<std::byte*>(::operator new(size, kAlignment, std::nothrow));
  if (bytes == nullptr) {
    throw Error(ErrorCode::kResourceExhausted, "Out of memory for a KV buffer of " + std::to_string(size) + " bytes.");
  }
  return {bytes, [](std::byte* p) { ::operator delete(p, std::align_val_t{64}); }};
}

}  // namespace torpor
