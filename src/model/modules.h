#pragma once
/// The modules of a checkpoint by their names in Hugging Face's files, packed for a backend.

#include <string>

#include "model/decoder.h"

namespace torpor::model {

class Modules {
 public:
  /// Both must outlive it.
  Modules(const Checkpoint& checkpoint, Ops& ops) : checkpoint_(checkpoint), ops_(ops) {}

  /// The weight [n, k] of `name`; kCorruption, kInvalidArgument as find_projection.
  Projection projection(const std::string& name, int n, int k, bool bias = false) const;
  Ops::Weight linear(const std::string& name, int n, int k, bool bias = false) const;
  /// Rows are multiplied by weight + plus.
  Ops::Weight norm(const std::string& name, int k, float plus = 0) const;

  Ops::Weight embedding() const;
  /// `lm_head`, or `embedding` where that is tied.
  Ops::Weight head(const Ops::Weight& embedding) const;
  /// q_proj, k_proj and v_proj of `name`, "model.layers.0.self_attn".
  Ops::Weight qkv(const std::string& name, bool bias, Ops::Weight q_norm = nullptr, Ops::Weight k_norm = nullptr) const;
  /// o_proj
  Ops::Weight attention_output(const std::string& name, bool bias = false) const;
  /// gate_proj and up_proj of `name`, "model.layers.0.mlp".
  Ops::Weight gate_up(const std::string& name, bool bias = false) const;
  /// down_proj
  Ops::Weight down(const std::string& name, bool bias = false) const;

 private:
  const Checkpoint& checkpoint_;
  Ops& ops_;
};

/// Of the layer's parts: "model.layers.3".
std::string layer_name(int layer);

}  // namespace torpor::model
