#pragma once
/// The arithmetic of kernels/recurrent.h by MLX's operations, in f32 on whatever device is the default.

#include <mlx/array.h>

#include "kernels/recurrent.h"
#include "model/ops.h"

namespace torpor::model {

/// given [M, given()], of any float dtype -> [M, output()]. The sequences' new states are left in batch.states.
mx::array recurrent_on_mlx(const mx::array& given, const kernels::Recurrent& cell, size_t offset, Batch& batch);

}  // namespace torpor::model
