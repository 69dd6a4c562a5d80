#pragma once
/// The forward pass of decoder-only models, driven by what their layers say they are (layer.h): the checks, the batch
/// cut into
/// chunks, the layers, which rows get logits.

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/mapped_rows.h"
#include "model/ops.h"
#include "model/pack_file.h"
#include "model/weights.h"
#include "torpor/model.h"

namespace torpor::model {

/// What a model is made from. `config.tied_head` is settled.
struct Checkpoint {
  ModelConfig config;
  Weights weights;
  std::string name;
  std::filesystem::path dir;
  Backend backend = Backend::kKernels;
  Activations activations = Activations::kF32;
  bool pack_cache = false;  ///< packed weights may be kept on disk (PackFile)
};

ModelInfo info_of(const Checkpoint& checkpoint);
/// Model::identity. Reads every weight byte.
Identity identity_of(const Checkpoint& checkpoint);
/// PackFile's, of a model with this identity.
std::string pack_key(const Identity& identity);
/// Model::kv_layout.
KvLayout kv_layout_of(const ModelConfig& config, const KvFormat& format);
/// Model::state_layout.
StateLayout state_layout_of(const ModelConfig& config);
/// Of each layer, which of the caches' layers has its rows: those that read another's have none.
std::vector<int> cache_layers_of(const ModelConfig& config);
/// Model::refined.
KvFormat refined_format(const ModelConfig& config, const KvFormat& asked);

/// The float dtype of the checkpoint's activations.
KvDtype checkpoint_dtype(const Projection& embedding);

/// The embedding, whose dtype is that of the checkpoint's activations.
Projection find_embedding(const Checkpoint& checkpoint);

/// Of ModelConfig::layer_inputs: what a layer does with its own, and where all of them come from.
struct LayerInputWeights {
  Ops::Weight gate, projection, norm;
};
struct SharedInputWeights {
  MappedRows table;
  Ops::Weight projection, norm;
};

/// Of Experts::beside_mlp: norms of what the MLP gives, of what experts read and give, and of what the router reads.
struct BesideMlpWeights {
  Ops::Weight mlp_post_norm, norm, post_norm, router_norm;
};

/// The weights of one layer. A norm that it does not have is nullptr.
struct DecoderLayer {
  Ops::Weight attention_norm, attention, output, attention_post_norm;  ///< no output: it does not mix
  Ops::Weight attention_gate;  ///< or nullptr
  Ops::Weight recurrent;       ///< in place of attention; or nullptr
  Ops::Weight mlp_norm, gate_up, down, mlp_post_norm;
  Ops::Weight up;       ///< in place of gate_up: of kRelu2; or nullptr
  Ops::Weight experts;  ///< in place of gate_up and down, or beside them; or nullptr
  std::optional<BesideMlpWeights> beside;
  std::optional<LayerInputWeights> inputs;
  float scalar = 1;
};

class Decoder final : public Model {
 public:
  /// Packs all weights.
  explicit Decoder(const Checkpoint& checkpoint);

  const ModelInfo& info() const override { return info_; }
  Backend backend() const override { return backend_; }
  Identity identity() const override { return identity_; }
  std::string numerics() const override;
  KvFormat default_kv_format() const override { return dtype_; }
  KvFormat refined(const KvFormat& asked) const override { return refined_format(config_, asked); }
  KvLayout kv_layout(const KvFormat& format) const override { return kv_layout_of(config_, format); }
  StateLayout state_layout() const override { return state_layout_; }
  mx::array forward(std::span<const ForwardSequence> batch) override;

 private:
  void check(std::span<const ForwardSequence> batch) const;
  mx::array compute(std::span<const ForwardSequence> batch);
  /// The last layer's output [M, hidden], all caches written (when evaluated).
  mx::array run_layers(Batch& batch) const;
  /// What the attention of a layer, or what is in its place, makes of `x`.
  mx::array mix(const mx::array& x, size_t layer, Batch& batch) const;
  /// What the layers add at their ends, [M, layers, size], of the scaled embedding `x`.
  mx::array layer_inputs(const std::vector<int32_t>& tokens, const mx::array& x) const;
  /// The layer's end where it has inputs: `inputs` is [M, size].
  mx::array add_inputs(const mx::array& x, const mx::array& inputs, const LayerInputWeights& w) const;
  /// x plus what a part of a layer gives: `inner` projected by `w`, normalised if there is a norm, and scaled.
  mx::array add_part(const mx::array& x, const mx::array& inner, const Ops::Weight& w, const Ops::Weight& post_norm) const;
  mx::array add_output(const mx::array& x, const mx::array& part, const Ops::Weight& post_norm) const;
  /// What the MLP and the experts beside it give for the residual `x`.
  mx::array mlp_and_experts(const mx::array& x, const DecoderLayer& layer) const;
  /// f32 logits of some of its rows.
  mx::array logits(const mx::array& hidden) const;
  /// The layout of a cache, which is kv_layout of its format. kInvalidArgument when it is another.
  const KvLayout& layout_of(const KvAccess& cache);

  const ModelConfig config_;
  const Backend backend_;
  const Activations activations_;
  const KvDtype dtype_;
  const ModelInfo info_;
  const Identity identity_;
  std::unique_ptr<PackFile> pack_;  // while weights are packed; or nullptr
  const std::unique_ptr<Ops> ops_;
  Ops::Weight embedding_, final_norm_, head_;
  std::vector<DecoderLayer> layers_;
  std::vector<int> cache_layers_;  // of each layer: which of the caches' layers has its rows
  StateLayout state_layout_;
  std::vector<size_t> state_offsets_;  // of each layer: where a state has what is its own
  std::optional<SharedInputWeights> inputs_;
  std::map<KvFormat, KvLayout> layouts_;  // kv_layout, made once: every token asks for it
};

}  // namespace torpor::model
