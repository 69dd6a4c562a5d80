#include "model/family.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include <mlx/types/half_types.h>

#include "model/config_field.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

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
  const auto local = std::make_shared<const Rope>(parse_local_rope(fields.config(), model.layers.front().attention.key_dim));
  model.rope_description += "; in sliding layers " + local->description;
  for (LayerSpec& layer : model.layers) {
    layer.attention.qk_norm = QkNorm::kHeads;
    if (layer.attention.window != 0) layer.attention.rope = local;
  }
  // It has the factor of its linear RoPE in it already.
  if (const auto context = optional_count(fields.config(), "max_position_embeddings")) model.max_context = *context;
}

// ---- the table

constexpr Family kFamilies[] = {
    {"gemma2", "gemma2", "",
     R"({"head_dim": 256, "query_pre_attn_scalar": 144, "attn_logit_softcapping": 50, "final_logit_softcapping": 30,
         "sliding_window": 4096, "sliding_window_pattern": 2, "max_position_embeddings": 8192, "tie_word_embeddings": true,
         "hidden_act": "gelu_pytorch_tanh"})",
     gemma2},
    {"gemma3", "gemma3", "language_model.",
     R"({"model_type": "gemma3_text", "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208})", gemma3},
    {"gemma3_text", "gemma3", "",
     R"({"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912, "num_attention_heads": 4, "head_dim": 256,
         "num_key_value_heads": 1, "vocab_size": 262144, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
         "hidden_act": "gelu_pytorch_tanh"})",
     gemma3},
    {"llama", "llama", "", "{}", llama},
    {"mistral", "llama", "", "{}", llama, /*slides_everywhere=*/true},
    {"phi3", "phi3", "", R"({"max_position_embeddings": 131072, "tie_word_embeddings": false})", phi3,
     /*slides_everywhere=*/true},
    {"qwen2", "qwen2", "", R"({"rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": true})", qwen2},
    {"qwen3", "qwen3", "", "{}", qwen3},
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
