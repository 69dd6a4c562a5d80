#include "model/block_arrays.h"

#include <cstring>

#include <mlx/ops.h>

#include "kernels/gguf_blocks.h"

namespace torpor::model {
namespace {

using Mode = Quantization::Mode;

mx::array made(mx::Shape shape, mx::Dtype dtype) {
  size_t bytes = dtype.size();
  for (const int dim : shape) bytes *= size_t(dim);
  return mx::array(mx::allocator::malloc(bytes), std::move(shape), dtype);
}

}  // namespace

BlockArrays block_arrays(const Projection& p) {
  const GgmlType type = *p.blocks;
  const GgmlTypeInfo& info = ggml_type_info(type);
  const kernels::BlockShape& shape = kernels::block_shape(type);
  const size_t n_blocks = size_t(p.n) * size_t(p.k / info.columns);
  if (shape.group != 32) {
    BlockArrays out{.weight = made({p.n, p.k}, mx::float32)};
    float* to = out.weight.data<float>();
    for (size_t i = 0; i < n_blocks; ++i, to += info.columns) {
      kernels::dequantize_blocks(type, p.weight.data + i * size_t(info.bytes), info.columns, to);
    }
    return out;
  }
  const bool mxfp4 = type == GgmlType::kMXFP4, levels = shape.codebook == kernels::Codebook::kIq4;
  const int bits = levels ? 8 : shape.bits, groups = p.k / shape.group;
  BlockArrays out{.weight = made({p.n, p.k * bits / 32}, mx::uint32),
                  .quantization = Quantization{mxfp4 ? Mode::kMxfp4 : Mode::kAffine, bits, 32}};
  out.scales = made({p.n, groups}, mxfp4 ? mx::uint8 : mx::float32);
  if (!mxfp4) out.biases = made({p.n, groups}, mx::float32);
  auto* words = out.weight.data<uint8_t>();
  size_t group = 0;
  for (size_t i = 0; i < n_blocks; ++i) {
    const std::byte* block = p.weight.data + i * size_t(info.bytes);
    for (int g = 0; g < info.columns / shape.group; ++g, ++group) {
      uint8_t codes[32];
      kernels::read_block_codes(type, block, g, codes);
      for (int c = 0; c < 32; c += 8, words += bits) {  // 8 codes fill whole bytes
        uint64_t eight = 0;
        for (int j = 0; j < 8; ++j) {
          const uint8_t code = levels ? kernels::codebook_levels(shape.codebook)[codes[c + j]] : codes[c + j];
          eight |= uint64_t(code) << (j * bits);
        }
        std::memcpy(words, &eight, size_t(bits));
      }
      if (mxfp4) {
        out.scales->data<uint8_t>()[group] = std::to_integer<uint8_t>(block[0]);
        continue;
      }
      const kernels::GroupAffine of = kernels::read_block_affine(type, block, g);
      out.scales->data<float>()[group] = of.scale;
      out.biases->data<float>()[group] = of.bias;
    }
  }
  return out;
}

std::vector<int32_t> rows_of_halves(int n, int neighbour_heads) {
  const int dim = n / neighbour_heads;
  std::vector<int32_t> rows;
  for (int row = 0; row < n; ++row) {
    const int i = row % dim;
    rows.push_back(row - i + (i < dim / 2 ? 2 * i : 2 * (i - dim / 2) + 1));
  }
  return rows;
}

}  // namespace torpor::model
