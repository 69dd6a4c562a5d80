#pragma once
/// A projection of GGUF's blocks for MLX's operations.

#include <cstdint>
#include <optional>
#include <vector>

#include <mlx/array.h>

#include "model/projection.h"

namespace torpor::model {

namespace mx = mlx::core;

struct BlockArrays {
  mx::array weight;                          ///< packed, if there is a quantization, or f32 [n, k]
  std::optional<Quantization> quantization;  ///< as MLX has it
  std::optional<mx::array> scales, biases;   ///< f32, but for the scales of mxfp4
};

/// Affine of 2 to 8 bits where groups have 32 columns, mxfp4 as it is. MLX has no groups of 16: those become floats.
BlockArrays block_arrays(const Projection& p);

/// Rows in the order in which halves of heads rotate: row i is row rows_of_halves(n, heads)[i] of one where neighbours do.
std::vector<int32_t> rows_of_halves(int n, int neighbour_heads);

}  // namespace torpor::model
