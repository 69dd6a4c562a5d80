/// The modules of a mixture of experts, in each of the forms that checkpoints keep them in.

#include <algorithm>
#include <limits>

#include "model/modules.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

/// A float tensor [count, n, k] of all experts, one below the other.
Projection stacked_floats(const Weights& weights, const std::string& name, int count, int n, int k) {
  Projection all{.n = count * n, .k = k, .weight = weights.get(name, {count, n, k})};
  all.weight.shape = {all.n, k};
  require_float(all.weight);
  return all;
}

/// gpt-oss's tensors of all experts as OpenAI keeps them: `NAME_blocks` [count, n, k / 32, 16] are the bytes of mxfp4,
/// `NAME_scales` their scales.
Projection stacked_blocks(const Weights& weights, const std::string& name, int count, int n, int k) {
  if (k % 32 != 0) {
    throw Error(ErrorCode::kInvalidArgument, "The experts' weight " + name + " has " + std::to_string(k) +
                                                 " columns, which are not whole groups of mxfp4.");
  }
  Projection all{.n = count * n, .k = k, .weight = weights.get(name + "_blocks", {count, n, k / 32, 16}),
                 .quantization = Quantization{Quantization::Mode::kMxfp4, 4, 32},
                 .scales = weights.get(name + "_scales", {count, n, k / 32}),
                 .bias = weights.get(name + "_bias", {count, n})};
  for (const TensorView* bytes : {&all.weight, &*all.scales}) {
    if (bytes->dtype != "U8") {
      throw Error(ErrorCode::kCorruption, "The tensor " + bytes->name + " has the dtype " + bytes->dtype + ", not U8.");
    }
  }
  require_float(*all.bias);
  all.weight.dtype = "U32";
  all.weight.shape = {all.n, k / 8};
  all.scales->shape = {all.n, k / 32};
  all.bias->shape = {all.n};
  return all;
}

}  // namespace

Ops::Weight Modules::experts(const std::string& layer, const Experts& spec) const {
  const ModelConfig& c = checkpoint_.config;
  const ExpertNames& names = c.names.experts;
  const Weights& weights = checkpoint_.weights;
  const int hidden = c.hidden_size, n = spec.n, size = spec.size;
  if (int64_t(n) * 2 * std::max(size, hidden) > std::numeric_limits<int>::max()) {
    throw Error(ErrorCode::kInvalidArgument, "The experts of " + layer + " have more rows than can be counted.");
  }
  const bool gated = spec.activation != kernels::ExpertActivation::kRelu2;
  const std::string name = layer + "." + (names.module.empty() ? "" : names.module + ".");
  const std::string at = c.weight_prefix + name, stacked = at + names.stacked + ".";
  const std::string blocks = at + "experts.gate_up_proj";
  ExpertProjections parts{.router = projection(name + names.router, n, hidden, spec.bias)};
  const char* const both_stacked = "gate_up_proj";  // as llama.cpp may have them
  if (weights.find(stacked + names.stacked_parts[2] + ".weight") != nullptr) {
    const auto all = [&](const char* part, int rows, int columns) {
      return find_stacked(weights, c, stacked + part, n, rows, columns, spec.bias);
    };
    if (gated && weights.find(stacked + both_stacked + ".weight") != nullptr) {
      for (const Projection& both : all(both_stacked, 2 * size, hidden)) {
        parts.gates.push_back(rows_of(both, 0, size));
        parts.ups.push_back(rows_of(both, size, size));
      }
    } else {
      if (gated) parts.gates = all(names.stacked_parts[0], size, hidden);
      parts.ups = all(names.stacked_parts[1], size, hidden);
    }
    parts.downs = all(names.stacked_parts[2], hidden, size);
  } else if (weights.find(blocks + "_blocks") != nullptr) {
    const Projection both = stacked_blocks(weights, blocks, n, 2 * size, hidden);
    const Projection down = stacked_blocks(weights, at + "experts.down_proj", n, hidden, size);
    const auto every_other = [&](int first) {
      std::vector<RowRange> rows;
      for (int row = 0; row < size; ++row) rows.push_back({first + 2 * row, 1});
      return gathered_rows_of(both, rows);
    };
    for (int e = 0; e < n; ++e) {
      parts.gates.push_back(every_other(e * 2 * size));
      parts.ups.push_back(every_other(e * 2 * size + 1));
      parts.downs.push_back(rows_of(down, e * hidden, hidden));
    }
  } else if (gated && !spec.bias && weights.find(at + names.fused_gate_up) != nullptr) {
    const Projection both = stacked_floats(weights, at + names.fused_gate_up, n, 2 * size, hidden);
    const Projection down = stacked_floats(weights, at + names.fused_down, n, hidden, size);
    for (int e = 0; e < n; ++e) {
      parts.gates.push_back(rows_of(both, e * 2 * size, size));
      parts.ups.push_back(rows_of(both, e * 2 * size + size, size));
      parts.downs.push_back(rows_of(down, e * hidden, hidden));
    }
  } else {
    for (int e = 0; e < n; ++e) {
      const std::string one = name + names.each + "." + std::to_string(e) + ".";
      if (gated) parts.gates.push_back(projection(one + names.parts[0], size, hidden, spec.bias));
      parts.ups.push_back(projection(one + names.parts[1], size, hidden, spec.bias));
      parts.downs.push_back(projection(one + names.parts[2], hidden, size, spec.bias));
    }
  }
  if (spec.shared_size != 0 && !names.shared_gate_up.empty()) {
    const Projection both = projection(layer + "." + names.shared_gate_up, 2 * spec.shared_size, hidden);
    parts.shared = {rows_of(both, 0, spec.shared_size), rows_of(both, spec.shared_size, spec.shared_size),
                    projection(layer + "." + names.shared_down, hidden, spec.shared_size)};
  } else if (spec.shared_size != 0) {
    const std::string shared = name + names.shared + ".";
    if (gated) parts.shared.push_back(projection(shared + "gate_proj", spec.shared_size, hidden, spec.bias));
    parts.shared.push_back(projection(shared + "up_proj", spec.shared_size, hidden, spec.bias));
    parts.shared.push_back(projection(shared + "down_proj", hidden, spec.shared_size, spec.bias));
    if (spec.shared_gate) parts.shared_gate = projection(name + names.shared_gate, 1, hidden);
  }
  Experts with_numbers = spec;
  if (spec.selection_bias) with_numbers.routing.selection_bias = numbers(name + names.selection_bias, n);
  if (spec.expert_scale) with_numbers.routing.expert_scale = numbers(name + names.expert_scale, n);
  return ops_.pack_experts(with_numbers, parts);
}

BesideMlpWeights Modules::beside_mlp(const std::string& layer) const {
  const ModelConfig& c = checkpoint_.config;
  const int hidden = c.hidden_size;
  const TensorView& scale = checkpoint_.weights.get(c.weight_prefix + layer + ".router.scale", {hidden});
  return {.mlp_post_norm = norm(layer + ".post_feedforward_layernorm_1", hidden),
          .norm = norm(layer + ".pre_feedforward_layernorm_2", hidden),
          .post_norm = norm(layer + ".post_feedforward_layernorm_2", hidden),
          .router_norm = ops_.pack_norm(scale, c.norm_plus, c.centred_norms)};
}

}  // namespace torpor::model
