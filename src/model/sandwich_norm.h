#pragma once
/// Gemma's layer: norms before and after each part, rows multiplied by one more than a norm's weight, a scaled embedding.

#include <functional>
#include <string>
#include <vector>

#include "model/modules.h"

namespace torpor::model {

class SandwichNormDecoder : public Decoder {
 protected:
  using LoadQkv = std::function<Ops::Weight(const Modules& modules, const std::string& attention)>;

  explicit SandwichNormDecoder(const Checkpoint& checkpoint) : Decoder(checkpoint) {}
  /// Packs all weights; `qkv` is asked for those of "model.layers.0.self_attn" and so on. The embedding is multiplied by
  /// `scale`.
  void load(const Checkpoint& checkpoint, float scale, const LoadQkv& qkv);

 private:
  struct Layer {
    Ops::Weight attention_norm, qkv, output, attention_post_norm;
    Ops::Weight mlp_norm, gate_up, down, mlp_post_norm;
  };

  mx::array layers(const Batch& batch) final;
  mx::array logits(const mx::array& hidden) final;

  float scale_ = 1;
  Ops::Weight embedding_, final_norm_, head_;
  std::vector<Layer> layers_;
};

/// How much Gemma's norms add to their weights.
inline constexpr float kGemmaNormPlus = 1;

}  // namespace torpor::model
