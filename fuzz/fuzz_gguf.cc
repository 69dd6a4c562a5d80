/// GGUF: any bytes give tensors that lie within the file and metadata that can be asked for, or a sentence.

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/gguf.h"
#include "require.h"
#include "torpor/error.h"

namespace {

/// What a caller asks for, whatever the file has under these keys.
template <typename Ask>
void ask(Ask ask) {
  try {
    ask();
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kInvalidArgument);
  }
}

void check(const torpor::GgufFile& file, std::span<const std::byte> bytes) {
  for (const torpor::GgufTensor& tensor : file.tensors()) {
    int64_t elements = 1;
    for (const int64_t dim : tensor.shape) require(!__builtin_mul_overflow(elements, dim, &elements));
    require(tensor.data.size() == size_t(elements / tensor.type->columns) * size_t(tensor.type->bytes));
    require(tensor.data.empty() || (tensor.data.data() >= bytes.data() &&
                                    tensor.data.data() + tensor.data.size() <= bytes.data() + bytes.size()));
  }
  for (const char* key : {"general.architecture", "llama.context_length", "tokenizer.ggml.tokens", "a", "b", "c"}) {
    ask([&] { (void)file.text(key); });
    ask([&] { (void)file.integer(key); });
    ask([&] { (void)file.number(key); });
    ask([&] { (void)file.flag(key); });
    ask([&] { (void)file.texts(key); });
    ask([&] { (void)file.numbers(key); });
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    check(torpor::GgufFile::parse(bytes, "fuzzed"), bytes);
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption || error.code() == torpor::ErrorCode::kInvalidArgument);
  }
  return 0;
}
