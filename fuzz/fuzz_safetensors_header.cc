/// The safetensors header parser: any bytes give a header that obeys the format, or kCorruption.

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/safetensors.h"
#include "require.h"
#include "torpor/error.h"

namespace {

void check(const torpor::SafetensorsHeader& header, uint64_t file_size) {
  require(header.data_start >= 8 && header.data_start <= file_size);
  uint64_t at = 0;
  for (const torpor::SafetensorsTensor& tensor : header.tensors) {
    require(tensor.begin == at && tensor.end >= tensor.begin); // no holes, no overlaps
    uint64_t size = torpor::safetensors_dtype_size(tensor.dtype);
    for (const uint64_t dim : tensor.shape) require(!__builtin_mul_overflow(size, dim, &size));
    require(size == tensor.size());
    require(header.find(tensor.name) == &tensor); // no duplicates
    at = tensor.end;
  }
  require(header.data_start + at == file_size);
}

void parse(std::span<const std::byte> bytes, uint64_t file_size) {
  try {
    check(torpor::parse_safetensors_header(bytes, file_size, "fuzzed"), file_size);
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  parse(bytes, size);
  // As if the file went on: what the header claims may then reach past what is in memory.
  if (size >= 8) {
    try {
      const uint64_t start = torpor::safetensors_data_start(bytes, UINT64_MAX / 2, "fuzzed");
      if (start <= size) parse(bytes, UINT64_MAX / 2);
    } catch (const torpor::Error& error) {
      require(error.code() == torpor::ErrorCode::kCorruption);
    }
  }
  return 0;
}
