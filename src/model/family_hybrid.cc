/// Families in which layers that keep a state take turns with attention.

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>

#include "model/config_field.h"
#include "model/family_pages.h"

namespace torpor::model {
namespace {

using nlohmann::json;
using kernels::Recurrence;

constexpr int kLimit = 1 << 24;

/// A count that the identity keeps, from `least` to 4,096: far beyond any model.
int size_of(FamilyFields& fields, const char* key, int least = 1) {
  const int size = count_field(fields.config(), key);
  if (size < least || size > 4096) bad_field(key, least > 1 ? "from 2 to 4096" : "at most 4096");
  return fields.count(key);
}

/// Layers of which `attends` is false have `recurrent` in attention's place.
template <typename Attends>
void put_in_place(ModelConfig& model, const Recurrent& recurrent, Attends attends) {
  bool any = false;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (attends(i)) {
      any = true;
    } else {
      model.layers[i].recurrent = recurrent;
    }
  }
  if (!any) throw Error(ErrorCode::kInvalidArgument, "config.json: no layer attends, which is not supported.");
}

/// Whether each layer is of the kind `name`, of the kinds that a list has.
std::vector<bool> of_kind(const ModelConfig& model, const std::vector<std::string>& kinds, const char* key,
                          std::initializer_list<const char*> known, const char* name) {
  if (kinds.size() != model.layers.size()) bad_field(key, "a list with one entry per layer");
  std::vector<bool> is;
  for (const std::string& kind : kinds) {
    if (std::ranges::find(known, kind) == known.end()) {
      throw Error(ErrorCode::kInvalidArgument, "config.json: " + std::string(key) + " has a layer of the kind '" +
                                                   kind + "', which is not supported.");
    }
    is.push_back(kind == name);
  }
  return is;
}

/// Its fields by the names that the family gives them.
Recurrent mamba2(const ModelConfig& model, FamilyFields& fields, const char* taps, const char* heads,
                 const char* head_dim, const char* groups, const char* state) {
  Recurrent mamba{.shape = {.kind = Recurrence::kMamba2, .taps = size_of(fields, taps, 2),
                            .n_heads = size_of(fields, heads), .n_groups = size_of(fields, groups),
                            .key_dim = size_of(fields, state), .value_dim = size_of(fields, head_dim)}};
  kernels::RecurrentShape& shape = mamba.shape;
  if (shape.n_heads % shape.n_groups != 0) bad_field(heads, "a multiple of the number of groups");
  // mlx-lm's default of Granite's, [0.001, 100], is not what transformers has.
  const std::pair none{0.0f, std::numeric_limits<float>::infinity()};
  std::tie(shape.min_step, shape.max_step) = fields.limits("time_step_limit", none);
  shape.norm = {.size = shape.output(), .eps = model.norm_eps, .gate_before = true};
  return mamba;
}

/// Layers don't rotate.
void rotate_none(ModelConfig& model) {
  const auto none = std::make_shared<const Rope>();
  model.rope_description = "none";
  for (LayerSpec& layer : model.layers) layer.attention.rope = none;
}

}  // namespace

/// What LFM2's two have in common: short convolutions; norms on heads of q and k; a last norm of another name.
static void lfm2_layers(ModelConfig& model, FamilyFields& fields) {
  model.norm_eps = fields.number("norm_eps", 1e-5);
  model.final_norm = "embedding_norm";
  model.names = {.attention_norm = "operator_norm", .mlp_norm = "ffn_norm", .recurrent = "conv", .output = "out_proj",
                 .q_norm = "q_layernorm", .k_norm = "k_layernorm", .mlp = "feed_forward",
                 .mlp_parts = {"w1", "w3", "w2"}};
  Recurrent conv{.shape = {.kind = Recurrence::kShortConv, .taps = size_of(fields, "conv_L_cache", 2),
                           .value_dim = model.hidden_size}};
  conv.conv_bias = conv.bias = fields.flag("conv_bias", false);
  for (LayerSpec& layer : model.layers) layer.attention.qk_norm = QkNorm::kHeads;
  const std::vector<int> attending = fields.indices("full_attn_idxs");
  const std::vector<std::string> kinds = fields.kinds("layer_types");
  if (!attending.empty()) {
    put_in_place(model, conv, [&](size_t i) { return std::ranges::find(attending, int(i)) != attending.end(); });
  } else {
    const auto attends = of_kind(model, kinds, "layer_types", {"conv", "full_attention"}, "full_attention");
    put_in_place(model, conv, [&](size_t i) { return attends[i]; });
  }
}

/// The size of MLPs is what others call two thirds of.
void lfm2(ModelConfig& model, FamilyFields& fields) {
  lfm2_layers(model, fields);
  const json& config = fields.config();
  int64_t size = optional_count(config, "block_ff_dim").value_or(model.layers.front().mlp.size);
  if (fields.flag("block_auto_adjust_ff_dim", true)) {
    const double factor = positive_field(config, "block_ffn_dim_multiplier", 1);
    const int multiple = optional_count(config, "block_multiple_of").value_or(256);
    size = int64_t(std::min(factor * double(2 * size / 3), 2.0 * kLimit));
    size = (size + multiple - 1) / multiple * multiple;
  }
  if (size > kLimit) bad_field("block_ff_dim", "such that an MLP has at most 2^24 features");
  for (LayerSpec& layer : model.layers) layer.mlp.size = int(size);
}

/// The first layers are dense; experts of the others are chosen by sigmoids, with a bias.
void lfm2_moe(ModelConfig& model, FamilyFields& fields) {
  lfm2_layers(model, fields);
  model.names.experts.module = "feed_forward";
  model.names.experts.selection_bias = "expert_bias";
  std::ranges::copy(model.names.mlp_parts, model.names.experts.parts);
  Experts experts{.n = count_of(fields, "num_experts"), .size = count_of(fields, "moe_intermediate_size"),
                  .selection_bias = fields.flag("use_expert_bias", true)};
  experts.routing = {.scores = kernels::Routing::Scores::kSigmoid,
                     .weights = fields.flag("norm_topk_prob", true) ? kernels::Routing::Weights::kNormalised
                                                                    : kernels::Routing::Weights::kScores,
                     .chosen = count_of(fields, "num_experts_per_tok"),
                     .epsilon = 1e-6f,
                     .scale = fields.number("routed_scaling_factor", 1)};
  const int dense = fields.count("num_dense_layers");
  mix(model, experts, [&](int layer) { return layer >= dense; });
}

/// Gated delta rules, and a gated attention whose heads rotate in part; norms on heads of q and k.
static void gated_deltas(ModelConfig& model, FamilyFields& fields) {
  model.published_norm_plus = 1;
  model.names.recurrent = "linear_attn";
  Recurrent delta{.shape = {.kind = Recurrence::kGatedDelta, .taps = size_of(fields, "linear_conv_kernel_dim", 2),
                            .n_heads = size_of(fields, "linear_num_value_heads"),
                            .n_groups = size_of(fields, "linear_num_key_heads"),
                            .key_dim = size_of(fields, "linear_key_head_dim"),
                            .value_dim = size_of(fields, "linear_value_head_dim")}};
  delta.shape.norm = {.size = delta.shape.value_dim, .eps = model.norm_eps};
  if (delta.shape.n_heads % delta.shape.n_groups != 0) {
    bad_field("linear_num_value_heads", "a multiple of linear_num_key_heads");
  }
  const bool gated = fields.flag("attn_output_gate", true);
  for (LayerSpec& layer : model.layers) {
    layer.attention.qk_norm = QkNorm::kHeads;
    layer.attention.qkv_bias = layer.attention.output_bias = model.attention_bias;
    layer.attention.gated = gated;
  }
  const size_t interval = size_t(optional_count(fields.config(), "full_attention_interval").value_or(4));
  std::vector<std::string> kinds = fields.kinds("layer_types");
  if (kinds.empty()) {
    for (size_t i = 0; i < model.layers.size(); ++i) {
      kinds.push_back((i + 1) % interval == 0 ? "full_attention" : "linear_attention");
    }
  }
  const auto attends = of_kind(model, kinds, "layer_types", {"linear_attention", "full_attention"}, "full_attention");
  put_in_place(model, delta, [&](size_t i) { return attends[i]; });
}

/// Experts, if there are any, and one beside them that a gate weighs. `normalised`: their weights are, unless said.
static void qwen_experts(ModelConfig& model, FamilyFields& fields, bool normalised) {
  const int n = fields.count("num_experts");
  if (n == 0) return;
  model.names.experts.shared = "shared_expert";
  Experts experts{.n = n, .size = count_of(fields, "moe_intermediate_size"),
                  .shared_size = count_of(fields, "shared_expert_intermediate_size"), .shared_gate = true};
  experts.routing = {.weights = fields.flag("norm_topk_prob", normalised) ? kernels::Routing::Weights::kNormalised
                                                                          : kernels::Routing::Weights::kScores,
                     .chosen = count_of(fields, "num_experts_per_tok")};
  const int step = std::max(1, fields.count("decoder_sparse_step"));
  const std::vector<int> dense = fields.indices("mlp_only_layers");
  mix(model, experts, [&](int layer) {
    return std::ranges::find(dense, layer) == dense.end() && (layer + 1) % step == 0;
  });
}

void qwen3_5(ModelConfig& model, FamilyFields& fields) {
  gated_deltas(model, fields);
  qwen_experts(model, fields, /*normalised=*/true);
}

/// The same; each head of keys has the projections of its queries, values and gates beside it.
void qwen3_next(ModelConfig& model, FamilyFields& fields) {
  gated_deltas(model, fields);
  qwen_experts(model, fields, /*normalised=*/false);
  for (LayerSpec& layer : model.layers) {
    if (layer.recurrent) layer.recurrent->interleaved = true;
  }
}

/// DeepSeek's mixture, of experts without gates.
static void nemotron_experts(ModelConfig& model, FamilyFields& fields) {
  if (field(fields.config(), "moe_latent_size") != nullptr) bad_field("moe_latent_size", "absent: it is not supported");
  if (model.mlp_bias) bad_field("mlp_bias", "false where there are experts");
  count_field(fields.config(), "n_routed_experts");
  model.names.experts.module = "mixer";
  std::ranges::copy(std::array{"", "fc1", "fc2"}, model.names.experts.stacked_parts);
  deepseek_experts(model, fields);
  const bool shares = optional_count(fields.config(), "n_shared_experts").has_value();
  const int shared = fields.count("moe_shared_expert_intermediate_size");
  if (shared > kLimit) bad_field("moe_shared_expert_intermediate_size", "at most 2^24");
  for (LayerSpec& layer : model.layers) {
    if (!layer.experts) continue;
    layer.experts->activation = kernels::ExpertActivation::kRelu2;
    layer.experts->shared_size = shares ? shared : 0;
  }
}

/// Each layer is one part: Mamba-2, attention without RoPE, an MLP without a gate, or experts without.
void nemotron_h(ModelConfig& model, FamilyFields& fields) {
  const json& config = fields.config();
  model.norm_eps = fields.number("layer_norm_epsilon", 1e-5);
  model.embedding = "embeddings";
  model.final_norm = "norm_f";
  model.names = {.attention_norm = "norm", .mlp_norm = "norm", .attention = "mixer", .recurrent = "mixer",
                 .mlp = "mixer"};
  rotate_none(model);
  if (string_field(config, "mlp_hidden_act", "relu2") != "relu2") bad_field("mlp_hidden_act", "relu2");
  Recurrent mamba =
      mamba2(model, fields, "conv_kernel", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size");
  mamba.shape.norm.size /= mamba.shape.n_groups;
  mamba.conv_bias = fields.flag("use_conv_bias", true);
  mamba.bias = fields.flag("mamba_proj_bias", false);

  // A letter for each layer; lists of words are later configs'.
  std::string pattern;
  fields.accept("hybrid_override_pattern");
  if (const json* letters = field(config, "hybrid_override_pattern"); letters != nullptr && letters->is_string()) {
    pattern = letters->get<std::string>();
    fields.says("hybrid_override_pattern", pattern);
  } else {
    for (const char* key : {"hybrid_override_pattern", "layers_block_type", "layer_types"}) {
      if (!pattern.empty()) break;
      for (const std::string& kind : fields.kinds(key)) {
        const bool attends = kind == "*" || kind == "attention" || kind == "full_attention";
        const bool recurs = kind == "M" || kind == "mamba" || kind == "linear_attention";
        const bool routes = kind == "E" || kind == "moe";
        pattern += attends ? '*' : recurs ? 'M' : routes ? 'E' : kind == "-" || kind == "mlp" ? '-' : '?';
      }
    }
  }
  if (pattern.size() != model.layers.size()) bad_field("hybrid_override_pattern", "one letter per layer");
  if (pattern.find('E') != std::string::npos) nemotron_experts(model, fields);
  for (size_t i = 0; i < pattern.size(); ++i) {
    LayerSpec& layer = model.layers[i];
    layer.mixes = pattern[i] == 'M' || pattern[i] == '*';
    layer.feeds = !layer.mixes;
    if (pattern[i] == 'M') layer.recurrent = mamba;
    if (layer.feeds && pattern[i] != '-' && pattern[i] != 'E') bad_field("hybrid_override_pattern", "of M, *, - and E");
    if (pattern[i] != 'E') layer.experts.reset();
    layer.attention.qkv_bias = layer.attention.output_bias = model.attention_bias;
    layer.mlp.activation = Activation::kRelu2;
    layer.mlp.bias = model.mlp_bias;
  }
  if (pattern.find('*') == std::string::npos) bad_field("hybrid_override_pattern", "with a layer that attends");
}

/// Granite's, in which most layers are Mamba-2; mostly without RoPE. Experts of the larger ones have one beside them.
void granitemoehybrid(ModelConfig& model, FamilyFields& fields) {
  granite(model, fields);
  if (fields.text("position_embedding_type", "rope") == "nope") rotate_none(model);
  model.names.recurrent = "mamba";
  model.names.experts.shared_gate_up = "shared_mlp.input_linear";
  model.names.experts.shared_down = "shared_mlp.output_linear";
  std::vector<std::string> kinds = fields.kinds("layer_types");
  for (std::string& kind : kinds) {
    if (kind == "full_attention") kind = "attention";
    if (kind == "linear_attention") kind = "mamba";
  }
  const auto attends = of_kind(model, kinds, "layer_types", {"mamba", "attention"}, "attention");
  if (std::ranges::find(attends, false) != attends.end()) {
    Recurrent mamba =
        mamba2(model, fields, "mamba_d_conv", "mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state");
    mamba.conv_bias = fields.flag("mamba_conv_bias", true);
    mamba.bias = fields.flag("mamba_proj_bias", false);
    put_in_place(model, mamba, [&](size_t i) { return attends[i]; });
  }
  if (fields.count("num_local_experts") == 0) return;
  granite_experts(model, fields, {.shared_size = count_of(fields, "shared_intermediate_size")});
}

}  // namespace torpor::model
