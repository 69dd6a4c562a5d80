#pragma once
/// An LFM2 of two convolutions and two layers with rows, random weights, a small vocabulary and a chat template.

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "base/json.h"

namespace torpor::testing {

/// Writes the model into `directory`, which is made. Equal in every process.
inline void write_tiny_lfm2(const std::filesystem::path& directory) {
  namespace fs = std::filesystem;
  constexpr int kHidden = 32, kInner = 48, kHeadDim = 16, kVocab = 605, kEnd = 602;
  const fs::path text = fs::path(TORPOR_SOURCE_DIR) / "tests/goldens/text";
  fs::create_directories(directory);
  fs::copy_file(text / "tokenizers/byte-level/tokenizer.json", directory / "tokenizer.json");
  fs::copy_file(text / "templates/chatml.jinja", directory / "chat_template.jinja");
  std::ofstream(directory / "config.json") << nlohmann::json{
      {"model_type", "lfm2"}, {"hidden_size", kHidden}, {"num_hidden_layers", 4}, {"num_attention_heads", 2},
      {"num_key_value_heads", 2}, {"vocab_size", kVocab}, {"max_position_embeddings", 4096}, {"norm_eps", 1e-5},
      {"rope_theta", 10000.0}, {"tie_word_embeddings", true}, {"eos_token_id", kEnd}, {"conv_L_cache", 3},
      {"conv_bias", false}, {"block_dim", kHidden}, {"block_ff_dim", 64}, {"block_ffn_dim_multiplier", 1.0},
      {"block_multiple_of", 16}, {"block_auto_adjust_ff_dim", true}, {"intermediate_size", 64},
      {"full_attn_idxs", nlohmann::json::array({1, 3})}, {"torch_dtype", "float32"}};
  nlohmann::ordered_json header;
  std::vector<float> values;
  std::mt19937 random(7);
  const auto add = [&](const std::string& name, std::vector<int> shape, double scale) {
    const size_t begin = values.size() * sizeof(float);
    int64_t count = 1;
    for (const int n : shape) count *= n;
    for (int64_t i = 0; i < count; ++i) {  // scale 0 is a norm
      const double unit = double(random()) / 4294967296.0 * 2 - 1;
      values.push_back(scale == 0 ? 1.0f : float(unit * scale * std::sqrt(3.0)));
    }
    header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, values.size() * sizeof(float)}}};
  };
  const auto linear = [&](const std::string& name, int out, int in) {
    add(name + ".weight", {out, in}, 1 / std::sqrt(double(in)));
  };
  add("model.embed_tokens.weight", {kVocab, kHidden}, 0.5);
  add("model.embedding_norm.weight", {kHidden}, 0);
  for (int i = 0; i < 4; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    add(layer + "operator_norm.weight", {kHidden}, 0);
    add(layer + "ffn_norm.weight", {kHidden}, 0);
    if (i % 2 == 0) {
      add(layer + "conv.conv.weight", {kHidden, 3, 1}, 0.6);
      linear(layer + "conv.in_proj", 3 * kHidden, kHidden);
      linear(layer + "conv.out_proj", kHidden, kHidden);
    } else {
      for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"}) linear(layer + "self_attn." + name, kHidden, kHidden);
      for (const char* name : {"q_layernorm", "k_layernorm"}) add(layer + "self_attn." + name + ".weight", {kHeadDim}, 0);
    }
    linear(layer + "feed_forward.w1", kInner, kHidden);
    linear(layer + "feed_forward.w3", kInner, kHidden);
    linear(layer + "feed_forward.w2", kHidden, kInner);
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
