#pragma once
/// The kernels over plain memory: Highway, chosen at run time (cpu_target.h). Rows and accumulation are f32.
///
/// Batch invariance: an output row is accumulated in an order that depends on neither M, nor the other rows, nor the
/// chunking of a prefill, nor the number of threads. All functions run on ThreadPool::shared() and block.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/packed_linear.h"
#include "torpor/kv_snapshot.h"

namespace torpor::kernels {

/// y [M, N] = x [M, K] · Wᵀ (+ bias) (+ residual [M, N], which may be y itself).
void linear(const float* x, int m, const PackedLinear& w, const float* residual, float* y);

enum class Activation { kSilu, kGeluTanh };
/// y [M, N] = act(x · W_gateᵀ) ⊙ (x · W_upᵀ), of a weight made by pack_gated.
void gated_linear(const float* x, int m, const PackedLinear& w, Activation activation, float* y);

/// y [M, K] = x / sqrt(mean(x²) + eps) ⊙ weight. `weight` is f32 [K].
void rms_norm(const float* x, int m, int k, const float* weight, float eps, float* y);

/// y [M, K] = rows of w.
void embedding(const int32_t* tokens, int m, const PackedLinear& w, float* y);

/// Index of the largest value, the smallest index winning ties; -1 when one is NaN or +infinity, or none is finite.
int argmax(const float* values, int n);

struct RopeSpec {
  int dims = 0;                    ///< leading dims of a head that rotate
  bool traditional = false;        ///< rotate (2i, 2i+1) instead of (i, i + dims/2)
  std::vector<float> inv_freq;     ///< [dims / 2], scaling applied
  float magnitude = 1;             ///< what the rotated dims are multiplied by
};

struct AttentionSpec {
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  float scale = 0;
  int window = 0;                  ///< a query at p attends keys in (p - window, p]; 0 = all
  float softcap = 0;               ///< scores become cap * tanh(score / cap); 0 = off
  const float* sinks = nullptr;    ///< [n_heads] extra logits in the softmax's denominator, or nullptr
  const float* q_norm = nullptr;   ///< [head_dim] RMSNorm of each head before RoPE, or nullptr
  const float* k_norm = nullptr;
  float norm_eps = 0;
  KvDtype kv_dtype = KvDtype::kF16;  ///< of rows; of their scales and biases if they are quantized
  /// Each 8 or 4: rows are quantized (affine), as mx::quantize does unless they are rotated; both 0: they are not.
  KvBits kv_bits;
  int kv_group = 64;               ///< elements of a row that share a scale and a bias: 32, 64 or 128; divides head_dim
  const float* key_bias = nullptr; ///< [H_kv, D], part of the keys given, left out of quantized rows; or nullptr
  /// Quantized rows are multiplied by a Hadamard matrix: of the greatest power of two that divides head_dim, over each
  /// such stretch of a head, divided by the root of its size.
  bool rotate_keys = false, rotate_values = false;
  RopeSpec rope;
  /// Multi-head latent attention: all heads share one row of `latent` dims, which is key and value, and of head_dim -
  /// latent dims more, which are of the key alone and rotate. The cache has the former as keys, the latter as values,
  /// and n_kv_heads is 1. 0: keys and values are apart.
  int latent = 0;
};

/// Rows [first, first + kSegmentTokens) of one layer: keys and values `[H_kv, kSegmentTokens, D]`, read and written in place.
/// Quantized: keys and values are u32 words `[H_kv, kSegmentTokens, D * bits / 32]`, and each has scales and biases
/// `[H_kv, kSegmentTokens, D / kv_group]`. Words are little-endian with the first element lowest.
struct KvRunView {
  std::byte* keys;
  std::byte* values;
  std::byte* key_scales = nullptr;
  std::byte* key_biases = nullptr;
  std::byte* value_scales = nullptr;
  std::byte* value_biases = nullptr;
};

/// One agent's part of a batch: rows [row, row + n) of the input are its tokens at positions [position, position + n).
/// `runs[i]` holds positions [256 i, 256 (i + 1)); together they cover position + n. A run of which a window
/// layer needs nothing any more may have null pointers.
struct AttentionSequence {
  int row = 0, n = 0, position = 0;
  std::span<const KvRunView> runs;
};

/// qkv [M, (H_q + 2 H_kv) D]: normalises (if asked), rotates q and k, appends k and v to the cache in its dtype or
/// quantized, and attends causally over the rows as stored. out [M, H_q D]. qkv is scratch afterwards. With `latent`
/// qkv is [M, (H_q + 1) D], a query's latent dims first, and out [M, H_q latent].
void attention(float* qkv, const AttentionSpec& spec, std::span<const AttentionSequence> sequences, float* out);

}  // namespace torpor::kernels
