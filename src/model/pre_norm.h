#pragma once
/// The plain pre-norm transformer, which most families are: they differ in how a layer's weights are named and kept.

#include <functional>
#include <string>
#include <vector>

#include "model/modules.h"

namespace torpor::model {

class PreNormDecoder : public Decoder {
 protected:
  /// The weights of a layer that a family has its own way with.
  struct Parts {
    Ops::Weight qkv, output;
    Ops::Weight gate_up, down;
  };
  using LoadParts = std::function<Parts(const Modules& modules, const std::string& layer)>;

  explicit PreNormDecoder(const Checkpoint& checkpoint) : Decoder(checkpoint) {}
  /// Packs all weights; `parts` is asked for those of "model.layers.0" and so on.
  void load(const Checkpoint& checkpoint, const LoadParts& parts);

 private:
  struct Layer {
    Ops::Weight attention_norm, mlp_norm;
    Parts parts;
  };

  mx::array layers(const Batch& batch) final;
  mx::array logits(const mx::array& hidden) final;

  Ops::Weight embedding_, final_norm_, head_;
  std::vector<Layer> layers_;
};

}  // namespace torpor::model
