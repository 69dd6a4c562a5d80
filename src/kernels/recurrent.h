#pragma once
/// Mixers that keep a state of fixed size instead of rows: a short convolution (LFM2), the gated delta rule (Qwen 3.5)
/// and Mamba-2. Like the other kernels (compute.h): f32 in plain memory, ThreadPool::shared(), blocking.
///
/// A sequence's tokens are taken one after the other, in each head, and sums go over the state's keys in index order.
/// So the bits of outputs and state depend on neither chunks nor the other sequences. Formulas: mlx-lm's lfm2.py,
/// gated_delta.py and ssm.py, in their sequential form.

#include <span>
#include <vector>

namespace torpor::kernels {

enum class Recurrence {
  kShortConv,   ///< y = C ⊙ conv(B ⊙ x)
  kGatedDelta,  ///< per head: S = g S; S += k (v - Sᵀ k)ᵀ beta; y = Sᵀ q. q, k and v are of silu(conv(qkv)).
  kMamba2,      ///< per head: S = exp(A dt) S + B (dt x)ᵀ; y = Sᵀ C + D x. x, B and C are of silu(conv(xBC)).
};

/// What the output of a head passes through.
struct OutputNorm {
  int size = 0;              ///< features whose mean square is taken: a whole number of heads, or a part of all
  float eps = 0;
  bool gate_before = false;  ///< y = norm(y silu(z)), else norm(y) silu(z)
};

struct RecurrentShape {
  Recurrence kind = Recurrence::kShortConv;
  int taps = 0;                    ///< inputs that a convolution's output is made of
  int n_heads = 0;                 ///< of v, or x; 0 for kShortConv
  int n_groups = 0;                ///< heads of q and k, or of B and C, each for n_heads / n_groups heads
  int key_dim = 0, value_dim = 0;  ///< of a head's state; kShortConv: value_dim features in all
  float min_step = 0, max_step = 0;  ///< kMamba2: dt is clamped to them
  /// kGatedDelta: z and y have the first heads of all groups first, then the second ones, as llama.cpp's files do.
  bool tiled = false;
  OutputNorm norm;                 ///< not of kShortConv

  /// Where among y's heads head `head` is.
  int place(int head) const {
    const int of_group = tiled ? n_heads / n_groups : n_heads;
    return head % of_group * (n_heads / of_group) + head / of_group;
  }
  /// Features of y.
  int output() const { return n_heads == 0 ? value_dim : n_heads * value_dim; }
  /// Features that are convolved.
  int channels() const { return n_heads == 0 ? value_dim : output() + 2 * n_groups * key_dim; }
  /// Features of a row that is given: B, C, x; or q, k, v, z, b, a; or z, x, B, C, dt.
  int given() const {
    if (kind == Recurrence::kShortConv) return 3 * value_dim;
    return channels() + output() + (kind == Recurrence::kGatedDelta ? 2 : 1) * n_heads;
  }
  /// Floats of a state: the last taps - 1 inputs of the convolution [taps - 1, channels], oldest first, then
  /// S [n_heads, key_dim, value_dim].
  size_t tail() const { return size_t(taps - 1) * size_t(channels()); }
  size_t state() const { return tail() + size_t(n_heads) * size_t(key_dim) * size_t(value_dim); }
};

/// What a layer has beside its projections.
struct Recurrent {
  RecurrentShape shape;
  std::vector<float> conv;       ///< [taps, channels]
  std::vector<float> conv_bias;  ///< [channels], or empty
  std::vector<float> log_decay;  ///< [n_heads]: A_log
  std::vector<float> step_bias;  ///< [n_heads]: dt_bias
  std::vector<float> skip;       ///< [n_heads]: D of kMamba2
  std::vector<float> norm;       ///< [value_dim], of each head of kGatedDelta; [output] of kMamba2
};

/// One agent's part of a batch: rows [row, row + n), n > 0, go on from `state` (nullptr: all zeros) and leave `next`,
/// which may be `state` itself.
struct RecurrentSequence {
  int row = 0, n = 0;
  const float* state = nullptr;
  float* next = nullptr;
};

/// given [M, given()] -> y [M, output()], all states written. kInvalidArgument when weights don't fit the shape.
void recurrent(const float* given, int m, const Recurrent& w, std::span<const RecurrentSequence> sequences, float* y);

/// y [n] = x · sigmoid(gate)
void gate(const float* x, const float* gates, size_t n, float* y);

}  // namespace torpor::kernels
