#pragma once
/// Rotary position embedding: the frequencies a config asks for.

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace torpor::model {

struct Rope {
  int dims = 0;                  ///< leading dims of a head that rotate
  bool traditional = false;      ///< rotate (2i, 2i+1) instead of (i, i + dims/2)
  std::vector<float> inv_freq;   ///< [dims / 2], scaling applied: the angle of pair i at position p is p * inv_freq[i]
  float magnitude = 1;           ///< what the rotated dims are multiplied by
  double context_factor = 1;     ///< how many times the trained context it serves: the factor of the linear type
  std::string description;       ///< part of the identity: "default theta 100000"
};

/// Types default, linear, llama3 and longrope (su), as mlx-lm computes them; kInvalidArgument for any other. `config` is the
/// whole config.json. transformers 5 puts all of it into `rope_parameters`, which comes before the older fields.
Rope parse_rope(const nlohmann::json& config, int head_dim);

/// The plain RoPE of Gemma 3's sliding layers.
Rope parse_local_rope(const nlohmann::json& config, int head_dim);

}  // namespace torpor::model
