#pragma once
/// Each head of a row by a weight of its own, as latent attention's queries and outputs are. Like the other kernels
/// (compute.h): f32 rows in plain memory, ThreadPool::shared(), blocking, batch invariant.

#include <memory>
#include <vector>

#include "kernels/packed_linear.h"

namespace torpor::kernels {

/// Of each head [N, K], all of one shape.
using HeadWeights = std::vector<std::shared_ptr<const PackedLinear>>;

/// y [M, H, N]: of head h, x [M, H, K]'s head h times its weight, transposed. kInvalidArgument when shapes differ.
void heads_linear(const float* x, int m, const HeadWeights& heads, float* y);

}  // namespace torpor::kernels
