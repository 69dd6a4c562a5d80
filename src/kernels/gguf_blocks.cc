#include "kernels/gguf_blocks.h"

#include <bit>
#include <cstring>

#include "kernels/weight_formats.h"

namespace torpor::kernels {
namespace {

alignas(16) constexpr uint8_t kE2m1Levels[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
alignas(16) constexpr uint8_t kIq4Levels[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

// Bits, group, codebook, zero, minima, bits and zero of integer scales.
constexpr BlockShape kQ4_0 = {4, 32, Codebook::kNone, 8, false, 0, 0};
constexpr BlockShape kQ4_1 = {4, 32, Codebook::kNone, 0, true, 0, 0};
constexpr BlockShape kQ5_0 = {5, 32, Codebook::kNone, 16, false, 0, 0};
constexpr BlockShape kQ5_1 = {5, 32, Codebook::kNone, 0, true, 0, 0};
constexpr BlockShape kQ8_0 = {8, 32, Codebook::kNone, 128, false, 0, 0};
constexpr BlockShape kQ2_K = {2, 16, Codebook::kNone, 0, true, 4, 0};
constexpr BlockShape kQ3_K = {3, 16, Codebook::kNone, 4, false, 6, 32};
constexpr BlockShape kQ4_K = {4, 32, Codebook::kNone, 0, true, 6, 0};
constexpr BlockShape kQ5_K = {5, 32, Codebook::kNone, 0, true, 6, 0};
constexpr BlockShape kQ6_K = {6, 16, Codebook::kNone, 32, false, 8, 128};
constexpr BlockShape kIQ4_NL = {4, 32, Codebook::kIq4, 128, false, 0, 0};
constexpr BlockShape kIQ4_XS = {4, 32, Codebook::kIq4, 128, false, 6, 32};
constexpr BlockShape kMXFP4 = {4, 32, Codebook::kE2m1, 12, false, 0, 0};
constexpr BlockShape kOther = {};

uint8_t byte_at(const std::byte* at, int i) { return std::to_integer<uint8_t>(at[i]); }
uint16_t half_at(const std::byte* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return bits;
}
float to_float(uint16_t half) { return load_float(&half, WeightSource::Type::kF16, 0); }

/// 32 codes of 4 bits: the low ones of 16 bytes, then the high ones.
void nibbles(const std::byte* from, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = byte_at(from, i) & 15;
    codes[i + 16] = byte_at(from, i) >> 4;
  }
}

/// Of 32 codes, bit i of a u32 is the fifth of code i.
void add_fifth_bits(const std::byte* from, uint8_t* codes) {
  uint32_t bits;
  std::memcpy(&bits, from, 4);
  for (int i = 0; i < 32; ++i) codes[i] = uint8_t(codes[i] | ((bits >> i) & 1) << 4);
}

/// Groups of 16 columns of Q2_K, Q3_K and Q6_K lie so: half a block is 32 bytes, of which a group has one half, and
/// pairs of groups have bits of their own.
struct SixteenPlace {
  explicit SixteenPlace(int g) : half(g / 8), pair(g % 8 / 2), first(g % 2 * 16) {}
  int half, pair, first;
};

/// The scale and the minimum of group `g` of Q4_K and Q5_K: 16 numbers of 6 bits in 12 bytes.
void six_bits(const std::byte* from, int g, BlockScales& out) {
  const auto at = [&](int i) { return byte_at(from, i); };
  if (g < 4) {
    out.scale = at(g) & 63;
    out.min = at(g + 4) & 63;
  } else {
    out.scale = uint8_t((at(g + 4) & 15) | (at(g - 4) >> 6) << 4);
    out.min = uint8_t(at(g + 4) >> 4 | (at(g) >> 6) << 4);
  }
}

}  // namespace

const uint8_t* codebook_levels(Codebook codebook) { return codebook == Codebook::kE2m1 ? kE2m1Levels : kIq4Levels; }

const BlockShape& block_shape(GgmlType type) {
  switch (type) {
    case GgmlType::kQ4_0: return kQ4_0;
    case GgmlType::kQ4_1: return kQ4_1;
    case GgmlType::kQ5_0: return kQ5_0;
    case GgmlType::kQ5_1: return kQ5_1;
    case GgmlType::kQ8_0: return kQ8_0;
    case GgmlType::kQ2_K: return kQ2_K;
    case GgmlType::kQ3_K: return kQ3_K;
    case GgmlType::kQ4_K: return kQ4_K;
    case GgmlType::kQ5_K: return kQ5_K;
    case GgmlType::kQ6_K: return kQ6_K;
    case GgmlType::kIQ4_NL: return kIQ4_NL;
    case GgmlType::kIQ4_XS: return kIQ4_XS;
    case GgmlType::kMXFP4: return kMXFP4;
    default: return kOther;
  }
}

void read_block_codes(GgmlType type, const std::byte* block, int g, uint8_t* codes) {
  const SixteenPlace at(g);
  switch (type) {
    case GgmlType::kQ4_0:
    case GgmlType::kIQ4_NL: return nibbles(block + 2, codes);
    case GgmlType::kQ4_1: return nibbles(block + 4, codes);
    case GgmlType::kQ5_0:
      nibbles(block + 6, codes);
      return add_fifth_bits(block + 2, codes);
    case GgmlType::kQ5_1:
      nibbles(block + 8, codes);
      return add_fifth_bits(block + 4, codes);
    case GgmlType::kQ8_0:
      for (int i = 0; i < 32; ++i) codes[i] = byte_at(block + 2, i) ^ 0x80;
      return;
    case GgmlType::kQ2_K:
      for (int i = 0; i < 16; ++i) codes[i] = byte_at(block + 16, at.half * 32 + at.first + i) >> (2 * at.pair) & 3;
      return;
    case GgmlType::kQ3_K:
      for (int i = 0; i < 16; ++i) {
        const int low = byte_at(block + 32, at.half * 32 + at.first + i) >> (2 * at.pair) & 3;
        const int high = byte_at(block, at.first + i) >> (4 * at.half + at.pair) & 1;
        codes[i] = uint8_t(low | high << 2);
      }
      return;
    case GgmlType::kQ4_K:
    case GgmlType::kQ5_K: {
      const bool five = type == GgmlType::kQ5_K;
      const std::byte* low = block + (five ? 48 : 16) + g / 2 * 32;
      for (int i = 0; i < 32; ++i) {
        codes[i] = byte_at(low, i) >> (g % 2 * 4) & 15;
        if (five) codes[i] = uint8_t(codes[i] | (byte_at(block + 16, i) >> g & 1) << 4);
      }
      return;
    }
    case GgmlType::kQ6_K:
      for (int i = 0; i < 16; ++i) {
        const int low = byte_at(block, at.half * 64 + at.pair % 2 * 32 + at.first + i) >> (at.pair / 2 * 4) & 15;
        const int high = byte_at(block + 128, at.half * 32 + at.first + i) >> (2 * at.pair) & 3;
        codes[i] = uint8_t(low | high << 4);
      }
      return;
    case GgmlType::kIQ4_XS: return nibbles(block + 8 + g * 16, codes);
    case GgmlType::kMXFP4:
      nibbles(block + 1, codes);
      for (int i = 0; i < 32; ++i) codes[i] = codes[i] == 8 ? 0 : codes[i];
      return;
    default: return;
  }
}

BlockScales read_block_scales(GgmlType type, const std::byte* block, int g) {
  BlockScales out;
  switch (type) {
    case GgmlType::kQ2_K:
      out.d = half_at(block + 80);
      out.dmin = half_at(block + 82);
      out.scale = byte_at(block, g) & 15;
      out.min = byte_at(block, g) >> 4;
      return out;
    case GgmlType::kQ3_K: {
      const std::byte* scales = block + 96;
      const int low = g < 8 ? byte_at(scales, g) & 15 : byte_at(scales, g - 8) >> 4;
      out.d = half_at(block + 108);
      out.scale = uint8_t(low | (byte_at(scales, 8 + g % 4) >> (g / 4 * 2) & 3) << 4);
      return out;
    }
    case GgmlType::kQ4_K:
    case GgmlType::kQ5_K:
      out.d = half_at(block);
      out.dmin = half_at(block + 2);
      six_bits(block + 4, g, out);
      return out;
    case GgmlType::kQ6_K:
      out.d = half_at(block + 208);
      out.scale = byte_at(block + 192, g) ^ 0x80;
      return out;
    case GgmlType::kIQ4_XS:
      out.d = half_at(block);
      out.scale = uint8_t((byte_at(block + 4, g / 2) >> (g % 2 * 4) & 15) | (half_at(block + 2) >> (2 * g) & 3) << 4);
      return out;
    case GgmlType::kMXFP4:
      out.d = byte_at(block, 0);
      return out;
    default:
      out.d = half_at(block);
      if (block_shape(type).minima) out.dmin = half_at(block + 2);
      return out;
  }
}

GroupAffine read_block_affine(GgmlType type, const std::byte* block, int g) {
  const BlockShape& shape = block_shape(type);
  const BlockScales scales = read_block_scales(type, block, g);
  GroupAffine out;
  if (type == GgmlType::kMXFP4) {  // 2^(d - 128): half of E8M0, for levels are doubled
    out.scale = std::bit_cast<float>(scales.d < 2 ? 0x00200000u << scales.d : uint32_t(scales.d - 1) << 23);
  } else {
    out.scale = to_float(scales.d);
    if (shape.scale_bits != 0) out.scale *= float(scales.scale - shape.scale_zero);
  }
  if (!shape.minima) {
    out.bias = -float(shape.zero) * out.scale;
  } else {  // of one group as it stands, of many taken off
    out.bias = shape.scale_bits != 0 ? -(to_float(scales.dmin) * float(scales.min)) : to_float(scales.dmin);
  }
  return out;
}

void dequantize_blocks(GgmlType type, const std::byte* blocks, int columns, float* out) {
  const BlockShape& shape = block_shape(type);
  const GgmlTypeInfo& info = ggml_type_info(type);
  uint8_t codes[32];
  for (int column = 0; column < columns; column += info.columns, blocks += info.bytes) {
    for (int g = 0; g < info.columns / shape.group; ++g, out += shape.group) {
      read_block_codes(type, blocks, g, codes);
      const GroupAffine affine = read_block_affine(type, blocks, g);
      for (int i = 0; i < shape.group; ++i) {
        const uint8_t level = shape.codebook == Codebook::kNone ? codes[i] : codebook_levels(shape.codebook)[codes[i]];
        out[i] = float(level) * affine.scale + affine.bias;
      }
    }
  }
}

}  // namespace torpor::kernels
