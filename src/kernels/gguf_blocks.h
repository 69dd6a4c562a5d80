#pragma once
/// The blocks of GGUF's quantized tensors, taken apart as ggml lays them out (ggml-common.h, ggml-quants.c). A block is
/// groups of weights that share a scale, and a weight of group g is affine in its code:
///
///     level = code, or what a codebook has for it
///     scale * (level - zero)     in a type without minima
///     scale * level + bias       in one with them
///
/// where the scale is the block's f16, or that times an integer of the group's. Likewise a bias, which is taken off where
/// it has such an integer. Products are exact in f32, so these are ggml's numbers. Any thread.

#include <cstddef>
#include <cstdint>

#include "base/gguf.h"

namespace torpor::kernels {

/// What codes stand for: bytes.
enum class Codebook {
  kNone,  ///< themselves
  kE2m1,  ///< 12 plus twice the number: MXFP4
  kIq4,   ///< 128 plus the number: IQ4_NL, IQ4_XS
};
/// [16], aligned for a vector of them; not of kNone.
const uint8_t* codebook_levels(Codebook codebook);

struct BlockShape {
  int bits = 0, group = 0;  ///< of a code; columns of a group
  Codebook codebook = Codebook::kNone;
  int zero = 0;
  bool minima = false;
  int scale_bits = 0;       ///< of the integer scales of groups; 0: the block is one group
  int scale_zero = 0;       ///< what is taken off an integer scale
};
/// Of a quantized type.
const BlockShape& block_shape(GgmlType type);

/// The codes of group `g` of a block, `group` of them. (MXFP4's negative zero is zero.)
void read_block_codes(GgmlType type, const std::byte* block, int g, uint8_t* codes);

/// The numbers that the scales of group `g` are made of.
struct BlockScales {
  uint16_t d = 0, dmin = 0;      ///< f16, the block's; dmin of types with minima. d is MXFP4's exponent
  uint8_t scale = 0, min = 0;    ///< integers of the group, if scale_bits
};
BlockScales read_block_scales(GgmlType type, const std::byte* block, int g);

/// A weight of group `g` is scale * level + bias.
struct GroupAffine {
  float scale = 0, bias = 0;
};
GroupAffine read_block_affine(GgmlType type, const std::byte* block, int g);

/// `columns` weights, whole blocks.
void dequantize_blocks(GgmlType type, const std::byte* blocks, int columns, float* out);

}  // namespace torpor::kernels
