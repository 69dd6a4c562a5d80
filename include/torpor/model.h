#pragma once
/// A transformer with its weights, from a Hugging Face / mlx-community directory. Belongs to the thread that loaded it
/// (MLX streams are per thread); the engine thread in Torpor itself.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <mlx/array.h>

#include "torpor/kv_snapshot.h"
#include "torpor/model_info.h"

namespace torpor {

namespace mx = mlx::core;

/// What a forward pass asks of a KV cache (implemented by src/cache, one kind per backend).
class KvAccess {
 public:
  virtual ~KvAccess() = default;
  /// How it keeps rows.
  virtual const KvFormat& format() const noexcept = 0;
  /// What it stores; equal to Model::kv_layout of its format.
  virtual const KvLayout& layout() const noexcept = 0;
  /// Tokens held.
  virtual int length() const = 0;
  /// kKernels: makes room for `n` more tokens. Run i is the buffer of tokens [256 i, 256 (i + 1)). A run has the
  /// layout's size for kSegmentTokens tokens. The kernels write the new rows in place.
  virtual std::span<const KvBuffer> reserve(int n) = 0;
  /// kMlx: appends k, v `[1, H_kv, n, D]`, of any float dtype, to layer `layer` in the cache's format. Returns the rows
  /// held, the new ones last: all, or at least those that a layer with a window sees. Quantized rows come back in the
  /// dtype of k and v.
  virtual std::pair<mx::array, mx::array> update_and_fetch(int layer, const mx::array& k, const mx::array& v) = 0;
  /// After evaluation: the `n` rows now count, and next_state() is the state.
  virtual void advance(int n) = 0;
  /// The pass failed. What it has appended and not evaluated is forgotten: a later pass would compute it again, with
  /// what failed in it.
  virtual void abandon() {}

  /// What the recurrent layers leave behind; equal to Model::state_layout. Empty: there are none.
  virtual const StateLayout& state_layout() const noexcept;
  /// The state after length() tokens, which no forward pass changes. Empty at length 0, where it is all zeros.
  virtual std::span<const std::byte> state() const { return {}; }
  /// Where a forward pass writes the state after its tokens: a buffer of StateLayout::bytes() that nobody else has. A
  /// pass in several chunks reads there what its last chunk left. Of no meaning after advance.
  virtual std::span<std::byte> next_state() { return {}; }
};

/// One agent's tokens in a batch. The cache is advanced by forward itself.
struct ForwardSequence {
  std::span<const int32_t> tokens;  ///< at least one, at positions [kv->length(), ...)
  KvAccess* kv = nullptr;
  bool all_logits = false;          ///< logits of every token instead of the last
  bool no_logits = false;           ///< of none: more of the prompt follows
};

class Model {
 public:
  /// kNotFound, kInvalidArgument ("unsupported architecture X, supported: ..."; what `compute` asks for can't be had),
  /// kCorruption, kIo.
  static std::unique_ptr<Model> load(const std::string& name, const ComputeOptions& compute = {});
  virtual ~Model() = default;

  virtual const ModelInfo& info() const = 0;
  virtual Backend backend() const = 0;
  /// architecture, config, weights and rope filled in; kv is the caller's to add.
  virtual Identity identity() const = 0;
  /// How this process computes rows (Lineage): "f32/kernels/l16-fma", "f16/mlx-metal/-".
  virtual std::string numerics() const = 0;
  /// How KV is kept unless asked otherwise: in the dtype of the checkpoint's activations.
  virtual KvFormat default_kv_format() const = 0;
  /// How new rows of the dtype, bits and group of `asked` are kept: with what makes quantized rows of this model more
  /// exact. Keys lose their projection's bias where there is one, and what has 4 bits is rotated.
  virtual KvFormat refined(const KvFormat& asked) const = 0;
  /// Tensors a cache of this model has in `format`. kInvalidArgument for a format the model can't have.
  virtual KvLayout kv_layout(const KvFormat& format) const = 0;
  /// What its recurrent layers keep instead of rows. The state after a number of tokens has the same bits (kKernels)
  /// however the tokens were cut into passes, and whatever ran beside them. Empty: all layers have rows.
  virtual StateLayout state_layout() const { return {}; }

  /// Evaluated f32 logits [rows, vocab]: per sequence its last token's row, all of them or none. Long inputs are
  /// computed in chunks inside. On an error no sequence has advanced on kKernels. On kMlx one may have, by whole chunks
  /// of 512 tokens of the batch; the caller cuts it back (with recurrent layers, to a state that it has kept).
  virtual mx::array forward(std::span<const ForwardSequence> batch) = 0;
};

}  // namespace torpor
