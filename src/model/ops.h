#pragma once
/// The layer vocabulary in which the decoder is written, once for both backends: over Torpor's CPU kernels
/// (ops_kernels.cc) or MLX's own operations (ops_mlx.cc). Activations are [M, features], the rows of all sequences of
/// a batch one after the other.

#include <map>
#include <memory>
#include <span>
#include <vector>

#include <mlx/array.h>
#include <mlx/device.h>

#include "kernels/weight_memory.h"
#include "model/layer.h"
#include "model/projection.h"
#include "model/weights.h"
#include "torpor/model.h"

namespace torpor::model {

/// Rows [row, row + n) of a batch are tokens of one sequence at positions [position, position + n).
struct BatchSequence {
  KvAccess* kv = nullptr;
  std::span<const KvBuffer> runs;  ///< kernels only: the cache's buffers, with room for the new rows
  int row = 0, n = 0, position = 0;
  const std::byte* state = nullptr;  ///< of recurrent layers, before the rows; nullptr: all zeros
  std::byte* next_state = nullptr;   ///< where that after them is written; kernels only: may be `state`
};

/// What is computed at once: one chunk of a forward pass.
struct Batch {
  std::vector<int32_t> tokens;
  std::vector<BatchSequence> sequences;
  const KvLayout* kv_layout = nullptr;  ///< of all its caches
  KvFormat kv_format;                   ///< likewise
  std::vector<std::pair<std::byte*, mx::array>> states;  ///< MLX only: evaluated, they are copied there
  std::map<int, std::vector<mx::array>> lent;  ///< layer of the caches -> what layers that read its rows need, in the backend's form
};

/// MLX only: the batch's sequences, cut where arrays can have an entry for each. Those that follow one another with one
/// row each are together; any other one is alone.
std::vector<std::span<const BatchSequence>> blocks_of(const Batch& batch);

/// The projections of a mixture: of each expert, in their order, and what else its spec says that there is.
struct ExpertProjections {
  Projection router;
  std::vector<Projection> gates, ups, downs;  ///< no gates for ExpertActivation::kRelu2
  std::vector<Projection> shared;             ///< gate (or none), up and down of the shared expert
  std::optional<Projection> shared_gate;
};

/// The projections of latent attention (layer.h): of each head, [latents, plain dims] into a query and [output dims,
/// latents] out.
struct LatentProjections {
  std::optional<Projection> query_features;
  Projection query, latents;
  std::vector<Projection> into, out;
};

class Ops {
 public:
  /// A weight in the backend's own form.
  struct Packed {
    virtual ~Packed() = default;
  };
  using Weight = std::shared_ptr<const Packed>;

  virtual ~Ops() = default;

  // Loading: the checkpoint may be unmapped afterwards.
  virtual Weight pack_linear(const Projection& projection) = 0;
  /// The norms are nullptr and the sinks empty unless `spec` has them. k and v are nullptr if it reads another layer's
  /// rows; v is if keys are values.
  virtual Weight pack_attention(const Attention& spec, const Projection& q, const Projection* k, const Projection* v,
                                Weight q_norm, Weight k_norm, std::vector<float> sinks) = 0;
  /// `projections` give, side by side, what kernels::RecurrentShape::given says.
  virtual Weight pack_recurrent(kernels::Recurrent cell, const std::vector<Projection>& projections) = 0;
  /// Of an Attention that is latent. The norms are of the latents and, unless nullptr, of the queries' features.
  virtual Weight pack_latent_attention(const Attention& spec, const LatentProjections& projections, Weight norm,
                                       Weight query_norm) = 0;
  virtual Weight pack_gated(const Projection& gate, const Projection& up, Activation activation) = 0;
  /// `spec` has its routing's biases and scales. The router is not rounded to 16-bit activations.
  virtual Weight pack_experts(const Experts& spec, const ExpertProjections& projections) = 0;
  /// What rows are multiplied by is weight + plus (Gemma keeps its norms less one). If `centred`, their mean is taken
  /// off before.
  virtual Weight pack_norm(const TensorView& weight, float plus, bool centred) = 0;

  // A layer's parts.
  virtual mx::array embedding(const std::vector<int32_t>& tokens, const Weight& w) = 0;
  virtual mx::array norm(const mx::array& x, const Weight& w) = 0;
  /// Projects to q, k and v, normalises and rotates them as the weight's spec has it. Appends k and v to the caches'
  /// `layer`,
  /// unless another layer of the model has, and attends. [M, H_q D_v]
  virtual mx::array attention(const mx::array& x, const Weight& w, int layer, Batch& batch) = 0;
  /// Projects, and goes on from the sequences' states, whose bytes for this layer begin at `offset`. [M, output()]
  virtual mx::array recurrent(const mx::array& x, const Weight& w, size_t offset, Batch& batch) = 0;
  /// x ⊙ sigmoid(gates)
  virtual mx::array gate(const mx::array& x, const mx::array& gates) = 0;
  /// residual + x · Wᵀ
  virtual mx::array linear_add(const mx::array& x, const Weight& w, const mx::array& residual) = 0;
  virtual mx::array linear(const mx::array& x, const Weight& w) = 0;
  /// act(x · W_gateᵀ) ⊙ (x · W_upᵀ)
  virtual mx::array gated(const mx::array& x, const Weight& w) = 0;
  /// The weighted sum of each row's experts, chosen by the router's reading of `routed` [M, hidden]. [M, hidden]
  virtual mx::array experts(const mx::array& x, const mx::array& routed, const Weight& w) = 0;
  /// f32 logits, of an lm_head or a tied embedding.
  virtual mx::array head(const mx::array& x, const Weight& w) = 0;
  mx::array add(const mx::array& x, const mx::array& y) const;
  mx::array scale(const mx::array& x, float factor) const;
  mx::array multiply(const mx::array& x, const mx::array& y) const;
  /// The approximation with a tanh.
  mx::array gelu(const mx::array& x) const;
  mx::array relu_squared(const mx::array& x) const;
  /// cap · tanh(x / cap); x itself if the cap is 0.
  mx::array soft_cap(const mx::array& x, float cap) const;

  // The batch's life.
  virtual mx::Device device() const = 0;
  /// Room for `n` more rows, where the backend writes in place.
  virtual std::span<const KvBuffer> reserve(KvAccess& kv, int n) = 0;
  /// Whether the caches must advance after each chunk (they append where they stand) or may once at the end.
  virtual bool advances_per_chunk() const = 0;
};

/// `eps` is that of all norms. Weights that every token reads are packed into `resident`, experts into `experts`; both
/// are used while weights are packed.
std::unique_ptr<Ops> make_kernel_ops(float eps, Activations activations, kernels::WeightMemory& resident,
                                     kernels::WeightMemory& experts);
/// `dtype` is that of the checkpoint's activations.
std::unique_ptr<Ops> make_mlx_ops(float eps, KvDtype dtype);

}  // namespace torpor::model
