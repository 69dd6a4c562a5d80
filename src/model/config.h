#pragma once
/// What a model directory's config.json and generation_config.json say, checked.

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "model/rope.h"

namespace torpor::model {

/// MLX affine quantization of one projection.
struct Quantization {
  int bits = 0, group = 0;
  bool operator==(const Quantization&) const = default;
};

/// Of the gated MLP.
enum class Activation { kSilu, kGeluTanh };

struct ModelConfig {
  std::string model_type;     ///< "llama", "mistral", "gemma3"
  std::string architecture;   ///< whose forward pass it is: "llama", "gemma3"
  std::string weight_prefix;  ///< before every tensor's name: "language_model." in a vision-language checkpoint
  int hidden_size = 0, intermediate_size = 0, n_layers = 0;
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  int vocab_size = 0, max_context = 0;
  float rms_norm_eps = 0;
  std::optional<bool> tied_head;  ///< nullopt: as the weights have it
  bool attention_bias = false, mlp_bias = false;
  bool key_bias = false;      ///< keys have a bias, and no norm after it
  Activation activation = Activation::kSilu;
  float attention_scale = 0;      ///< of the scores q · k
  float attention_softcap = 0;    ///< scores become cap * tanh(score / cap); 0 = off
  float logit_softcap = 0;        ///< the same of the logits
  std::vector<int> windows;       ///< per layer; 0 = all tokens are attended
  Rope rope;
  std::optional<Rope> local_rope; ///< of the layers with a window, if they have their own
  bool quantized = false;
  std::map<std::string, std::optional<Quantization>> quantization;  ///< module path -> its own, nullopt = none
  std::vector<int32_t> eos_token_ids;

  const Rope& rope_of(int layer) const { return local_rope && windows[size_t(layer)] != 0 ? *local_rope : rope; }
  /// Both of them, for the identity.
  std::string rope_description() const;
  /// Digest of the fields that shape the computation, RoPE aside (the identity has a field of its own for it).
  std::string digest() const;
};

/// kNotFound without config.json, kCorruption when it is no JSON, kInvalidArgument for what is not supported.
ModelConfig read_config(const std::filesystem::path& dir);

/// The id of the tokenizer's `eos_token`, which configs often lack; nullopt where no file says it. The name is that of
/// tokenizer_config.json, in old directories of special_tokens_map.json. The id is from there too, else from tokenizer.json. Files
/// that can't be read are the text room's to refuse.
std::optional<int32_t> tokenizer_eos(const std::filesystem::path& dir);

}  // namespace torpor::model
