/// Pages of families with mixtures of experts, and the mixtures of others.

#include <algorithm>
#include <array>
#include <limits>

#include "model/config_field.h"
#include "model/family_pages.h"

namespace torpor::model {

using nlohmann::json;
using kernels::Routing;

void check_experts(const Experts& experts) {
  constexpr int kMost = 1 << 12, kLargest = 1 << 24;
  const auto refuse = [](const std::string& what) {
    throw Error(ErrorCode::kInvalidArgument, "config.json: " + what + ", which can't be.");
  };
  const Routing& routing = experts.routing;
  if (experts.size > kLargest || experts.shared_size > kLargest) bad_field("moe_intermediate_size", "at most 2^24");
  if (experts.n > kMost || routing.chosen > experts.n) {
    refuse("a token goes to " + std::to_string(routing.chosen) + " of " + std::to_string(experts.n) + " experts");
  }
  const int groups = routing.groups, kept = routing.chosen_groups;
  if (groups < 1 || kept < 1 || kept > groups || experts.n % groups != 0 ||
      routing.chosen > experts.n / groups * kept) {
    refuse("a token's " + std::to_string(routing.chosen) + " of " + std::to_string(experts.n) + " experts are in " +
           std::to_string(kept) + " of " + std::to_string(groups) + " groups");
  }
}

int count_of(FamilyFields& fields, const char* key) {
  count_field(fields.config(), key);
  return fields.count(key);
}

/// Qwen 3 with experts in most layers.
void qwen3_moe(ModelConfig& model, FamilyFields& fields) {
  qwen3(model, fields);
  const int step = std::max(1, fields.count("decoder_sparse_step"));
  const std::vector<int> dense = fields.indices("mlp_only_layers");
  Experts experts{.n = count_of(fields, "num_experts"), .size = count_of(fields, "moe_intermediate_size")};
  experts.routing = {.weights = fields.flag("norm_topk_prob", false) ? Routing::Weights::kNormalised
                                                                     : Routing::Weights::kScores,
                     .chosen = count_of(fields, "num_experts_per_tok")};
  mix(model, experts, [&](int layer) {
    return std::ranges::find(dense, layer) == dense.end() && (layer + 1) % step == 0;
  });
}

/// Experts in every layer, as wide as the MLP would be, weighed by the softmax of the chosen logits.
static void mix_everywhere(ModelConfig& model, FamilyFields& fields, Experts experts = {}) {
  experts.n = count_of(fields, "num_local_experts");
  experts.size = model.layers.front().mlp.size;
  experts.routing = {.scores = Routing::Scores::kLinear,
                     .weights = Routing::Weights::kSoftmax,
                     .chosen = count_of(fields, "num_experts_per_tok")};
  mix(model, experts, [](int) { return true; });
}

/// Llama's attention, and experts in every layer.
void mixtral(ModelConfig& model, FamilyFields& fields) {
  model.names.experts.module = "block_sparse_moe";
  std::ranges::copy(std::array{"w1", "w3", "w2"}, model.names.experts.parts);
  mix_everywhere(model, fields);
}

/// Norms of q and k over all heads; experts in every layer.
void olmoe(ModelConfig& model, FamilyFields& fields) {
  for (LayerSpec& layer : model.layers) {
    layer.attention.qk_norm = QkNorm::kWhole;
    layer.attention.qkv_bias = layer.attention.output_bias = model.attention_bias;
  }
  Experts experts{.n = count_of(fields, "num_experts"), .size = model.layers.front().mlp.size};
  experts.routing = {.weights = fields.flag("norm_topk_prob", false) ? Routing::Weights::kNormalised
                                                                     : Routing::Weights::kScores,
                     .chosen = count_of(fields, "num_experts_per_tok")};
  mix(model, experts, [](int) { return true; });
}

/// Granite's, with experts in every layer.
void granitemoe(ModelConfig& model, FamilyFields& fields) {
  granite(model, fields);
  granite_experts(model, fields, {});
}

void granite_experts(ModelConfig& model, FamilyFields& fields, Experts experts) {
  model.names.experts.module = "block_sparse_moe";
  model.names.experts.router = "router.layer";
  model.names.experts.fused_gate_up = "input_linear.weight";
  model.names.experts.fused_down = "output_linear.weight";
  mix_everywhere(model, fields, experts);
}

void deepseek_experts(ModelConfig& model, FamilyFields& fields) {
  if (field(fields.config(), "n_routed_experts") == nullptr) return;
  Experts experts{.n = fields.count("n_routed_experts"), .size = count_of(fields, "moe_intermediate_size")};
  const int64_t shared = int64_t(fields.count("n_shared_experts")) * experts.size;
  experts.shared_size = int(std::min<int64_t>(shared, std::numeric_limits<int>::max()));
  const std::string method = fields.text("topk_method", "noaux_tc");
  const std::string scores = fields.text("scoring_func", method == "noaux_tc" ? "sigmoid" : "softmax");
  if (scores != "sigmoid" && scores != "softmax") bad_field("scoring_func", "sigmoid or softmax");
  if (method != "noaux_tc" && method != "greedy" && method != "group_limited_greedy") {
    bad_field("topk_method", "noaux_tc, greedy or group_limited_greedy");
  }
  Routing& routing = experts.routing;
  routing.scores = scores == "sigmoid" ? Routing::Scores::kSigmoid : Routing::Scores::kSoftmax;
  routing.chosen = count_of(fields, "num_experts_per_tok");
  if (fields.flag("norm_topk_prob", false) && routing.chosen > 1) {
    routing.weights = Routing::Weights::kNormalised;
    routing.epsilon = 1e-20f;
  }
  routing.scale = fields.number("routed_scaling_factor", 1);
  experts.selection_bias = method == "noaux_tc" && scores == "sigmoid";
  if (method != "greedy") {
    routing.groups = std::max(1, fields.count("n_group"));
    routing.chosen_groups = std::max(1, fields.count("topk_group"));
    routing.group_score =
        method == "noaux_tc" ? Routing::GroupScore::kTwoLargest : Routing::GroupScore::kLargest;
  }
  const int dense = fields.count("first_k_dense_replace"), step = std::max(1, fields.count("moe_layer_freq"));
  mix(model, experts, [&](int layer) { return layer >= dense && layer % step == 0; });
}

/// Heads rotate in part; norms on every head of q and k in the larger ones. DeepSeek's mixture.
void glm4_moe(ModelConfig& model, FamilyFields& fields) {
  const bool norms = fields.flag("use_qk_norm", false);
  for (LayerSpec& layer : model.layers) {
    if (norms) layer.attention.qk_norm = QkNorm::kHeads;
    layer.attention.qkv_bias = model.attention_bias;
  }
  deepseek_experts(model, fields);
}

/// Norms of q and k over all heads, of which some dims rotate; sigmoids, chosen with a bias, in every layer.
void minimax(ModelConfig& model, FamilyFields& fields) {
  const int head_dim = model.layers.front().attention.key_dim;
  json config = fields.config();
  if (const int rotated = fields.count("rotary_dim"); rotated != 0) {
    config["partial_rotary_factor"] = double(rotated) / head_dim;
    rotate_all_layers(model, parse_rope(config, head_dim));
  }
  if (fields.text("scoring_func", "sigmoid") != "sigmoid") bad_field("scoring_func", "sigmoid");
  if (fields.flag("use_qk_norm", true)) {
    for (LayerSpec& layer : model.layers) layer.attention.qk_norm = QkNorm::kWhole;
  }
  model.names.experts.module = "block_sparse_moe";
  model.names.experts.selection_bias = "e_score_correction_bias";
  std::ranges::copy(std::array{"w1", "w3", "w2"}, model.names.experts.parts);
  Experts experts{.n = count_of(fields, "num_local_experts"), .size = model.layers.front().mlp.size,
                  .selection_bias = true};
  experts.routing = {.scores = Routing::Scores::kSigmoid,
                     .weights = Routing::Weights::kNormalised,
                     .chosen = count_of(fields, "num_experts_per_tok"),
                     .epsilon = 1e-20f};
  mix(model, experts, [](int) { return true; });
}

/// Every other layer slides; a logit of each head's own in the softmax; biases everywhere; a clamped SwiGLU.
void gpt_oss(ModelConfig& model, FamilyFields& fields) {
  for (LayerSpec& layer : model.layers) {
    layer.attention.sinks = layer.attention.qkv_bias = layer.attention.output_bias = true;
  }
  model.names.experts.router = "router";
  model.names.experts.stacked = "experts";
  mix_everywhere(model, fields,
                 {.activation = kernels::ExpertActivation::kClampedSwiGlu, .limit = fields.number("swiglu_limit", 7),
                  .bias = true});
}

void gemma4_experts(ModelConfig& model, FamilyFields& fields) {
  if (!bool_field(fields.config(), "enable_moe_block", false)) return;
  fields.accept("enable_moe_block");
  model.names.experts = {.module = "", .router = "router.proj", .stacked = "experts.switch_glu"};
  Experts experts{.n = count_of(fields, "num_experts"), .size = count_of(fields, "moe_intermediate_size"),
                  .expert_scale = true, .beside_mlp = true};
  experts.routing = {.scores = Routing::Scores::kLinear,
                     .weights = Routing::Weights::kSoftmax,
                     .chosen = count_of(fields, "top_k_experts")};
  mix(model, experts, [](int) { return true; });
}

}  // namespace torpor::model
