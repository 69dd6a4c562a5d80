#pragma once
/// A mixture of experts: each row goes through a few MLPs of many, chosen by the router's logits, and gets their
/// weighted
/// sum. Like the other kernels (compute.h): f32 rows in plain memory, ThreadPool::shared(), blocking. A row's bits
/// depend on
/// neither the other rows nor M: of equal scores the lower index is chosen, and experts are summed in the order of
/// theirs.

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/compute.h"

namespace torpor::kernels {

/// How a row's experts are chosen and weighed.
struct Routing {
  enum class Scores { kSoftmax, kSigmoid, kLinear };
  enum class Weights {
    kScores,      ///< as they are
    kNormalised,  ///< divided by their sum over the chosen experts, plus `epsilon`
    kSoftmax,     ///< the softmax of the chosen experts' scores
  };
  Scores scores = Scores::kSoftmax;  ///< of the logits, over all experts
  Weights weights = Weights::kScores;
  int chosen = 1;                    ///< experts of a row: those with the largest scores
  float epsilon = 0;
  float scale = 1;                   ///< what all weights are multiplied by
  std::vector<float> selection_bias; ///< [E] added to scores for the choice, not in the weights; or empty
  std::vector<float> expert_scale;   ///< [E] what an expert's weights are multiplied by; or empty
  /// Experts are in so many groups of equal size, and come from those with the largest score. That is the sum of the
  /// two largest ranks in it, or the largest.
  enum class GroupScore { kTwoLargest, kLargest };
  int groups = 1, chosen_groups = 1;
  GroupScore group_score = GroupScore::kTwoLargest;
};

/// logits [M, E] -> the chosen experts of each row in ascending order, and their weights, both [M, chosen]. A row
/// with NaN in
/// its scores has a NaN among its weights.
void route(const float* logits, int m, int n_experts, const Routing& routing, int32_t* experts, float* weights);

enum class ExpertActivation {
  kSilu,           ///< silu(gate) ⊙ up
  kGeluTanh,       ///< gelu(gate) ⊙ up
  kClampedSwiGlu,  ///< (clamp(up) + 1) ⊙ g sigmoid(1.702 g), g = min(gate, limit): gpt-oss
  kRelu2,          ///< relu(up)², without a gate
};

/// y = down · activation(up · x), biases in the weights. `up` is gate and up: of pack_gated for kSilu and kGeluTanh,
/// of pack,
/// gate's rows first, for kClampedSwiGlu; or up alone.
struct Expert {
  std::shared_ptr<const PackedLinear> up, down;
};

struct Moe {
  Routing routing;
  ExpertActivation activation = ExpertActivation::kSilu;
  float limit = 7;              ///< of kClampedSwiGlu: up is clamped to [-limit, limit]
  std::vector<Expert> experts;  ///< [E], of equal shapes
  std::optional<Expert> shared;                       ///< every row's, added after the others
  std::shared_ptr<const PackedLinear> shared_gate;    ///< [1, K] whose sigmoid the shared expert is multiplied by; or nullptr
};

/// x [M, K], logits [M, E] -> y [M, N]. kInvalidArgument when the experts don't fit x or each other.
void moe(const float* x, const float* logits, int m, const Moe& w, float* y);

}  // namespace torpor::kernels
