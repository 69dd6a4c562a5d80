#include "model/family.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>

#include <mlx/types/half_types.h>

#include "model/config_field.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

/// Sliding layers have a RoPE of their own.
void rotate_sliding_layers(ModelConfig& model, Rope rope) {
  const auto shared = std::make_shared<const Rope>(std::move(rope));
  model.rope_description += "; in sliding layers " + shared->description;
  for (LayerSpec& layer : model.layers) {
    if (layer.attention.window != 0) layer.attention.rope = shared;
  }
}

/// Layers of which `rotates` is false have no RoPE.
template <typename Rotates>
void rotate_some_layers(ModelConfig& model, Rotates rotates) {
  const auto none = std::make_shared<const Rope>();
  std::string which;
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (rotates(i)) continue;
    model.layers[i].attention.rope = none;
    which.append(" ").append(std::to_string(i));
  }
  if (!which.empty()) model.rope_description += "; none in layers" + which;
}

// ---- pages

/// Llama 2 and 3.x, SmolLM2, Mistral: the plain pre-norm layer; biases where the config says so.
void llama(ModelConfig& model, FamilyFields&) {
  for (LayerSpec& layer : model.layers) {
    layer.attention.qkv_bias = layer.attention.output_bias = model.attention_bias;
    layer.mlp.bias = model.mlp_bias;
  }
}

/// Biases on q, k and v.
void qwen2(ModelConfig& model, FamilyFields&) {
  for (LayerSpec& layer : model.layers) layer.attention.qkv_bias = true;
}

/// A norm on every head of q and k.
void qwen3(ModelConfig& model, FamilyFields& fields) {
  fields.accept("use_qk_norm");
  for (LayerSpec& layer : model.layers) {
    layer.attention.qk_norm = QkNorm::kHeads;
    layer.attention.qkv_bias = layer.attention.output_bias = model.attention_bias;
  }
}

/// Experts in place of the MLP in the layers that `has` them.
template <typename Has>
void mix(ModelConfig& model, Experts experts, Has has) {
  constexpr int kMost = 1 << 12, kLargest = 1 << 24;
  if (experts.size > kLargest) bad_field("moe_intermediate_size", "at most 2^24");
  if (experts.n > kMost || experts.routing.chosen > experts.n) {
    throw Error(ErrorCode::kInvalidArgument, "config.json: a token goes to " + std::to_string(experts.routing.chosen) + " of " +
                                                 std::to_string(experts.n) + " experts, which can't be.");
  }
  for (size_t i = 0; i < model.layers.size(); ++i) {
    experts.activation = model.layers[i].mlp.activation;
    if (has(int(i))) model.layers[i].experts = experts;
  }
}

/// A count that the identity keeps.
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
  experts.routing = {.weights = fields.flag("norm_topk_prob", false) ? kernels::Routing::Weights::kNormalised
                                                                     : kernels::Routing::Weights::kScores,
                     .chosen = count_of(fields, "num_experts_per_tok")};
  mix(model, experts, [&](int layer) {
    return std::ranges::find(dense, layer) == dense.end() && (layer + 1) % step == 0;
  });
}

/// Llama's attention, and experts in every layer.
void mixtral(ModelConfig& model, FamilyFields& fields) {
  model.names.mlp = "block_sparse_moe";
  std::ranges::copy(std::array{"w1", "w3", "w2"}, model.names.expert_parts);
  Experts experts{.n = count_of(fields, "num_local_experts"), .size = model.layers.front().mlp.size};
  experts.routing = {.scores = kernels::Routing::Scores::kLinear,
                     .weights = kernels::Routing::Weights::kSoftmax,
                     .chosen = count_of(fields, "num_experts_per_tok")};
  mix(model, experts, [](int) { return true; });
}

/// q, k and v are one projection in the checkpoint, as are gate and up.
void phi3(ModelConfig& model, FamilyFields&) { model.names.fused = true; }

/// Norms before and after each part, of weights less one; a scaled embedding.
void gemma(ModelConfig& model, float embedding_scale) {
  model.norm_plus = 1;
  model.embedding_scale = embedding_scale;
  model.names = {.attention_norm = "input_layernorm", .attention_post_norm = "post_attention_layernorm",
                 .mlp_norm = "pre_feedforward_layernorm", .mlp_post_norm = "post_feedforward_layernorm"};
}

/// Soft caps on scores and logits; layers with a window and without take turns. (mlx-lm leaves the window out.)
void gemma2(ModelConfig& model, FamilyFields&) { gemma(model, std::sqrt(float(model.hidden_size))); }

/// A norm on every head of q and k; five layers with a window and a RoPE of their own to one without.
void gemma3(ModelConfig& model, FamilyFields& fields) {
  fields.accept("use_qk_norm");
  // The scale was rounded to bf16 in training.
  gemma(model, float(mlx::core::bfloat16_t(std::sqrt(float(model.hidden_size)))));
  rotate_sliding_layers(model, parse_local_rope(fields.config(), model.layers.front().attention.key_dim, 10000));
  for (LayerSpec& layer : model.layers) layer.attention.qk_norm = QkNorm::kHeads;
  // It has the factor of its linear RoPE in it already.
  if (const auto context = optional_count(fields.config(), "max_position_embeddings")) model.max_context = *context;
}

/// Attention and the MLP read one layer norm; layers without a window don't rotate.
void cohere2(ModelConfig& model, FamilyFields& fields) {
  model.norm_eps = fields.number("layer_norm_eps", 1e-5);
  model.centred_norms = true;
  model.logit_scale = fields.number("logit_scale", 0.0625);
  model.names.parallel = true;
  model.names.mlp_norm.clear();
  rotate_some_layers(model, [&](size_t i) { return model.layers[i].attention.window != 0; });
  for (LayerSpec& layer : model.layers) {
    layer.attention.qkv_bias = layer.attention.output_bias = model.attention_bias;
  }
}

/// Layers without a window have wider heads, kv heads of their own and another RoPE. Upper layers read the rows of
/// the last layer
/// of their kind below. Values are normalised. The small models have embeddings for each layer.
void gemma4(ModelConfig& model, FamilyFields& fields) {
  const json& config = fields.config();
  const json* bidirectional = field(config, "use_bidirectional_attention");
  if (bidirectional != nullptr && *bidirectional == "vision") fields.accept("use_bidirectional_attention");  // of images alone
  const size_t n = model.layers.size(), n_shared = size_t(fields.count("num_kv_shared_layers"));
  const int wide = fields.count("global_head_dim"), kv_heads = fields.count("num_global_key_value_heads");
  const bool keys_are_values = fields.flag("attention_k_eq_v", false);
  const bool double_wide = fields.flag("use_double_wide_mlp", false);
  if (n_shared >= n) bad_field("num_kv_shared_layers", "less than num_hidden_layers");
  if (wide > 4096 || wide % 2 != 0) bad_field("global_head_dim", "an even number up to 4096");

  // As its embeddings multiply it in bf16.
  const auto root = [](int size) { return float(mlx::core::bfloat16_t(std::sqrt(float(size)))); };
  gemma(model, root(model.hidden_size));
  model.norm_plus = 0;
  model.names.scalar = "layer_scalar";
  if (const int size = fields.count("hidden_size_per_layer_input"); size != 0) {
    const int vocabulary = fields.count("vocab_size_per_layer_input");
    if (size > (1 << 16)) bad_field("hidden_size_per_layer_input", "at most 2^16");
    if (vocabulary == 0) bad_field("vocab_size_per_layer_input", "a positive integer");
    model.layer_inputs = {.size = size, .vocab_size = vocabulary, .scale = root(size)};
  }
  const int narrow = model.layers.front().attention.key_dim;
  const auto rope = std::make_shared<const Rope>(parse_rope(config, wide != 0 ? wide : narrow));
  model.rope_description = rope->description;
  rotate_sliding_layers(model, parse_local_rope(config, narrow, 10000));
  for (size_t i = 0; i < n; ++i) {
    Attention& attention = model.layers[i].attention;
    attention.scale = 1;
    attention.qk_norm = QkNorm::kHeads;
    attention.value_norm = true;
    if (attention.window == 0) {
      attention.rope = rope;
      if (wide != 0) attention.key_dim = attention.value_dim = wide;
      attention.keys_are_values = keys_are_values;
      if (keys_are_values && kv_heads != 0) attention.n_kv_heads = kv_heads;
      if (attention.n_heads % attention.n_kv_heads != 0) {
        bad_field("num_attention_heads", "a multiple of num_global_key_value_heads");
      }
    }
    if (i < n - n_shared) continue;
    if (double_wide) model.layers[i].mlp.size *= 2;
    size_t lender = n - n_shared;
    while (lender > 0 && (model.layers[lender - 1].attention.window != 0) != (attention.window != 0)) --lender;
    if (lender == 0) bad_field("num_kv_shared_layers", "such that each kind of layer has rows below");
    attention.reads_rows_of = int(lender - 1);
    model.layers[lender - 1].attention.lends_rows = true;
  }
}

/// Llama's, with multipliers.
void granite(ModelConfig& model, FamilyFields& fields) {
  llama(model, fields);
  model.embedding_scale = fields.number("embedding_multiplier", 1);
  model.residual_scale = fields.number("residual_multiplier", 1);
  model.logit_scale = 1 / fields.number("logits_scaling", 1);
  const float scale = fields.number("attention_multiplier", 1);
  for (LayerSpec& layer : model.layers) layer.attention.scale = scale;
}

/// Llama's, and queries are scaled by their position. (Its RoPE is yarn.)
void ministral3(ModelConfig& model, FamilyFields& fields) {
  const json parameters = rope_fields(fields.config());
  const double beta = number_field(parameters, "llama_4_scaling_beta", 0);
  const int period = optional_count(parameters, "original_max_position_embeddings").value_or(16384);
  if (beta == 0) return;
  model.rope_description += "; queries scaled by " + number_text(beta) + " after " + std::to_string(period);
  for (LayerSpec& layer : model.layers) layer.attention.query_scale = QueryScale{.beta = float(beta), .period = period};
}

/// Norms of what the parts add, none before them; norms of q and k over all heads; sliding layers have the plain RoPE.
void olmo3(ModelConfig& model, FamilyFields& fields) {
  model.names = {.attention_norm = "", .attention_post_norm = "post_attention_layernorm", .mlp_norm = "",
                 .mlp_post_norm = "post_feedforward_layernorm"};
  const Attention& first = model.layers.front().attention;
  rotate_sliding_layers(model, parse_local_rope(fields.config(), first.key_dim, first.rope->theta));
  for (LayerSpec& layer : model.layers) {
    layer.attention.qk_norm = QkNorm::kWhole;
    layer.attention.qkv_bias = layer.attention.output_bias = model.attention_bias;
  }
}

/// Llama's, with biases of their own for what attention reads and what it gives.
void seed_oss(ModelConfig& model, FamilyFields& fields) {
  llama(model, fields);
  const bool bias = fields.flag("attention_out_bias", false);
  for (LayerSpec& layer : model.layers) layer.attention.output_bias = bias;
}

/// Llama's, but some layers don't rotate: every fourth, where no list says which.
void smollm3(ModelConfig& model, FamilyFields& fields) {
  llama(model, fields);
  fields.accept("no_rope_layers");
  const json* rotates = field(fields.config(), "no_rope_layers");
  const auto is_flag = [](const json& one) { return one.is_boolean() || one == 0 || one == 1; };
  if (rotates != nullptr && (!rotates->is_array() || rotates->size() != model.layers.size() ||
                             !std::ranges::all_of(*rotates, is_flag))) {
    bad_field("no_rope_layers", "a list of 0 or 1, one per layer");
  }
  const size_t interval = size_t(optional_count(fields.config(), "no_rope_layer_interval").value_or(4));
  rotate_some_layers(model, [&](size_t i) {
    if (rotates == nullptr) return (i + 1) % interval != 0;
    const json& one = (*rotates)[i];
    return one == 1 || one == true;
  });
}

// ---- the table

constexpr const char* kGemma4Text =
    R"({"hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144, "num_attention_heads": 8, "head_dim": 256,
        "global_head_dim": 512, "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "num_key_value_heads": 1,
        "num_kv_shared_layers": 20, "hidden_size_per_layer_input": 256, "sliding_window": 512, "sliding_window_pattern": 5,
        "max_position_embeddings": 131072, "final_logit_softcapping": 30, "use_double_wide_mlp": true,
        "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
                            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
        "tie_word_embeddings": true, "hidden_act": "gelu_pytorch_tanh"})";

// As mlx-lm has them, but for sizes that every config has.
constexpr const char* kQwen35Text =
    R"({"linear_num_value_heads": 64, "linear_num_key_heads": 16, "linear_key_head_dim": 192,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.25, "rope_theta": 100000})";

constexpr Family kFamilies[] = {
    {"cohere2", "cohere2", "",
     R"({"head_dim": 128, "rope_theta": 50000, "rope_traditional": true, "sliding_window": 4096, "sliding_window_pattern": 4,
         "max_position_embeddings": 8192, "tie_word_embeddings": true})",
     cohere2, false, /*mlx_lm_rotates=*/true},
    {"gemma2", "gemma2", "",
     R"({"head_dim": 256, "query_pre_attn_scalar": 144, "attn_logit_softcapping": 50, "final_logit_softcapping": 30,
         "sliding_window": 4096, "sliding_window_pattern": 2, "max_position_embeddings": 8192, "tie_word_embeddings": true,
         "hidden_act": "gelu_pytorch_tanh"})",
     gemma2},
    {"gemma3", "gemma3", "language_model.",
     R"({"model_type": "gemma3_text", "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208})", gemma3,
     false, /*mlx_lm_rotates=*/true},
    {"gemma3_text", "gemma3", "",
     R"({"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912, "num_attention_heads": 4, "head_dim": 256,
         "num_key_value_heads": 1, "vocab_size": 262144, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
         "hidden_act": "gelu_pytorch_tanh"})",
     gemma3, false, /*mlx_lm_rotates=*/true},
    {"gemma4", "gemma4", "language_model.", R"({"model_type": "gemma4_text"})", gemma4, false, /*mlx_lm_rotates=*/true},
    {"gemma4_text", "gemma4", "", kGemma4Text, gemma4, false, /*mlx_lm_rotates=*/true},
    {"gemma4_unified", "gemma4", "language_model.", R"({"model_type": "gemma4_text"})", gemma4, false, /*mlx_lm_rotates=*/true},
    {"gemma4_unified_text", "gemma4", "", kGemma4Text, gemma4, false, /*mlx_lm_rotates=*/true},
    {"granite", "granite", "", R"({"tie_word_embeddings": true})", granite},
    {"lfm2", "lfm2", "", R"({"rope_theta": 1e6, "tie_word_embeddings": true})", lfm2, false, false, /*hybrid=*/true},
    {"llama", "llama", "", "{}", llama},
    {"ministral3", "ministral3", "", "{}", ministral3, false, /*mlx_lm_rotates=*/true},
    {"mistral", "llama", "", "{}", llama, /*slides_everywhere=*/true},
    {"mistral3", "llama", "language_model.", R"({"model_type": "mistral", "tie_word_embeddings": false})", llama},
    {"mixtral", "mixtral", "",
     R"({"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": false})",
     mixtral, /*slides_everywhere=*/true},
    {"nemotron_h", "nemotron_h", "", R"({"tie_word_embeddings": false})", nemotron_h, false, false, /*hybrid=*/true},
    {"olmo3", "olmo3", "", R"({"sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": false})", olmo3,
     false, /*mlx_lm_rotates=*/true},
    {"phi3", "phi3", "", R"({"max_position_embeddings": 131072, "tie_word_embeddings": false})", phi3,
     /*slides_everywhere=*/true},
    {"qwen2", "qwen2", "", R"({"rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": true})", qwen2},
    {"qwen3", "qwen3", "", "{}", qwen3},
    {"qwen3_5", "qwen3_5", "language_model.", R"({"model_type": "qwen3_5_text"})", qwen3_5, false, false,
     /*hybrid=*/true},
    {"qwen3_5_text", "qwen3_5", "", kQwen35Text, qwen3_5, false, false, /*hybrid=*/true},
    {"qwen3_moe", "qwen3_moe", "", R"({"tie_word_embeddings": false})", qwen3_moe},
    {"qwen3_next", "qwen3_next", "", R"({"tie_word_embeddings": false, "partial_rotary_factor": 0.25})", qwen3_next,
     false, false, /*hybrid=*/true},
    {"seed_oss", "seed_oss", "", "{}", seed_oss},
    {"smollm3", "smollm3", "", "{}", smollm3},
};

const Family& find_family(const std::string& model_type) {
  const auto it =
      std::ranges::find(kFamilies, model_type, [](const Family& family) { return std::string(family.model_type); });
  if (it != std::end(kFamilies)) return *it;
  std::string supported;
  for (const Family& family : kFamilies) supported += (supported.empty() ? "" : ", ") + std::string(family.model_type);
  throw Error(ErrorCode::kInvalidArgument,
              "unsupported architecture " + (model_type.empty() ? "(config.json has no model_type)" : model_type) +
                  ", supported: " + supported + ".");
}

/// A null says that there is no such thing (a soft cap, a window), so it is not filled in.
void fill(json& config, const Family& family) {
  const json filled = json::parse(family.defaults);
  for (const auto& [key, value] : filled.items()) config.emplace(key, value);
}

}  // namespace

float FamilyFields::number(const char* key, double absent) {
  const double value = positive_field(config_, key, absent);
  read_.insert(key);
  values_.emplace_back(key, number_text(value));
  return float(value);
}

int FamilyFields::count(const char* key) {
  const json* value = field(config_, key);
  const int n = value == nullptr || *value == 0 ? 0 : count_field(config_, key);
  read_.insert(key);
  values_.emplace_back(key, std::to_string(n));
  return n;
}

std::vector<int> FamilyFields::indices(const char* key) {
  const json* value = field(config_, key);
  const auto is_index = [](const json& one) { return one.is_number_integer() && one >= 0 && one < (1 << 16); };
  if (value != nullptr && (!value->is_array() || !std::ranges::all_of(*value, is_index))) {
    bad_field(key, "a list of layers");
  }
  read_.insert(key);
  values_.emplace_back(key, value == nullptr ? "[]" : value->dump());
  return value == nullptr ? std::vector<int>() : value->get<std::vector<int>>();
}

std::vector<std::string> FamilyFields::kinds(const char* key) {
  const json* value = field(config_, key);
  read_.insert(key);
  if (value == nullptr) return {};
  const auto is_kind = [](const json& one) { return one.is_string(); };
  if (!value->is_array() || !std::ranges::all_of(*value, is_kind)) bad_field(key, "a list of kinds of layers");
  values_.emplace_back(key, value->dump());
  return value->get<std::vector<std::string>>();
}

bool FamilyFields::flag(const char* key, bool absent) {
  const bool value = bool_field(config_, key, absent);
  read_.insert(key);
  values_.emplace_back(key, value ? "true" : "false");
  return value;
}

std::pair<float, float> FamilyFields::limits(const char* key, std::pair<float, float> absent) {
  read_.insert(key);
  const json* value = field(config_, key);
  values_.emplace_back(key, value == nullptr ? "absent" : value->dump());
  if (value == nullptr) return absent;
  const auto bound = [&](size_t i, float otherwise) {
    return (*value)[i].is_null() ? otherwise : (*value)[i].is_number() ? (*value)[i].get<float>() : -1.0f;
  };
  const bool two = value->is_array() && value->size() == 2;
  const float low = two ? bound(0, 0) : -1, high = two ? bound(1, std::numeric_limits<float>::infinity()) : -1;
  if (!(low >= 0 && low <= high)) bad_field(key, "two numbers from 0 on, the lower one first");
  return {low, high};
}

bool rotates_windows_in_mlx_lm(const std::string& architecture) {
  return std::ranges::any_of(kFamilies, [&](const Family& family) {
    return family.mlx_lm_rotates && architecture == family.architecture;
  });
}

TextModel text_model_of(const json& config) {
  const Family& family = find_family(string_field(config, "model_type", ""));
  TextModel model{.family = &family, .weight_prefix = family.weight_prefix, .config = config};
  if (const json* inner = field(config, "text_config"); inner != nullptr && *family.weight_prefix != 0) {
    if (!inner->is_object()) bad_field("text_config", "an object");
    model.config = *inner;
    // What belongs to the whole checkpoint stands outside.
    for (const char* key : {"vocab_size", "quantization", "quantization_config", "eos_token_id"}) {
      if (const json* outer = field(config, key); outer != nullptr) model.config[key] = *outer;
    }
    fill(model.config, family);
    model.family = &find_family(string_field(model.config, "model_type", ""));
  }
  fill(model.config, *model.family);
  return model;
}

}  // namespace torpor::model
