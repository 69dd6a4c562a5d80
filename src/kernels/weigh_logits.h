#pragma once
/// What a draw from logits needs of each of them. On all threads of the shared pool.

#include <cstddef>

namespace torpor::kernels {

/// Weights that one sum is of.
inline constexpr size_t kWeightsPerSum = 4096;

/// weights [n] = exp((logits - top) / temperature), within 1e-5 relative or 1e-37: 1 of `top`, the largest logit, and 0
/// of -infinity. sums [n / kWeightsPerSum, rounded up] are of the weights in their places, within 1e-6 relative. The
/// temperature is above 0. The bits depend on the CPU target, not on threads.
void weigh_logits(const float* logits, size_t n, float top, double temperature, float* weights, double* sums);

}  // namespace torpor::kernels
