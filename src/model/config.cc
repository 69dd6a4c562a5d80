#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include <nlohmann/json.hpp>

#include "base/hash.h"
#include "base/model_file.h"
#include "model/config_field.h"
#include "model/family.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

json read_json(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Error(ErrorCode::kIo, "Can't read " + path.string() + ".");
  std::ostringstream text;
  text << in.rdbuf();
  refuse_lfs_pointer(text.view(), path);
  json value = json::parse(plain_json(text.view()), nullptr, false);
  if (value.is_object()) return value;
  throw Error(ErrorCode::kCorruption, path.string() + " is not a JSON object.");
}

/// An integer or a list of them.
std::vector<int32_t> token_ids(const json& object, const char* key) {
  const json* value = field(object, key);
  if (value == nullptr) return {};
  const json list = value->is_array() ? *value : json::array({*value});
  std::vector<int32_t> ids;
  for (const json& id : list) {
    if (!id.is_number_integer() || id < 0 || id > std::numeric_limits<int32_t>::max()) {
      bad_field(key, "a token id or a list of them");
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

Quantization parse_quantization(const json& spec) {
  if (const std::string mode = string_field(spec, "mode", "affine"); mode != "affine") {
    throw Error(ErrorCode::kInvalidArgument, "unsupported quantization mode " + mode + ", supported: affine.");
  }
  return {count_field(spec, "bits"), count_field(spec, "group_size")};
}

/// The global bits and group size, then per module an object, or false for one left as it was.
void parse_quantizations(const json& config, ModelConfig& out) {
  const json* quantization = field(config, "quantization");
  if (quantization == nullptr) {
    const json* foreign = field(config, "quantization_config");
    if (foreign == nullptr) return;
    const std::string method = string_field(*foreign, "quant_method", "");
    if (!method.empty() && method != "mlx") {
      throw Error(ErrorCode::kInvalidArgument, "unsupported quantization " + method +
                                                   ", supported: MLX affine (convert the model with mlx_lm.convert).");
    }
    quantization = foreign;
  }
  if (!quantization->is_object()) bad_field("quantization", "an object");
  out.quantized = true;
  parse_quantization(*quantization);
  for (const auto& [name, spec] : quantization->items()) {
    if (spec.is_object()) out.quantization.emplace(name, parse_quantization(spec));
    if (spec.is_boolean() && !spec.get<bool>()) out.quantization.emplace(name, std::nullopt);
  }
}

std::vector<int> parse_windows(const json& config, const ModelConfig& model) {
  const std::optional<int> window = optional_count(config, "sliding_window");
  const auto sliding_where = [&](const auto& slides) {
    std::vector<int> windows(size_t(model.n_layers), 0);
    for (int i = 0; i < model.n_layers; ++i) {
      if (slides(i)) windows[size_t(i)] = window ? *window : count_field(config, "sliding_window");
    }
    return windows;
  };
  if (const json* types = field(config, "layer_types"); types != nullptr) {
    if (!types->is_array() || types->size() != size_t(model.n_layers)) {
      bad_field("layer_types", "a list with one entry per layer");
    }
    return sliding_where([&](int i) {
      const json& type = (*types)[size_t(i)];
      if (type != "full_attention" && type != "sliding_attention") {
        bad_field("layer_types", "a list of full_attention and sliding_attention");
      }
      return type == "sliding_attention";
    });
  }
  // Gemma: the last of so many layers is a global one.
  if (const std::optional<int> pattern = optional_count(config, "sliding_window_pattern")) {
    return sliding_where([&](int i) { return (i + 1) % *pattern != 0; });
  }
  // Qwen: the upper layers, if any.
  if (bool_field(config, "use_sliding_window", false)) {
    const int full = optional_count(config, "max_window_layers").value_or(28);
    return sliding_where([&](int i) { return i >= full; });
  }
  const bool everywhere = window && (model.model_type == "mistral" || model.model_type == "phi3");
  return sliding_where([&](int) { return everywhere; });
}

Activation parse_activation(const json& config) {
  const std::string act = string_field(config, "hidden_activation", string_field(config, "hidden_act", "silu"));
  if (act == "silu") return Activation::kSilu;
  if (act == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  throw Error(ErrorCode::kInvalidArgument, "unsupported hidden_act " + act + ", supported: silu, gelu_pytorch_tanh.");
}

/// Fields that change the computation, and that no architecture here computes: refused, where they would be ignored.
void refuse_what_is_not_computed(const json& config, const std::string& architecture) {
  const auto refuse = [](const char* key) {
    throw Error(ErrorCode::kInvalidArgument, std::string("config.json: ") + key + " is not supported.");
  };
  for (const char* key :
       {"use_bidirectional_attention", "alibi", "attn_output_gate", "mlp_only_layers", "attention_sinks"}) {
    const json* value = field(config, key);
    if (value != nullptr && *value != false && *value != json::array()) refuse(key);
  }
  if (field(config, "is_causal") != nullptr && !bool_field(config, "is_causal", true)) refuse("is_causal");
  if (const bool norms = architecture == "qwen3" || architecture == "gemma3";
      !norms && bool_field(config, "use_qk_norm", false)) {
    refuse("use_qk_norm");
  }
  if (field(config, "clip_qkv") != nullptr) refuse("clip_qkv");
  for (const char* key : {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"}) {
    if (number_field(config, key, 0) > 1) refuse(key);
  }
  for (const char* key :
       {"embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "attention_multiplier"}) {
    if (number_field(config, key, 1) != 1) refuse(key);
  }
  if (const json* layers = field(config, "no_rope_layers"); layers != nullptr) {
    // A list with 1 where a layer rotates.
    if (!layers->is_array() ||
        std::any_of(layers->begin(), layers->end(), [](const json& rotates) { return rotates != 1; })) {
      refuse("no_rope_layers");
    }
  }
}

ModelConfig parse_config(const json& file) {
  ModelConfig model;
  model.model_type = string_field(file, "model_type", "");
  const Family& family = find_family(model.model_type);
  const json config = complete(file, family);
  model.architecture = family.architecture;
  refuse_what_is_not_computed(config, model.architecture);
  model.weight_prefix = family.weight_prefix;
  model.activation = parse_activation(config);
  model.hidden_size = count_field(config, "hidden_size");
  model.intermediate_size = count_field(config, "intermediate_size");
  model.n_layers = count_field(config, "num_hidden_layers");
  model.n_heads = count_field(config, "num_attention_heads");
  model.n_kv_heads = optional_count(config, "num_key_value_heads").value_or(model.n_heads);
  model.head_dim = optional_count(config, "head_dim").value_or(model.hidden_size / model.n_heads);
  model.vocab_size = count_field(config, "vocab_size");
  const int trained = optional_count(config, "max_position_embeddings").value_or(2048);
  model.rms_norm_eps = float(positive_field(config, "rms_norm_eps", 1e-6));
  // Far beyond any model, and small enough that no product of two of them overflows.
  constexpr int kLimit = 1 << 24;
  for (const auto& [key, value] : {std::pair{"hidden_size", model.hidden_size},
                                   {"intermediate_size", model.intermediate_size},
                                   {"vocab_size", model.vocab_size},
                                   {"num_attention_heads", model.n_heads}}) {
    if (value > kLimit) bad_field(key, "at most 2^24");
  }
  if (model.n_layers > 4096) bad_field("num_hidden_layers", "at most 4096");
  if (model.head_dim > 4096 || model.head_dim % 2 != 0) bad_field("head_dim", "an even number up to 4096");
  if (model.n_heads % model.n_kv_heads != 0) bad_field("num_attention_heads", "a multiple of num_key_value_heads");

  if (field(config, "tie_word_embeddings") != nullptr)
    model.tied_head = bool_field(config, "tie_word_embeddings", false);
  model.attention_bias = bool_field(config, "attention_bias", false);
  model.mlp_bias = bool_field(config, "mlp_bias", false);
  model.key_bias = model.architecture == "qwen2" || (model.architecture == "llama" && model.attention_bias);
  model.windows = parse_windows(config, model);
  model.rope = parse_rope(config, model.head_dim);
  // As vLLM has it: a linear factor comes on top of what the model was trained for. Gemma 3's number has it in already.
  const double context = model.architecture == "gemma3" ? trained : trained * model.rope.context_factor;
  model.max_context = int(std::min(context, double(std::numeric_limits<int>::max())));
  if (model.architecture == "gemma3") model.local_rope = parse_local_rope(config, model.head_dim);
  model.attention_scale = float(1 / std::sqrt(positive_field(config, "query_pre_attn_scalar", model.head_dim)));
  const auto cap = [&](const char* key) {
    return field(config, key) == nullptr ? 0 : float(positive_field(config, key));
  };
  model.attention_softcap = cap("attn_logit_softcapping");
  model.logit_softcap = cap("final_logit_softcapping");
  parse_quantizations(config, model);
  model.eos_token_ids = token_ids(config, "eos_token_id");
  return model;
}

}  // namespace

std::string ModelConfig::digest() const {
  Hasher hasher;
  const auto add = [&](const char* name, const std::string& value) { hasher.update_field(name).update_field(value); };
  add("hidden_size", std::to_string(hidden_size));
  add("intermediate_size", std::to_string(intermediate_size));
  add("num_hidden_layers", std::to_string(n_layers));
  add("num_attention_heads", std::to_string(n_heads));
  add("num_key_value_heads", std::to_string(n_kv_heads));
  add("head_dim", std::to_string(head_dim));
  add("vocab_size", std::to_string(vocab_size));
  add("rms_norm_eps", number_text(rms_norm_eps));
  add("tie_word_embeddings", tied_head.value_or(false) ? "true" : "false");
  add("attention_bias", attention_bias ? "true" : "false");
  add("mlp_bias", mlp_bias ? "true" : "false");
  for (int window : windows) add("window", std::to_string(window));
  // Only where they differ from what they were before there were others.
  if (activation != Activation::kSilu) add("hidden_act", "gelu_pytorch_tanh");
  if (attention_scale != float(1 / std::sqrt(double(head_dim)))) add("attention_scale", number_text(attention_scale));
  if (attention_softcap != 0) add("attn_logit_softcapping", number_text(attention_softcap));
  if (logit_softcap != 0) add("final_logit_softcapping", number_text(logit_softcap));
  return hasher.hex();
}

std::string ModelConfig::rope_description() const {
  return rope.description + (local_rope ? "; in sliding layers " + local_rope->description : "");
}

ModelConfig read_config(const std::filesystem::path& dir) {
  if (!std::filesystem::exists(dir / "config.json")) {
    throw Error(ErrorCode::kNotFound, dir.string() + " is not a model directory: it has no config.json.");
  }
  try {
    ModelConfig config = parse_config(read_json(dir / "config.json"));
    // Each of them may name another token, and a model that never stops says the user's next turn too: generation stops at all.
    const auto stop_at = [&](int32_t id) {
      if (std::ranges::find(config.eos_token_ids, id) == config.eos_token_ids.end()) config.eos_token_ids.push_back(id);
    };
    if (const auto path = dir / "generation_config.json"; std::filesystem::exists(path)) {
      for (const int32_t id : token_ids(read_json(path), "eos_token_id")) stop_at(id);
    }
    if (const auto id = tokenizer_eos(dir)) stop_at(*id);
    return config;
  } catch (const json::exception& e) {
    throw Error(ErrorCode::kCorruption, (dir / "config.json").string() + ": " + e.what());
  } catch (const Error& e) {
    if (e.code() != ErrorCode::kInvalidArgument) throw;
    throw Error(e.code(), dir.string() + ": " + e.what());
  }
}

}  // namespace torpor::model
