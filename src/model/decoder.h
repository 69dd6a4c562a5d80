#pragma once
/// What every decoder-only architecture shares: the batch cut into chunks, the checks, which rows get logits.

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/ops.h"
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
};

ModelInfo info_of(const Checkpoint& checkpoint);
/// Model::identity. Reads every weight byte.
Identity identity_of(const Checkpoint& checkpoint);
/// Model::kv_layout.
KvLayout kv_layout_of(const ModelConfig& config, const KvFormat& format);
/// Model::refined.
KvFormat refined_format(const ModelConfig& config, const KvFormat& asked);

/// The embedding, whose dtype is that of the checkpoint's activations.
Projection find_embedding(const Checkpoint& checkpoint);

class Decoder : public Model {
 public:
  const ModelInfo& info() const override { return info_; }
  Backend backend() const override { return backend_; }
  Identity identity() const override { return identity_; }
  std::string numerics() const override;
  KvFormat default_kv_format() const override { return dtype_; }
  KvFormat refined(const KvFormat& asked) const override { return refined_format(config_, asked); }
  KvLayout kv_layout(const KvFormat& format) const override { return kv_layout_of(config_, format); }
  mx::array forward(std::span<const ForwardSequence> batch) override;

 protected:
  explicit Decoder(const Checkpoint& checkpoint);

  /// The last layer's output [M, hidden], all caches written (when evaluated).
  virtual mx::array layers(const Batch& batch) = 0;
  /// f32 logits of some of its rows.
  virtual mx::array logits(const mx::array& hidden) = 0;

  const ModelConfig config_;
  const Backend backend_;
  const Activations activations_;
  const KvDtype dtype_;
  const std::unique_ptr<Ops> ops_;

 private:
  void check(std::span<const ForwardSequence> batch) const;
  mx::array compute(std::span<const ForwardSequence> batch);
  /// The layout of a cache, which is kv_layout of its format. kInvalidArgument when it is another.
  const KvLayout& layout_of(const KvAccess& cache);

  ModelInfo info_;
  Identity identity_;
  std::map<KvFormat, KvLayout> layouts_;  // kv_layout, made once: every token asks for it
};

}  // namespace torpor::model
