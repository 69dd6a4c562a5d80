#pragma once
/// What a model directory's config.json and generation_config.json say, checked.

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "model/layer.h"

namespace torpor::model {

/// MLX's quantization of one projection: so many columns of a row share a scale.
struct Quantization {
  enum class Mode { kAffine, kMxfp4, kMxfp8, kNvfp4 };
  Mode mode = Mode::kAffine;
  int bits = 0, group = 0;
  bool operator==(const Quantization&) const = default;
};
/// As MLX calls it.
const char* mode_name(Quantization::Mode mode);

struct ModelConfig {
  std::string architecture;   ///< of the identity: "llama", "gemma3"
  std::string weight_prefix;  ///< before every tensor's name: "language_model." in a vision-language checkpoint
  int hidden_size = 0, vocab_size = 0, max_context = 0;
  float norm_eps = 0;
  bool centred_norms = false;     ///< norms take off a row's mean before (layer norms)
  float norm_plus = 0;            ///< rows are multiplied by a norm's weight plus this
  float embedding_scale = 1;      ///< the embedding is multiplied by it
  float residual_scale = 1;       ///< what a part of a layer adds is multiplied by it
  float logit_scale = 1;          ///< logits are multiplied by it
  float logit_softcap = 0;        ///< logits become cap * tanh(logit / cap); 0 = off
  std::optional<bool> tied_head;  ///< nullopt: as the weights have it
  /// Embeddings of a token for each layer, which join at its end.
  struct LayerInputs {
    int size = 0, vocab_size = 0;
    float scale = 1;  ///< they are multiplied by it
  };
  std::optional<LayerInputs> layer_inputs;
  LayerNames names;
  std::string embedding = "embed_tokens", final_norm = "norm";  ///< their names, within "model."
  float published_norm_plus = 0;    ///< norm_plus, unless mlx-lm has converted the checkpoint
  std::vector<LayerSpec> layers;  ///< at least one
  std::string rope_description;   ///< of all layers, for the identity
  bool attention_bias = false, mlp_bias = false;  ///< as config.json has them; which layers have one, their specs say
  std::vector<std::pair<std::string, std::string>> family_fields;  ///< what the family's page has read, for the digest
  bool quantized = false;
  std::map<std::string, std::optional<Quantization>> quantization;  ///< module path -> its own, nullopt = none
  std::vector<int32_t> eos_token_ids;

  /// Some layer's keys have a bias that quantized rows may lack.
  bool key_bias() const;
  /// Digest of the fields that shape the computation, RoPE aside (the identity has a field of its own for it).
  std::string digest() const;
};

/// kNotFound without config.json, kCorruption when it is no JSON, kInvalidArgument for what is not supported. `dir` may be a
/// GGUF file, whose metadata say the same.
ModelConfig read_config(const std::filesystem::path& dir);

/// The id of the tokenizer's `eos_token`, which configs often lack; nullopt where no file says it. The name is that of
/// tokenizer_config.json, in old directories of special_tokens_map.json. The id is from there too, else from tokenizer.json. Files
/// that can't be read are the text room's to refuse.
std::optional<int32_t> tokenizer_eos(const std::filesystem::path& dir);

}  // namespace torpor::model
