#include "model/family.h"

#include <algorithm>
#include <iterator>

#include "base/json.h"
#include "model/config_field.h"
#include "model/family_pages.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

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
    {"deepseek_v2", "deepseek_v2", "",
     R"({"scoring_func": "softmax", "topk_method": "greedy", "tie_word_embeddings": false})", deepseek},
    {"deepseek_v3", "deepseek_v3", "", R"({"norm_topk_prob": true, "tie_word_embeddings": false})", deepseek},
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
    {"glm4_moe", "glm4_moe", "", R"({"partial_rotary_factor": 0.5, "tie_word_embeddings": false})", glm4_moe},
    {"glm4_moe_lite", "glm4_moe_lite", "",
     R"({"vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
         "num_hidden_layers": 47, "num_attention_heads": 20, "n_shared_experts": 1, "n_routed_experts": 64,
         "routed_scaling_factor": 1.8, "kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64,
         "qk_nope_head_dim": 192, "v_head_dim": 256, "norm_topk_prob": true, "num_experts_per_tok": 4,
         "first_k_dense_replace": 1, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
         "tie_word_embeddings": false})",
     glm4_moe_lite},
    {"gpt_oss", "gpt_oss", "",
     R"({"num_hidden_layers": 36, "num_local_experts": 128, "num_experts_per_tok": 4, "vocab_size": 201088,
         "rms_norm_eps": 1e-5, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
         "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "sliding_window_pattern": 2,
         "rope_theta": 150000, "max_position_embeddings": 131072, "tie_word_embeddings": false})",
     gpt_oss, false, /*mlx_lm_rotates=*/true},
    {"granite", "granite", "", R"({"tie_word_embeddings": true})", granite},
    {"granitemoe", "granitemoe", "", R"({"tie_word_embeddings": true})", granitemoe},
    {"granitemoehybrid", "granitemoehybrid", "", R"({"tie_word_embeddings": true})", granitemoehybrid, false, false,
     /*hybrid=*/true},
    {"lfm2", "lfm2", "", R"({"rope_theta": 1e6, "tie_word_embeddings": true})", lfm2, false, false, /*hybrid=*/true},
    {"lfm2_moe", "lfm2_moe", "", R"({"rope_theta": 1e6, "tie_word_embeddings": true})", lfm2_moe, false, false,
     /*hybrid=*/true},
    {"llama", "llama", "", "{}", llama},
    {"minimax_m2", "minimax_m2", "", R"({"tie_word_embeddings": false})", minimax},
    {"ministral3", "ministral3", "", "{}", ministral3, false, /*mlx_lm_rotates=*/true},
    {"mistral", "llama", "", "{}", llama, /*slides_everywhere=*/true},
    {"mistral3", "llama", "language_model.", R"({"model_type": "mistral", "tie_word_embeddings": false})", llama},
    {"mistral4", "mistral4", "", R"({"scoring_func": "softmax", "tie_word_embeddings": false})", mistral4},
    {"mixtral", "mixtral", "",
     R"({"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": false})",
     mixtral, /*slides_everywhere=*/true},
    {"nemotron_h", "nemotron_h", "", R"({"tie_word_embeddings": false})", nemotron_h, false, false, /*hybrid=*/true},
    {"olmo3", "olmo3", "", R"({"sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": false})", olmo3,
     false, /*mlx_lm_rotates=*/true},
    {"olmoe", "olmoe", "", R"({"tie_word_embeddings": true})", olmoe},
    {"phi3", "phi3", "", R"({"max_position_embeddings": 131072, "tie_word_embeddings": false})", phi3,
     /*slides_everywhere=*/true},
    {"qwen2", "qwen2", "", R"({"rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": true})", qwen2},
    {"qwen3", "qwen3", "", "{}", qwen3},
    {"qwen3_5", "qwen3_5", "language_model.", R"({"model_type": "qwen3_5_text"})", qwen3_5, false, false,
     /*hybrid=*/true},
    {"qwen3_5_moe", "qwen3_5_moe", "language_model.", R"({"model_type": "qwen3_5_moe_text"})", qwen3_5, false, false,
     /*hybrid=*/true},
    {"qwen3_5_moe_text", "qwen3_5_moe", "", kQwen35Text, qwen3_5, false, false, /*hybrid=*/true},
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
  const json filled = parse_json<json>(family.defaults);
  for (const auto& [key, value] : filled.items()) config.emplace(key, value);
}

}  // namespace

void rotate_sliding_layers(ModelConfig& model, Rope rope) {
  const auto shared = std::make_shared<const Rope>(std::move(rope));
  model.rope_description += "; in sliding layers " + shared->description;
  for (LayerSpec& layer : model.layers) {
    if (layer.attention.window != 0) layer.attention.rope = shared;
  }
}

void rotate_all_layers(ModelConfig& model, Rope rope) {
  const auto shared = std::make_shared<const Rope>(std::move(rope));
  model.rope_description = shared->description;
  for (LayerSpec& layer : model.layers) layer.attention.rope = shared;
}

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

std::string FamilyFields::text(const char* key, const std::string& absent) {
  const std::string value = string_field(config_, key, absent);
  read_.insert(key);
  values_.emplace_back(key, value);
  return value;
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
