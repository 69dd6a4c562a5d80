#pragma once
/// The modules of a checkpoint by their names in Hugging Face's files, packed for a backend.

#include <string>
#include <vector>

#include "model/decoder.h"

namespace torpor::model {

class Modules {
 public:
  /// Both must outlive it.
  Modules(const Checkpoint& checkpoint, Ops& ops) : checkpoint_(checkpoint), ops_(ops) {}

  /// The embedding, and the head: `lm_head`, or `embedding` where that is tied.
  Ops::Weight embedding() const;
  Ops::Weight head(const Ops::Weight& embedding) const;
  /// [k]
  Ops::Weight norm(const std::string& name, int k) const;
  DecoderLayer layer(int index) const;
  /// Of a model with layer_inputs.
  SharedInputWeights shared_inputs() const;

 private:
  /// What a layer's queries are made by, or their gates.
  Projection queries(const std::string& attention, const Attention& spec, bool gates) const;
  /// What a recurrent mixer reads, side by side.
  std::vector<Projection> given(const std::string& name, const Recurrent& spec) const;
  /// The weight [n, k] of `name`; kCorruption, kInvalidArgument as find_projection.
  Projection projection(const std::string& name, int n, int k, bool bias = false) const;
  Ops::Weight attention(int index) const;
  Ops::Weight recurrent(int index) const;
  Ops::Weight latent_attention(int index) const;
  Ops::Weight gated(const std::string& name, const Mlp& spec) const;
  /// The MLP of `layer`, in `parts`.
  void add_mlp(const std::string& layer, const Mlp& spec, DecoderLayer& parts) const;
  bool has(const std::string& module) const;
  /// Part `i` of the MLP `name`, which mlx-lm gives the usual names where it converts a checkpoint.
  std::string mlp_part(const std::string& name, int i) const;
  /// Of the layer `layer` ("model.layers.0").
  Ops::Weight experts(const std::string& layer, const Experts& spec) const;
  BesideMlpWeights beside_mlp(const std::string& layer) const;
  LayerInputWeights inputs(const std::string& layer) const;
  /// A tensor of `n` numbers.
  std::vector<float> numbers(const std::string& name, int n) const;

  const Checkpoint& checkpoint_;
  Ops& ops_;
};

/// Whether the weights of convolutions have the shape in which models are published, not mlx-lm's.
bool has_published_convolutions(const ModelConfig& config, const Weights& weights);

/// Of the layer's parts: "model.layers.3".
std::string layer_name(int layer);

}  // namespace torpor::model
