#pragma once
/// Quantized weights of a checkpoint, read group by group and laid into the planes of a packed panel. Private to the
/// kernels; any thread.

#include <cstddef>
#include <cstdint>

#include "kernels/packed_layout.h"

namespace torpor::kernels {

/// Element `i` of an array of f32, f16 or bf16.
float load_float(const void* base, WeightSource::Type type, size_t i);

inline bool is_float(WeightSource::Type type) { return type <= WeightSource::Type::kBF16; }

/// What group `i`, counted over all rows, multiplies its codes with.
float load_scale(WeightSource::Type type, WeightSource::Type scale_type, const void* scales, size_t i);

/// A group's weights, of its codes; `bias` is an affine one's.
void dequantize(WeightSource::Type type, const uint8_t* codes, int group, float scale, float bias, float* out);

/// Throws kInvalidArgument, in one sentence, for a quantized source whose bits, group or columns are not supported.
void check_format(const WeightSource& source);

/// The codes of group `g`, counted over all rows, of a quantized source: `source.group` of them. An affine one's are
/// its integers.
void read_codes(const WeightSource& source, size_t g, uint8_t* codes);

/// One group of one row, `lane` of its panel, from the group's lines at `lines` on.
void write_planes(const PackedPart& part, int lane, const uint8_t* codes, std::byte* lines);
void read_planes(const PackedPart& part, int lane, const std::byte* lines, uint8_t* codes);

}  // namespace torpor::kernels
