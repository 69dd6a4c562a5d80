#include "model/family.h"

#include <algorithm>
#include <iterator>

#include <nlohmann/json.hpp>

#include "model/config_field.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

constexpr Family kFamilies[] = {
    {"gemma2", "gemma2", "",
     R"({"head_dim": 256, "query_pre_attn_scalar": 144, "attn_logit_softcapping": 50, "final_logit_softcapping": 30,
         "sliding_window": 4096, "sliding_window_pattern": 2, "max_position_embeddings": 8192, "tie_word_embeddings": true,
         "hidden_act": "gelu_pytorch_tanh"})"},
    // The rest is that of its text model, gemma3_text.
    {"gemma3", "gemma3", "language_model.",
     R"({"model_type": "gemma3_text", "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208})"},
    {"gemma3_text", "gemma3", "",
     R"({"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912, "num_attention_heads": 4, "head_dim": 256,
         "num_key_value_heads": 1, "vocab_size": 262144, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
         "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
         "hidden_act": "gelu_pytorch_tanh"})"},
    {"llama", "llama", "", "{}"},
    {"mistral", "llama", "", "{}"},
    {"phi3", "phi3", "", R"({"max_position_embeddings": 131072, "tie_word_embeddings": false})"},
    {"qwen2", "qwen2", "", R"({"rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": true})"},
    {"qwen3", "qwen3", "", "{}"},
};

}  // namespace

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

json complete(const json& config, const Family& family) {
  // A null says that there is no such thing (a soft cap, a window), so it is not filled in.
  const auto fill = [](json& to, const char* defaults) {
    const json filled = json::parse(defaults);
    for (const auto& [key, value] : filled.items()) to.emplace(key, value);
  };
  json text = config;
  if (const json* inner = field(config, "text_config"); inner != nullptr && *family.weight_prefix != 0) {
    if (!inner->is_object()) bad_field("text_config", "an object");
    text = *inner;
    // What belongs to the whole checkpoint stands outside.
    for (const char* key : {"vocab_size", "quantization", "quantization_config", "eos_token_id"}) {
      if (const json* outer = field(config, key); outer != nullptr) text[key] = *outer;
    }
    fill(text, family.defaults);
    return complete(text, find_family(string_field(text, "model_type", "")));
  }
  fill(text, family.defaults);
  return text;
}

}  // namespace torpor::model
