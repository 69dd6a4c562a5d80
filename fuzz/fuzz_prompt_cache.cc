/// mlx-lm's prompt-cache files: any bytes give layers whose rows lie within the file, or an error.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "base/safetensors.h"
#include "exchange/prompt_cache.h"
#include "require.h"
#include "torpor/error.h"

namespace {

void check(const torpor::PromptCacheFile& file, uint64_t file_size) {
  require(file.n_tokens >= 1 && !file.layers.empty());
  require(torpor::KvFormat::parse(file.format.name()).has_value());
  for (const torpor::PromptCacheLayer& layer : file.layers) {
    require(layer.data.size() == (file.format.bits == 0 ? 2 : 6));
    require(layer.n_kv_heads >= 1 && layer.key_dim >= 1 && layer.value_dim >= 1 && layer.capacity >= 1);
    // A byte at least for each element of keys and values; half of one where they have 4 bits.
    for (const int64_t dim : {layer.key_dim, layer.value_dim}) {
      require(uint64_t(layer.n_kv_heads) * uint64_t(layer.capacity) * uint64_t(dim) <= 2 * file_size);
    }
    for (const uint64_t data : layer.data) require(data < file_size);
    require(!layer.rows.empty());
    int64_t next = layer.rows.front().token;
    require(next >= 0);
    for (const torpor::FileRows& rows : layer.rows) {
      require(rows.token == next && rows.n >= 1 && rows.row >= 0 && rows.row + rows.n <= layer.capacity);
      next += rows.n;
    }
    require(next == file.n_tokens);
  }
  for (const torpor::PromptCacheState& state : file.states) {
    for (const auto& array : state.arrays) require(!array.shape.empty() && array.data < file_size);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    const torpor::SafetensorsHeader header = torpor::parse_safetensors_header(bytes, size, "fuzzed");
    if (!torpor::is_prompt_cache(header)) return 0;
    check(torpor::parse_prompt_cache(header, [&](const torpor::SafetensorsTensor& tensor) {
      require(tensor.size() == 4);
      int32_t value = 0;
      std::memcpy(&value, bytes.data() + header.data_start + tensor.begin, sizeof value);
      return value;
    }, "fuzzed"), size);
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption || error.code() == torpor::ErrorCode::kIncompatible);
  }
  return 0;
}
