#pragma once
/// A Llama of two layers with random weights, a small vocabulary and a chat template: for tests that need an Engine and
/// no meaning. One layer has a window, so rows fall behind it.

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "base/json.h"

namespace torpor::testing {

enum class TinyAttention {
  kPlain,
  kBiased,  ///< projections have biases, that of the keys as large beside the signal as Qwen2.5's
  kNormed,  ///< heads of q and k have norms with weights that lie far apart, as Qwen 3's; the architecture is that one
};

/// Writes the model into `directory`, which is made. Equal in every process. A window of 1,024 tokens or more is that
/// of the first layer, else of the second.
inline void write_tiny_model(const std::filesystem::path& directory, TinyAttention kind = TinyAttention::kPlain,
                             int window = 100) {
  namespace fs = std::filesystem;
  constexpr int kHidden = 32, kInner = 64, kHeads = 2, kKvHeads = 1, kHeadDim = 32, kVocab = 605, kEnd = 602;
  const fs::path text = fs::path(TORPOR_SOURCE_DIR) / "tests/goldens/text";
  fs::create_directories(directory);
  fs::copy_file(text / "tokenizers/byte-level/tokenizer.json", directory / "tokenizer.json");
  fs::copy_file(text / "templates/chatml.jinja", directory / "chat_template.jinja");

  std::ofstream(directory / "config.json") << nlohmann::json{
      {"architectures", nlohmann::json::array({"LlamaForCausalLM"})},
      {"model_type", kind == TinyAttention::kNormed ? "qwen3" : "llama"}, {"hidden_size", kHidden},
      {"intermediate_size", kInner}, {"num_hidden_layers", 2}, {"num_attention_heads", kHeads},
      {"num_key_value_heads", kKvHeads}, {"head_dim", kHeadDim}, {"vocab_size", kVocab}, {"rms_norm_eps", 1e-5},
      {"rope_theta", 10000.0}, {"max_position_embeddings", 4096}, {"tie_word_embeddings", false},
      {"layer_types", window < 1024 ? nlohmann::json::array({"full_attention", "sliding_attention"})
                                    : nlohmann::json::array({"sliding_attention", "full_attention"})},
      {"sliding_window", window},
      {"torch_dtype", "float32"}, {"hidden_act", "silu"}, {"eos_token_id", kEnd},
      {"attention_bias", kind == TinyAttention::kBiased}};

  nlohmann::ordered_json header;
  std::vector<float> values;
  std::mt19937 random(7);
  const auto add = [&](const std::string& name, std::vector<int> shape, double scale) {
    const size_t begin = values.size() * sizeof(float);
    int64_t count = 1;
    for (int n : shape) count *= n;
    // Scale 0 is a norm: all ones. Uniform numbers made by hand, for std's distributions differ between libraries.
    for (int64_t i = 0; i < count; ++i) {
      const double unit = double(random()) / 4294967296.0 * 2 - 1;
      values.push_back(scale == 0 ? 1.0f : float(unit * scale * std::sqrt(3.0)));
    }
    header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, values.size() * sizeof(float)}}};
  };
  // A small embedding and a head of its own: what comes next depends on the context, not on the last token alone.
  add("model.embed_tokens.weight", {kVocab, kHidden}, 0.3);
  add("model.norm.weight", {kHidden}, 0);
  add("lm_head.weight", {kVocab, kHidden}, 1);
  for (int i = 0; i < 2; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    add(layer + "input_layernorm.weight", {kHidden}, 0);
    add(layer + "post_attention_layernorm.weight", {kHidden}, 0);
    const auto linear = [&](const char* name, int out, int in) {
      add(layer + name + ".weight", {out, in}, 1 / std::sqrt(double(in)));
    };
    const auto of_attention = [&](const char* name, int out, int in, double bias) {
      linear(name, out, in);
      if (kind == TinyAttention::kBiased) add(layer + name + ".bias", {out}, bias);
    };
    of_attention("self_attn.q_proj", kHeads * kHeadDim, kHidden, 0.1);
    of_attention("self_attn.k_proj", kKvHeads * kHeadDim, kHidden, 20);
    of_attention("self_attn.v_proj", kKvHeads * kHeadDim, kHidden, 0.1);
    of_attention("self_attn.o_proj", kHidden, kHeads * kHeadDim, 0.1);
    for (const char* name : {"self_attn.q_norm", "self_attn.k_norm"}) {
      if (kind != TinyAttention::kNormed) break;
      add(layer + name + ".weight", {kHeadDim}, 2);
      for (size_t at = values.size() - kHeadDim; at < values.size(); ++at) values[at] = std::exp2(values[at]);
    }
    linear("mlp.gate_proj", kInner, kHidden);
    linear("mlp.up_proj", kInner, kHidden);
    linear("mlp.down_proj", kHidden, kInner);
  }
  std::string json = dump_json(header);
  json.resize((json.size() + 7) / 8 * 8, ' ');
  const uint64_t length = json.size();
  std::ofstream file(directory / "model.safetensors", std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), sizeof length);
  file << json;
  file.write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * sizeof(float)));
}

}  // namespace torpor::testing
