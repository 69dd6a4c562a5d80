/// Pages of families whose layers are attention and one MLP; Gemma 4's largest has experts beside it.

#include <algorithm>
#include <cmath>

#include <mlx/types/half_types.h>

#include "model/config_field.h"
#include "model/family_pages.h"

namespace torpor::model {

using nlohmann::json;

namespace {

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

/// Norms before and after each part, of weights less one; a scaled embedding.
void gemma(ModelConfig& model, float embedding_scale) {
  model.norm_plus = 1;
  model.embedding_scale = embedding_scale;
  model.names = {.attention_norm = "input_layernorm", .attention_post_norm = "post_attention_layernorm",
                 .mlp_norm = "pre_feedforward_layernorm", .mlp_post_norm = "post_feedforward_layernorm"};
}

}  // namespace

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

/// q, k and v are one projection in the checkpoint, as are gate and up.
void phi3(ModelConfig& model, FamilyFields&) { model.names.fused = true; }

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
  // Of images alone.
  if (bidirectional != nullptr && *bidirectional == "vision") fields.accept("use_bidirectional_attention");
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
  gemma4_experts(model, fields);
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

}  // namespace torpor::model
