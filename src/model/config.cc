#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "base/gguf.h"
#include "base/gguf_ends.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/model_file.h"
#include "model/config_field.h"
#include "model/family.h"
#include "model/gguf_config.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

json read_json(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Error(ErrorCode::kIo, "Can't read " + path.string() + ".");
  std::ostringstream text;
  text << in.rdbuf();
  refuse_lfs_pointer(text.str(), path);
  json value = parse_json<json>(plain_json(text.str()), nullptr, false);
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

constexpr std::pair<const char*, Quantization> kModes[] = {{"affine", {Quantization::Mode::kAffine, 4, 64}},
                                                           {"mxfp4", {Quantization::Mode::kMxfp4, 4, 32}},
                                                           {"mxfp8", {Quantization::Mode::kMxfp8, 8, 32}},
                                                           {"nvfp4", {Quantization::Mode::kNvfp4, 4, 16}}};

/// What is not said is as MLX has it. `of` says whose it is, in an error.
Quantization parse_quantization(const json& spec, const std::string& of) {
  const std::string mode = string_field(spec, "mode", "affine");
  for (const auto& [name, usual] : kModes) {
    if (mode != name) continue;
    return {usual.mode, optional_count(spec, "bits").value_or(usual.bits),
            optional_count(spec, "group_size").value_or(usual.group)};
  }
  throw Error(ErrorCode::kInvalidArgument,
              "unsupported quantization mode " + mode + of + ", supported: affine, mxfp4, mxfp8, nvfp4.");
}

/// The global bits and group size, then per module an object, or false for one left as it was.
void parse_quantizations(const json& config, ModelConfig& out) {
  const json* quantization = field(config, "quantization");
  if (quantization == nullptr) {
    const json* foreign = field(config, "quantization_config");
    if (foreign == nullptr) return;
    const std::string method = string_field(*foreign, "quant_method", "");
    // OpenAI's own: the experts are mxfp4, and found by other names.
    if (method == "mxfp4" && out.architecture == "gpt_oss") return;
    if (!method.empty() && method != "mlx") {
      throw Error(ErrorCode::kInvalidArgument, "unsupported quantization " + method +
                                                   ", supported: MLX's own (convert the model with mlx_lm.convert).");
    }
    quantization = foreign;
  }
  if (!quantization->is_object()) bad_field("quantization", "an object");
  out.quantized = true;
  parse_quantization(*quantization, "");
  for (const auto& [name, spec] : quantization->items()) {
    if (spec.is_object()) out.quantization.emplace(name, parse_quantization(spec, " of " + name));
    if (spec.is_boolean() && !spec.get<bool>()) out.quantization.emplace(name, std::nullopt);
  }
}

/// Per layer; 0 = all tokens are attended.
std::vector<int> parse_windows(const json& config, size_t n_layers, bool everywhere) {
  const std::optional<int> window = optional_count(config, "sliding_window");
  const auto sliding_where = [&](const auto& slides) {
    std::vector<int> windows(n_layers, 0);
    for (size_t i = 0; i < n_layers; ++i) {
      if (slides(int(i))) windows[i] = window ? *window : count_field(config, "sliding_window");
    }
    return windows;
  };
  if (const json* types = field(config, "layer_types"); types != nullptr) {
    if (!types->is_array() || types->size() != n_layers) bad_field("layer_types", "a list with one entry per layer");
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
  return sliding_where([&](int) { return window && everywhere; });
}

Activation parse_activation(const json& config) {
  const std::string act = string_field(config, "hidden_activation", string_field(config, "hidden_act", "silu"));
  if (act == "silu") return Activation::kSilu;
  if (act == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  throw Error(ErrorCode::kInvalidArgument, "unsupported hidden_act " + act + ", supported: silu, gelu_pytorch_tanh.");
}

/// Fields that change the computation, and what they may say where the family's page has not read them: what is
/// computed anyway.
void refuse_what_is_not_computed(const FamilyFields& fields) {
  const auto is_off = [](const json& value) { return value == false || value == json::array(); };
  const auto is_on = [](const json& value) { return value == true; };
  const auto is_one = [](const json& value) { return value == 1; };
  const auto is_never = [](const json&) { return false; };
  const auto at_most_one = [](const json& value) { return value.is_number() && value <= 1; };
  // A list with 1 where a layer rotates.
  const auto all_one = [](const json& value) {
    return value.is_array() && std::ranges::all_of(value, [](const json& entry) { return entry == 1; });
  };
  using Neutral = bool (*)(const json&);
  for (const auto& [key, neutral] :
       {std::pair<const char*, Neutral>{"use_bidirectional_attention", is_off}, {"alibi", is_off}, {"attn_output_gate", is_off},
        {"mlp_only_layers", is_off}, {"attention_sinks", is_off}, {"use_qk_norm", is_off}, {"attention_out_bias", is_off},
        {"enable_moe_block", is_off}, {"attention_k_eq_v", is_off},
        {"layer_norm_bias", is_off}, {"is_causal", is_on},
        {"clip_qkv", is_never}, {"num_local_experts", at_most_one}, {"num_experts", at_most_one},
        {"n_routed_experts", at_most_one}, {"moe_num_experts", at_most_one}, {"embedding_multiplier", is_one},
        {"residual_multiplier", is_one}, {"logits_scaling", is_one}, {"logit_scale", is_one},
        {"attention_multiplier", is_one}, {"no_rope_layers", all_one}}) {
    const json* value = field(fields.config(), key);
    if (value == nullptr || fields.was_read(key) || neutral(*value)) continue;
    throw Error(ErrorCode::kInvalidArgument, std::string("config.json: ") + key + " is not supported.");
  }
}

ModelConfig parse_config(const json& file) {
  const TextModel text = text_model_of(file);
  const json& config = text.config;
  ModelConfig model;
  model.architecture = text.family->architecture;
  model.weight_prefix = text.weight_prefix;
  model.hidden_size = count_field(config, "hidden_size");
  const int n_layers = count_field(config, "num_hidden_layers");
  LayerSpec layer;
  layer.mlp.activation = parse_activation(config);
  const bool hybrid = text.family->hybrid;
  layer.mlp.size = optional_count(config, "intermediate_size").value_or(0);
  if (layer.mlp.size == 0 && !hybrid) count_field(config, "intermediate_size");  // says that there is none
  Attention& attention = layer.attention;
  attention.n_heads = count_field(config, "num_attention_heads");
  attention.n_kv_heads = optional_count(config, "num_key_value_heads").value_or(attention.n_heads);
  const int head_dim = optional_count(config, "head_dim").value_or(model.hidden_size / attention.n_heads);
  attention.key_dim = attention.value_dim = head_dim;
  model.vocab_size = count_field(config, "vocab_size");
  const int trained = optional_count(config, "max_position_embeddings").value_or(2048);
  model.norm_eps = float(positive_field(config, "rms_norm_eps", 1e-6));
  // Far beyond any model.
  constexpr int kLimit = 1 << 24;
  for (const auto& [key, value] : {std::pair{"hidden_size", model.hidden_size},
                                   {"intermediate_size", layer.mlp.size},
                                   {"vocab_size", model.vocab_size},
                                   {"num_attention_heads", attention.n_heads}}) {
    if (value > kLimit) bad_field(key, "at most 2^24");
  }
  if (n_layers > 4096) bad_field("num_hidden_layers", "at most 4096");
  if (head_dim > 4096 || head_dim % 2 != 0) bad_field("head_dim", "an even number up to 4096");
  if (attention.n_heads % attention.n_kv_heads != 0) {
    bad_field("num_attention_heads", "a multiple of num_key_value_heads");
  }

  if (field(config, "tie_word_embeddings") != nullptr)
    model.tied_head = bool_field(config, "tie_word_embeddings", false);
  model.attention_bias = bool_field(config, "attention_bias", false);
  model.mlp_bias = bool_field(config, "mlp_bias", false);
  const auto rope = std::make_shared<const Rope>(parse_rope(config, head_dim));
  attention.rope = rope;
  model.rope_description = rope->description;
  // As vLLM has it: a linear factor comes on top of what the model was trained for.
  model.max_context = int(std::min(trained * rope->context_factor, double(std::numeric_limits<int>::max())));
  attention.scale = float(1 / std::sqrt(positive_field(config, "query_pre_attn_scalar", head_dim)));
  const auto cap = [&](const char* key) {
    return field(config, key) == nullptr ? 0 : float(positive_field(config, key));
  };
  attention.softcap = cap("attn_logit_softcapping");
  model.logit_softcap = cap("final_logit_softcapping");
  const std::vector<int> none(size_t(n_layers), 0);
  for (const int window : hybrid ? none : parse_windows(config, size_t(n_layers), text.family->slides_everywhere)) {
    attention.window = window;
    model.layers.push_back(layer);
  }
  FamilyFields fields(config);
  text.family->page(model, fields);
  for (const LayerSpec& of : model.layers) {
    const int64_t width = int64_t(of.attention.n_heads) * std::max(of.attention.key_dim, of.attention.value_dim);
    if (width > kLimit) bad_field("num_attention_heads", "such that all heads together have at most 2^24 dims");
    if (of.feeds && !of.experts && of.mlp.size == 0) count_field(config, "intermediate_size");
  }
  model.family_fields = fields.values();
  refuse_what_is_not_computed(fields);
  parse_quantizations(config, model);
  model.eos_token_ids = token_ids(config, "eos_token_id");
  return model;
}

}  // namespace

bool ModelConfig::key_bias() const {
  return std::ranges::any_of(layers, [](const LayerSpec& layer) { return layer.attention.key_bias(); });
}

const char* mode_name(Quantization::Mode mode) {
  return std::ranges::find_if(kModes, [&](const auto& named) { return named.second.mode == mode; })->first;
}

std::string ModelConfig::digest() const {
  Hasher hasher;
  const auto add = [&](const char* name, const std::string& value) {
    hasher.update_field(name).update_field(value);
  };
  const Attention& attention = layers.front().attention;
  const Mlp& mlp = layers.front().mlp;
  add("hidden_size", std::to_string(hidden_size));
  add("intermediate_size", std::to_string(mlp.size));
  add("num_hidden_layers", std::to_string(layers.size()));
  add("num_attention_heads", std::to_string(attention.n_heads));
  add("num_key_value_heads", std::to_string(attention.n_kv_heads));
  add("head_dim", std::to_string(attention.key_dim));
  add("vocab_size", std::to_string(vocab_size));
  add("rms_norm_eps", number_text(norm_eps));
  add("tie_word_embeddings", tied_head.value_or(false) ? "true" : "false");
  add("attention_bias", attention_bias ? "true" : "false");
  add("mlp_bias", mlp_bias ? "true" : "false");
  for (const LayerSpec& layer : layers) add("window", std::to_string(layer.attention.window));
  // Only where they differ from what they were before there were others.
  if (mlp.activation != Activation::kSilu) add("hidden_act", "gelu_pytorch_tanh");
  if (attention.scale != float(1 / std::sqrt(double(attention.key_dim)))) {
    add("attention_scale", number_text(attention.scale));
  }
  if (attention.softcap != 0) add("attn_logit_softcapping", number_text(attention.softcap));
  if (logit_softcap != 0) add("final_logit_softcapping", number_text(logit_softcap));
  for (const auto& [name, value] : family_fields) add(name.c_str(), value);
  return hasher.hex();
}

namespace {

ModelConfig read_gguf_config(const std::filesystem::path& path) {
  const GgufModel model = GgufModel::open(path);
  const json file = gguf_config(model);
  try {
    ModelConfig config = parse_config(file);
    adopt_gguf(model.metadata(), config);
    const GgufEnds ends = gguf_ends(model.metadata());
    config.eos_token_ids.assign(ends.ids.begin(), ends.ids.end());
    return config;
  } catch (const json::exception& e) {
    throw Error(ErrorCode::kCorruption, path.string() + ": " + e.what());
  } catch (const Error& e) {
    throw Error(e.code(), path.string() + ", read as a " + e.what());
  }
}

}  // namespace

ModelConfig read_config(const std::filesystem::path& dir) {
  if (is_gguf(dir)) return read_gguf_config(dir);
  if (!std::filesystem::exists(dir / "config.json")) {
    std::string gguf;
    std::error_code ignored;
    for (const auto& file : std::filesystem::directory_iterator(dir, ignored)) {
      if (is_gguf(file.path())) gguf = "; name a GGUF file in it, such as " + file.path().filename().string();
    }
    throw Error(ErrorCode::kNotFound, dir.string() + " is not a model directory: it has no config.json" + gguf + ".");
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
