#include "model/gguf_config.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

/// The metadata of an architecture, by what follows its name in their keys.
class Fields {
 public:
  explicit Fields(const GgufModel& model) : model_(model), file_(model.metadata()) {
    for (const char c : file_.text("general.architecture").value_or("").substr(0, 64)) {
      architecture_ += c > ' ' && c < 127 ? c : '?';  // it is part of sentences
    }
  }
  const std::string& architecture() const { return architecture_; }
  const GgufModel& model() const { return model_; }

  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(ErrorCode::kInvalidArgument, "'" + file_.file_name() + "' " + what);
  }
  std::string key(const char* name) const { return architecture_ + "." + name; }
  std::optional<double> number(const char* name) const { return file_.number(key(name)); }
  std::optional<int64_t> integer(const char* name) const { return file_.integer(key(name)); }
  std::optional<std::string_view> text(const char* name) const { return file_.text(key(name)); }
  std::vector<double> numbers(const char* name) const { return file_.numbers(key(name)); }
  /// A number that all layers have, or a list with one for each.
  std::optional<int64_t> count(const char* name) const {
    const std::vector<double> all = numbers(name);
    if (all.empty()) return std::nullopt;
    if (std::ranges::any_of(all, [&](double one) { return one != all.front(); })) {
      refuse("has layers that differ in " + key(name) + ", which is not supported for its architecture.");
    }
    return whole(name, all.front());
  }
  /// Those of the layers that attend: the others of a hybrid have none.
  std::optional<int64_t> kv_heads() const {
    std::vector<double> all = numbers("attention.head_count_kv");
    if (all.size() > 1) std::erase(all, 0);
    if (std::ranges::any_of(all, [&](double one) { return one != all.front(); })) {
      refuse("has layers that differ in " + key("attention.head_count_kv") +
             ", which is not supported for its architecture.");
    }
    if (all.empty()) return std::nullopt;
    return whole("attention.head_count_kv", all.front());
  }
  int64_t need(const char* name) const {
    const std::optional<int64_t> value = count(name);
    if (!value) refuse("lacks " + key(name) + "; fetch a newer file of the model.");
    return *value;
  }
  int64_t whole(const char* name, double value) const {
    if (!(value >= 0 && value <= 0x1p31) || value != std::floor(value)) refuse("has no count in " + key(name) + ".");
    return int64_t(value);
  }
  bool has_tensor(const std::string& name) const { return model_.find(name) != nullptr; }
  /// A list of numbers that are a tensor of f32; empty when there is none.
  std::vector<float> floats(const char* name) const {
    const GgufTensor* tensor = model_.find(name);
    if (tensor == nullptr) return {};
    if (tensor->type->type != GgmlType::kF32) refuse(std::string("has ") + name + ", which is not F32.");
    std::vector<float> values(tensor->data.size() / sizeof(float));
    std::memcpy(values.data(), tensor->data.data(), tensor->data.size());
    return values;
  }

 private:
  const GgufModel& model_;
  const GgufFile& file_;
  std::string architecture_;
};

/// What all architectures have.
json common(const Fields& fields) {
  json config;
  const int64_t heads = fields.need("attention.head_count"), hidden = fields.need("embedding_length");
  config["hidden_size"] = hidden;
  const int64_t layers = fields.need("block_count");
  if (layers > 4096) fields.refuse("has " + std::to_string(layers) + " layers, of which at most 4096 are supported.");
  config["num_hidden_layers"] = layers;
  config["num_attention_heads"] = heads;
  if (const auto length = fields.integer("context_length")) config["max_position_embeddings"] = *length;
  if (const auto eps = fields.number("attention.layer_norm_rms_epsilon")) config["rms_norm_eps"] = float(*eps);
  if (const auto base = fields.number("rope.freq_base")) config["rope_theta"] = *base;
  const GgufTensor* embedding = fields.model().find("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2) fields.refuse("has no tensor token_embd.weight.");
  config["vocab_size"] = embedding->shape.front();
  config["tie_word_embeddings"] = !fields.has_tensor("output.weight");
  config["hidden_act"] = "silu";
  return config;
}

/// The fields of layers that are all alike. Rows that lie as `neighbours` rotate are of heads that rotate whole.
void alike(const Fields& fields, json& config, bool neighbours) {
  const auto size = fields.count("feed_forward_length");  // which a model has not whose layers all have experts
  config["intermediate_size"] = size ? *size : fields.need("expert_feed_forward_length");
  if (const auto heads = fields.kv_heads()) config["num_key_value_heads"] = *heads;
  const int64_t n_heads = config["num_attention_heads"], hidden = config["hidden_size"];
  const int64_t dim = fields.integer("attention.key_length").value_or(hidden / std::max<int64_t>(n_heads, 1));
  if (fields.integer("attention.value_length").value_or(dim) != dim) {
    fields.refuse("has keys and values of different sizes, which is not supported for its architecture.");
  }
  config["head_dim"] = dim;
  const int64_t rotated = fields.integer("rope.dimension_count").value_or(dim);
  if (rotated == dim || dim <= 0) return;
  if (neighbours) {
    fields.refuse("rotates " + std::to_string(rotated) + " of the " + std::to_string(dim) +
                  " dims of a head, which is not supported for its architecture.");
  }
  config["partial_rotary_factor"] = double(rotated) / double(dim);
}

/// What all frequencies are divided by: whatever names it counts, unless the type says that none does.
double rope_factor(const Fields& fields) {
  const auto old = fields.number("rope.scale_linear");
  const double factor = fields.number("rope.scaling.factor").value_or(old.value_or(0));
  return factor == 0 || fields.text("rope.scaling.type") == "none" ? 1 : factor;
}

void rope_scaling(const Fields& fields, json& config) {
  const double factor = rope_factor(fields), magnitude = fields.number("rope.scaling.attn_factor").value_or(1);
  // Frequencies divided by a factor each: of Llama 3's, and the long ones of Phi's.
  for (const char* name : {"rope_freqs.weight", "rope_factors_long.weight"}) {
    const std::vector<float> factors = fields.floats(name);
    if (factors.empty()) continue;
    if (factor != 1) {
      fields.refuse(std::string("has both ") + name + " and a factor of all frequencies, which is not supported.");
    }
    config["rope_scaling"] = {{"type", "longrope"}, {"long_factor", factors}, {"attention_factor", magnitude},
                              {"original_max_position_embeddings",
                               fields.integer("rope.scaling.original_context_length").value_or(4096)}};
    return;
  }
  if (magnitude != 1) {
    fields.refuse("has a " + fields.key("rope.scaling.attn_factor") + " without factors of frequencies, which is not "
                  "supported.");
  }
  if (fields.number("rope.scaling.yarn_log_multiplier").value_or(0) != 0) {
    fields.refuse("has a " + fields.key("rope.scaling.yarn_log_multiplier") + ", which is not supported.");
  }
  const std::string_view type = fields.text("rope.scaling.type").value_or("linear");
  if (type == "none" || (type == "linear" && factor == 1)) return;
  if (type != "linear" && type != "yarn") {
    fields.refuse("has an unsupported " + fields.key("rope.scaling.type") + ", supported: none, linear, yarn.");
  }
  json scaling = {{"type", type}, {"factor", factor}};
  if (const auto original = fields.integer("rope.scaling.original_context_length")) {
    scaling["original_max_position_embeddings"] = *original;
  }
  for (const auto& [key, name] : {std::pair{"rope.scaling.yarn_beta_fast", "beta_fast"},
                                  std::pair{"rope.scaling.yarn_beta_slow", "beta_slow"}}) {
    if (const auto value = fields.number(key)) scaling[name] = *value;
  }
  config["rope_scaling"] = scaling;
}

/// Which layers have a window, where the metadata say so: all but each n-th, or a list.
void window_pattern(const Fields& fields, json& config) {
  const std::vector<double> slides = fields.numbers("attention.sliding_window_pattern");
  if (slides.empty()) return;
  if (slides.size() == 1) {
    config["sliding_window_pattern"] = fields.whole("attention.sliding_window_pattern", slides.front());
    return;
  }
  config.erase("sliding_window_pattern");
  config["layer_types"] = json::array();
  for (const double one : slides) config["layer_types"].push_back(one != 0 ? "sliding_attention" : "full_attention");
}

// ---- architectures: what their config.json has beyond that

void llama(const Fields& fields, json& config) {
  const bool bias = fields.has_tensor("blk.0.attn_q.bias"), output_bias = fields.has_tensor("blk.0.attn_output.bias");
  config["attention_bias"] = bias;
  config["mlp_bias"] = fields.has_tensor("blk.0.ffn_gate.bias");
  if (const auto window = fields.integer("attention.sliding_window"); window && *window > 0) {
    config["model_type"] = "mistral";
    config["sliding_window"] = *window;
  }
  if (const int64_t experts = fields.integer("expert_count").value_or(0); experts > 0) {
    config["model_type"] = "mixtral";
    config["num_local_experts"] = experts;
    config["num_experts_per_tok"] = fields.need("expert_used_count");
    if (bias || output_bias) fields.refuse("has experts and biases of attention, which is not supported.");
  }
  if (bias == output_bias) return;
  if (config["model_type"] != "llama") {
    fields.refuse("has a window, and biases in a part of attention, which is not supported.");
  }
  config["model_type"] = "seed_oss";  // Llama's layer, with biases of their own
  config["attention_out_bias"] = output_bias;
}

void plain(const Fields&, json&) {}

/// Layers without a router have an MLP.
void find_dense_layers(const Fields& fields, json& config) {
  config["mlp_only_layers"] = json::array();
  const int64_t layers = config["num_hidden_layers"];
  for (int64_t i = 0; i < layers; ++i) {
    const bool dense = !fields.has_tensor("blk." + std::to_string(i) + ".ffn_gate_inp.weight");
    if (dense) config["mlp_only_layers"].push_back(i);
  }
}

void qwen3moe(const Fields& fields, json& config) {
  config["num_experts"] = fields.need("expert_count");
  config["num_experts_per_tok"] = fields.need("expert_used_count");
  config["moe_intermediate_size"] = fields.need("expert_feed_forward_length");
  config["norm_topk_prob"] = true;  // llama.cpp has it so for all
  config["decoder_sparse_step"] = 1;
  find_dense_layers(fields, config);
}

/// Of the largest model scores are scaled by another size than a head's, which no metadata say.
void scale_of_gemma(json& config, int64_t layers_of_largest) {
  const bool largest = config["num_hidden_layers"] == layers_of_largest;
  const int64_t hidden = config["hidden_size"], heads = config["num_attention_heads"];
  config["query_pre_attn_scalar"] = largest && heads > 0 ? json(hidden / heads) : config["head_dim"];
}

void gemma2(const Fields& fields, json& config) {
  config["hidden_act"] = "gelu_pytorch_tanh";
  config["attn_logit_softcapping"] = fields.number("attn_logit_softcapping").value_or(50);
  config["final_logit_softcapping"] = fields.number("final_logit_softcapping").value_or(30);
  config["sliding_window"] = fields.need("attention.sliding_window");
  window_pattern(fields, config);
  scale_of_gemma(config, 46);
}

void gemma3(const Fields& fields, json& config) {
  config["hidden_act"] = "gelu_pytorch_tanh";
  config["sliding_window"] = fields.need("attention.sliding_window");
  config["sliding_window_pattern"] = 6;  // llama.cpp too takes it for granted
  window_pattern(fields, config);
  config["rope_local_base_freq"] = fields.number("rope.freq_base_swa").value_or(10000);
  if (const auto cap = fields.number("final_logit_softcapping")) config["final_logit_softcapping"] = *cap;
  scale_of_gemma(config, 62);
}

void phi3(const Fields& fields, json& config) {
  if (const auto window = fields.integer("attention.sliding_window"); window && *window > 0) {
    config["sliding_window"] = *window;
  }
}

void gpt_oss(const Fields& fields, json& config) {
  config["intermediate_size"] = fields.need("expert_feed_forward_length");
  config["num_local_experts"] = fields.need("expert_count");
  config["num_experts_per_tok"] = fields.need("expert_used_count");
  config["sliding_window"] = fields.need("attention.sliding_window");
  window_pattern(fields, config);
  if (config.contains("rope_scaling")) config["rope_scaling"]["truncate"] = false;  // which no metadata say
}

/// Layers with a window and without differ in nearly all.
void gemma4(const Fields& fields, json& config) {
  const std::vector<double> slides = fields.numbers("attention.sliding_window_pattern");
  const std::vector<double> kv_heads = fields.numbers("attention.head_count_kv");
  const std::vector<double> sizes = fields.numbers("feed_forward_length");
  const size_t n = slides.size();
  if (config["num_hidden_layers"] != n || n == 0 || kv_heads.empty() || sizes.empty() ||
      (kv_heads.size() != 1 && kv_heads.size() != n) || (sizes.size() != 1 && sizes.size() != n)) {
    fields.refuse("has lists of layers that differ in length.");
  }
  config["layer_types"] = json::array();
  bool values = true;  // a layer without a window has projections of its own for them
  for (size_t i = 0; i < n; ++i) {
    config["layer_types"].push_back(slides[i] != 0 ? "sliding_attention" : "full_attention");
    const int64_t heads = fields.whole("attention.head_count_kv", kv_heads[kv_heads.size() == 1 ? 0 : i]);
    config[slides[i] != 0 ? "num_key_value_heads" : "num_global_key_value_heads"] = heads;
    const std::string layer = "blk." + std::to_string(i);
    const bool own = slides[i] == 0 && fields.has_tensor(layer + ".attn_k.weight");
    if (own) values &= fields.has_tensor(layer + ".attn_v.weight");
  }
  config["attention_k_eq_v"] = !values;
  config["head_dim"] = fields.need("attention.key_length_swa");
  config["global_head_dim"] = fields.need("attention.key_length");
  config["intermediate_size"] = fields.whole("feed_forward_length", sizes.front());
  config["use_double_wide_mlp"] = sizes.back() == 2 * sizes.front();
  config["num_kv_shared_layers"] = fields.integer("attention.shared_kv_layers").value_or(0);
  config["sliding_window"] = fields.need("attention.sliding_window");
  if (const int64_t experts = fields.integer("expert_count").value_or(0); experts > 0) {
    config["enable_moe_block"] = true;
    config["num_experts"] = experts;
    config["top_k_experts"] = fields.need("expert_used_count");
    config["moe_intermediate_size"] = fields.need("expert_feed_forward_length");
  }
  config["hidden_act"] = "gelu_pytorch_tanh";
  if (const auto cap = fields.number("final_logit_softcapping")) config["final_logit_softcapping"] = *cap;
  const int64_t of_layer = fields.integer("embedding_length_per_layer_input").value_or(0);
  config["hidden_size_per_layer_input"] = of_layer;
  if (const GgufTensor* table = fields.model().find("per_layer_token_embd.weight"); of_layer > 0 && table != nullptr) {
    config["vocab_size_per_layer_input"] = table->shape.front();
  }
  if (rope_factor(fields) != 1) {
    fields.refuse("has a factor of all RoPE's frequencies, which is not supported for its architecture.");
  }
  // Pairs that don't rotate are divided by something huge.
  const std::vector<float> factors = fields.floats("rope_freqs.weight");
  const auto rotated = std::ranges::count_if(factors, [](float factor) { return factor < 1e20f; });
  json full = {{"rope_type", "default"}, {"rope_theta", fields.number("rope.freq_base").value_or(1e6)}};
  if (!factors.empty()) {
    full["rope_type"] = "proportional";
    full["partial_rotary_factor"] = double(rotated) / double(factors.size());
  }
  const json sliding = {{"rope_type", "default"}, {"rope_theta", fields.number("rope.freq_base_swa").value_or(10000)}};
  config["rope_parameters"] = {{"full_attention", full}, {"sliding_attention", sliding}};
}

/// Layers without heads of keys and values are convolutions.
void lfm2(const Fields& fields, json& config) {
  const std::vector<double> heads = fields.numbers("attention.head_count_kv");
  if (config["num_hidden_layers"] != heads.size()) {
    fields.refuse("does not say which layers attend (" + fields.key("attention.head_count_kv") +
                  "); fetch a newer file of the model.");
  }
  config["layer_types"] = json::array();
  for (const double n : heads) config["layer_types"].push_back(n != 0 ? "full_attention" : "conv");
  config["conv_L_cache"] = fields.need("shortconv.l_cache");
  config["norm_eps"] = config["rms_norm_eps"];
  config["block_auto_adjust_ff_dim"] = false;
  if (fields.integer("attention.sliding_window").value_or(0) > 0) {
    fields.refuse("has a window, which is not supported for its architecture.");
  }
}

void lfm2moe(const Fields& fields, json& config) {
  lfm2(fields, config);
  config["num_experts"] = fields.need("expert_count");
  config["num_experts_per_tok"] = fields.need("expert_used_count");
  config["moe_intermediate_size"] = fields.need("expert_feed_forward_length");
  config["num_dense_layers"] = fields.integer("leading_dense_block_count").value_or(0);
  config["norm_topk_prob"] = config["use_expert_bias"] = true;  // llama.cpp has it so for all
  if (const auto scale = fields.number("expert_weights_scale")) config["routed_scaling_factor"] = *scale;
  constexpr int64_t kSigmoid = 2;
  if (fields.integer("expert_gating_func") != kSigmoid) {
    fields.refuse("chooses experts otherwise than by sigmoids, which is not supported for its architecture.");
  }
}

/// Three layers of four keep a state.
void qwen35(const Fields& fields, json& config) {
  // Those that guess further tokens come last, and are not computed.
  int64_t layers = config["num_hidden_layers"];
  layers -= fields.count("nextn_predict_layers").value_or(0);
  config["num_hidden_layers"] = layers;
  const std::vector<double> recurrent = fields.numbers("attention.recurrent_layers");
  if (!recurrent.empty() && int64_t(recurrent.size()) < layers) {
    fields.refuse("has too short a list in " + fields.key("attention.recurrent_layers") + ".");
  }
  const int64_t interval = fields.integer("full_attention_interval").value_or(4);
  config["layer_types"] = json::array();
  for (int64_t i = 0; i < layers; ++i) {
    const bool attends = recurrent.empty() ? interval > 0 && (i + 1) % interval == 0 : recurrent[size_t(i)] == 0;
    config["layer_types"].push_back(attends ? "full_attention" : "linear_attention");
  }
  const int64_t inner = fields.need("ssm.inner_size"), heads = fields.need("ssm.time_step_rank");
  if (heads == 0 || inner % heads != 0) {
    fields.refuse("has a " + fields.key("ssm.inner_size") + " that is no whole number of heads.");
  }
  config["linear_num_value_heads"] = heads;
  config["linear_value_head_dim"] = inner / heads;
  config["linear_num_key_heads"] = fields.need("ssm.group_count");
  config["linear_key_head_dim"] = fields.need("ssm.state_size");
  config["linear_conv_kernel_dim"] = fields.need("ssm.conv_kernel");
}

void qwen35moe(const Fields& fields, json& config) {
  qwen35(fields, config);
  config["num_experts"] = fields.need("expert_count");
  config["num_experts_per_tok"] = fields.need("expert_used_count");
  config["moe_intermediate_size"] = fields.need("expert_feed_forward_length");
  config["shared_expert_intermediate_size"] = fields.need("expert_shared_feed_forward_length");
  if (const double scale = fields.number("expert_weights_scale").value_or(1); scale != 1 && scale != 0) {
    fields.refuse("scales the weights of experts, which is not supported for its architecture.");
  }
}

void qwen3next(const Fields& fields, json& config) {
  qwen35moe(fields, config);
  config["norm_topk_prob"] = true;  // llama.cpp has it so for all
  find_dense_layers(fields, config);
}

struct Architecture {
  const char* name;        ///< of GGUF
  const char* model_type;  ///< of config.json, unless `fields` say another
  void (*fields)(const Fields& fields, json& config);
  bool neighbours = false;   ///< rows of q and k are in the order in which neighbours rotate
  bool apart = false;        ///< `fields` say all of layers and their RoPE
};

const Architecture kArchitectures[] = {
    {"gemma2", "gemma2", gemma2},
    {"gemma3", "gemma3_text", gemma3},
    {"gemma4", "gemma4_text", gemma4, false, /*apart=*/true},
    {"gpt-oss", "gpt_oss", gpt_oss},
    {"lfm2", "lfm2", lfm2},
    {"lfm2moe", "lfm2_moe", lfm2moe},
    {"llama", "llama", llama, /*neighbours=*/true},
    {"phi3", "phi3", phi3},
    {"qwen2", "qwen2", plain},
    {"qwen3", "qwen3", plain},
    {"qwen35", "qwen3_5_text", qwen35},
    {"qwen35moe", "qwen3_5_moe_text", qwen35moe},
    {"qwen3moe", "qwen3_moe", qwen3moe},
    {"qwen3next", "qwen3_next", qwen3next},
    {"smollm3", "smollm3", plain, /*neighbours=*/true},
};

const Architecture* find_architecture(const GgufFile& metadata) {
  const auto name = metadata.text("general.architecture");
  const auto it = std::ranges::find_if(kArchitectures, [&](const Architecture& known) { return name == known.name; });
  return it == std::end(kArchitectures) ? nullptr : it;
}

}  // namespace

json gguf_config(const GgufModel& model) {
  const Fields fields(model);
  const Architecture* architecture = find_architecture(model.metadata());
  if (architecture == nullptr) {
    std::string supported;
    for (const Architecture& known : kArchitectures) supported.append(supported.empty() ? "" : ", ").append(known.name);
    fields.refuse("is of the unsupported architecture " + fields.architecture() + ", supported of GGUF: " + supported +
                  ".");
  }
  json config = common(fields);
  config["model_type"] = architecture->model_type;
  if (!architecture->apart) {
    alike(fields, config, architecture->neighbours);
    rope_scaling(fields, config);
  }
  architecture->fields(fields, config);
  return config;
}

void adopt_gguf(const GgufFile& metadata, ModelConfig& config) {
  const Architecture* architecture = find_architecture(metadata);
  config.names.neighbours = architecture != nullptr && architecture->neighbours;
  config.norm_plus = config.published_norm_plus = 0;
  // Gemma's. Hugging Face's models round the root to bf16.
  if (config.embedding_scale != 1) config.embedding_scale = std::sqrt(float(config.hidden_size));
  if (config.layer_inputs) config.layer_inputs->scale = std::sqrt(float(config.layer_inputs->size));
  for (LayerSpec& layer : config.layers) {
    if (!layer.recurrent || layer.recurrent->shape.kind != kernels::Recurrence::kGatedDelta) continue;
    layer.recurrent->decay_is_made = true;
    layer.recurrent->shape.tiled = !layer.recurrent->interleaved;
  }
}

}  // namespace torpor::model
