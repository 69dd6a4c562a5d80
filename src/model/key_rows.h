#pragma once
/// What KV formats do to keys beyond rounding, as far as it depends on the model.

#include <span>
#include <vector>

#include "model/rope.h"
#include "model/weights.h"
#include "torpor/model_info.h"

namespace torpor::model {

/// Of a layer with norms on the heads of q and k: what rotated keys (KvFormat::rotated) are divided by, and queries
/// multiplied by, [head_dim]. RoPE leaves it alone, for both dims of a pair have one factor; scores stay what they are,
/// for it is a power of two. Keys and queries then have dims of like size, as far as the norms' weights tell, so that H
/// spreads the error evenly.
std::vector<float> pair_factors(const Rope& rope, std::span<const float> q_norm, std::span<const float> k_norm);

/// The bias of keys in the order of their packed rows, in which halves of heads rotate; `neighbour_heads` as Projection
/// has it.
std::vector<float> key_bias_of(const TensorView& bias, int neighbour_heads);

struct Checkpoint;
/// ModelOutline::restore_keys.
RestoreKeys restore_keys_of(const Checkpoint& checkpoint);

}  // namespace torpor::model
