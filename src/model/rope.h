#pragma once
/// Rotary position embedding: the frequencies a config asks for.

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace torpor::model {

struct Rope {
  int dims = 0;                  ///< leading dims of a head that rotate; 0: none does (NoPE)
  bool traditional = false;      ///< rotate (2i, 2i+1) instead of (i, i + dims/2)
  std::vector<float> inv_freq;   ///< [dims / 2], scaling applied: the angle of pair i at position p is p * inv_freq[i]
  float magnitude = 1;           ///< what the rotated dims are multiplied by
  double theta = 0;              ///< base of the frequencies
  double context_factor = 1;     ///< how many times max_position_embeddings it serves, where that is less than it was made for
  std::string description;       ///< part of the identity: "default theta 100000"
};

/// Types default, linear, llama3, longrope (su), yarn, proportional and mrope, as mlx-lm computes them (yarn: as
/// transformers does);
/// kInvalidArgument for any other. `config` is the whole config.json. transformers 5 puts all of it into
/// `rope_parameters`, which
/// comes before the older fields.
Rope parse_rope(const nlohmann::json& config, int head_dim);

/// The plain RoPE of sliding layers, which have one of their own: of the base that the config has for them, else of
/// `theta`.
Rope parse_local_rope(const nlohmann::json& config, int head_dim, double theta);

/// The object that has the RoPE's fields, of full layers where they are by type of layer; empty if there is none.
nlohmann::json rope_fields(const nlohmann::json& config);

}  // namespace torpor::model
