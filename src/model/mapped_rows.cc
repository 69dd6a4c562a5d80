#include "model/mapped_rows.h"

#include <cstring>

#include <mlx/ops.h>

#include "kernels/gguf_blocks.h"
#include "torpor/error.h"

namespace torpor::model {

MappedRows::MappedRows(const Weights& weights, Projection table) : weights_(weights), table_(std::move(table)) {
  if (table_.quantization && !table_.biases) {
    throw Error(ErrorCode::kInvalidArgument, "unsupported quantization of " + table_.weight.name + ", supported: affine.");
  }
}

mx::array MappedRows::rows(const std::vector<int32_t>& tokens) const {
  const auto device = mx::Device::cpu;
  if (table_.blocks) {
    const size_t row = table_.weight.nbytes / size_t(table_.n);
    mx::array rows(mx::allocator::malloc(tokens.size() * size_t(table_.k) * 4), {int(tokens.size()), table_.k}, mx::float32);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const size_t at = tokens[i] < table_.n ? size_t(tokens[i]) : 0;
      float* out = rows.data<float>() + i * size_t(table_.k);
      kernels::dequantize_blocks(*table_.blocks, table_.weight.data + at * row, table_.k, out);
    }
    return rows;
  }
  const auto gather = [&](const TensorView& tensor) {
    const size_t row = tensor.nbytes / size_t(table_.n);
    const mx::Dtype dtype = tensor.dtype == "U32"    ? mx::uint32
                            : tensor.dtype == "F16"  ? mx::float16
                            : tensor.dtype == "BF16" ? mx::bfloat16
                                                     : mx::float32;
    mx::array rows(mx::allocator::malloc(tokens.size() * row), {int(tokens.size()), int(tensor.shape[1])}, dtype);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const size_t at = tokens[i] < table_.n ? size_t(tokens[i]) : 0;
      std::memcpy(rows.data<uint8_t>() + i * row, tensor.data + at * row, row);
    }
    return dtype == mx::uint32 ? rows : mx::astype(rows, mx::float32, device);
  };
  if (!table_.quantization) return gather(table_.weight);
  return mx::dequantize(gather(table_.weight), gather(*table_.scales), gather(*table_.biases), table_.quantization->group,
                        table_.quantization->bits, "affine", std::nullopt, std::nullopt, device);
}

}  // namespace torpor::model
