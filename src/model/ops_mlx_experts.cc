/// Mixtures of experts over MLX's own operations.

#include <limits>

#include <mlx/ops.h>

#include "model/mlx_linear.h"

namespace torpor::model::on_mlx {
namespace {

using kernels::ExpertActivation;
using kernels::Routing;

/// A gate, or none; an up and a down.
struct Parts {
  std::optional<Linear> gate;
  Linear up, down;
};

struct Mixture final : Ops::Packed {
  Mixture(const Experts& spec, Linear router, Parts experts)
      : spec(spec), router(std::move(router)), experts(std::move(experts)) {}
  Experts spec;
  Linear router;
  Parts experts;  // of all, stacked
  std::optional<Parts> shared;
  std::optional<Linear> shared_gate;
};

mx::array activated(const Ops& ops, const Experts& spec, const std::optional<mx::array>& gate, const mx::array& up) {
  if (spec.activation == ExpertActivation::kRelu2) return mx::square(mx::maximum(up, mx::array(0.0f, up.dtype())));
  if (spec.activation == ExpertActivation::kClampedSwiGlu) {
    const mx::array limit(spec.limit, up.dtype()), one(1.0f, up.dtype());
    const mx::array low = mx::minimum(*gate, limit);
    const mx::array clipped = mx::clip(up, mx::negative(limit), limit);
    return mx::multiply(mx::add(clipped, one), mx::multiply(low, mx::sigmoid(ops.scale(low, 1.702f))));
  }
  return mx::multiply(spec.activation == ExpertActivation::kSilu ? silu(*gate) : ops.gelu(*gate), up);
}

mx::array of_experts(const std::vector<float>& values) {
  return mx::array(values.data(), {int(values.size())}, mx::float32);
}

/// The indices of the `n` largest of each row, the lower index of equals.
mx::array largest(const mx::array& scores, int n) {
  return mx::slice(mx::argsort(mx::negative(scores), -1), {0, 0}, {scores.shape(0), n});
}

/// What experts are chosen by [M, E]: those of all groups but the best fall out.
mx::array in_best_groups(const mx::array& ranked, const Routing& r) {
  const int m = ranked.shape(0), size = ranked.shape(1) / r.groups;
  const mx::array grouped = mx::reshape(ranked, {m, r.groups, size});
  const int summed = r.group_score == Routing::GroupScore::kTwoLargest ? std::min(2, size) : 1;
  const mx::array top = mx::slice(mx::sort(grouped, -1), {0, 0, size - summed}, {m, r.groups, size});
  const mx::array best = mx::expand_dims(largest(mx::sum(top, -1), r.chosen_groups), -1);
  const mx::array groups = mx::reshape(mx::arange(0, r.groups, best.dtype()), {1, 1, r.groups});
  const mx::array kept = mx::expand_dims(mx::any(mx::equal(best, groups), 1), -1);
  const mx::array least(-std::numeric_limits<float>::infinity());
  return mx::reshape(mx::where(kept, grouped, least), {m, r.groups * size});
}

}  // namespace

Ops::Weight pack_experts(const Experts& spec, const ExpertProjections& projections, mx::Dtype dtype) {
  const auto& [router, gates, ups, downs, shared, shared_gate] = projections;
  const auto stacked = [&](const std::vector<Projection>& parts) { return Linear::stacked(parts, dtype); };
  Parts all{.gate = std::nullopt, .up = stacked(ups), .down = stacked(downs)};
  if (!gates.empty()) all.gate = stacked(gates);
  auto weight = std::make_shared<Mixture>(spec, Linear(router, dtype), std::move(all));
  if (!shared.empty()) {
    const size_t up = shared.size() - 2;
    weight->shared = Parts{.gate = up == 0 ? std::nullopt : std::optional(Linear(shared[0], dtype)),
                           .up = Linear(shared[up], dtype), .down = Linear(shared[up + 1], dtype)};
  }
  if (shared_gate) weight->shared_gate.emplace(*shared_gate, dtype);
  return weight;
}

mx::array experts(const Ops& ops, const mx::array& x, const mx::array& routed, const Ops::Weight& w) {
  using Scores = Routing::Scores;
  using Weights = Routing::Weights;
  const auto& mixture = static_cast<const Mixture&>(*w);
  const Routing& routing = mixture.spec.routing;
  const mx::array logits = mx::astype(mixture.router.apply(routed), mx::float32);
  const mx::array scores = routing.scores == Scores::kSoftmax   ? mx::softmax(logits, -1, /*precise=*/true)
                           : routing.scores == Scores::kSigmoid ? mx::sigmoid(logits)
                                                                : logits;
  mx::array ranked = routing.selection_bias.empty() ? scores : mx::add(scores, of_experts(routing.selection_bias));
  if (routing.groups > 1) ranked = in_best_groups(ranked, routing);
  const mx::array chosen = mx::sort(largest(ranked, routing.chosen), -1);
  mx::array weights = mx::take_along_axis(scores, chosen, -1);
  if (routing.weights == Weights::kSoftmax) weights = mx::softmax(weights, -1, /*precise=*/true);
  if (routing.weights == Weights::kNormalised) {
    weights = mx::divide(weights, mx::add(mx::sum(weights, -1, /*keepdims=*/true), mx::array(routing.epsilon)));
  }
  weights = mx::multiply(weights, mx::array(routing.scale));
  if (!routing.expert_scale.empty()) {
    weights = mx::multiply(weights, mx::take(of_experts(routing.expert_scale), chosen));
  }
  const mx::array rows = mx::expand_dims(x, {-2, -3});
  const auto& [gate, up, down] = mixture.experts;
  const std::optional<mx::array> gates = gate ? std::optional(gate->apply(rows, chosen)) : std::nullopt;
  const mx::array hidden = activated(ops, mixture.spec, gates, up.apply(rows, chosen));
  const mx::array out = mx::squeeze(down.apply(hidden, chosen), -2);
  mx::array sum = mx::sum(mx::multiply(out, mx::astype(mx::expand_dims(weights, -1), out.dtype())), -2);
  if (!mixture.shared) return sum;
  const auto& [shared_gate, shared_up, shared_down] = *mixture.shared;
  const std::optional<mx::array> shared_gates = shared_gate ? std::optional(shared_gate->apply(x)) : std::nullopt;
  mx::array shared = shared_down.apply(activated(ops, mixture.spec, shared_gates, shared_up.apply(x)));
  if (mixture.shared_gate) shared = mx::multiply(shared, mx::sigmoid(mixture.shared_gate->apply(x)));
  return mx::add(sum, shared);
}

}  // namespace torpor::model::on_mlx
