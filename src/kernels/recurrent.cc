// A layer is three passes. Over rows: the convolution, and what each head needs of its result. Over columns of each
// head's state: the tokens one after the other. A column of S depends on no other, so columns are a task's, and its
// part of the state stays in a core's L1. Over rows again: the output's gate and norm.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/recurrent.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu_target.h"
#include "kernels/recurrent.h"
#include "kernels/thread_pool.h"
#include "torpor/error.h"

#ifndef TORPOR_KERNELS_RECURRENT_ONCE
#define TORPOR_KERNELS_RECURRENT_ONCE
namespace torpor::kernels {

/// Columns of a head's state that are a task's.
constexpr int kColumns = 64;
/// Of a head and a token: what S is multiplied by, and what is added with.
struct HeadStep {
  float decay, strength;  // g, beta; exp(A dt), dt
};

/// One task: columns [first, last) of head `head` through a sequence's tokens.
struct HeadPass {
  const RecurrentShape* shape;
  const RecurrentSequence* sequence;
  const float* mixed;     // [M, channels]
  const HeadStep* steps;  // [M, n_heads]
  int head, first, last;
  float skip;
  float* y;               // [M, output]
};

}  // namespace torpor::kernels
#endif

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
constexpr size_t kLanes = hn::MaxLanes(DF());

/// NaN for NaN, which x86's Min makes 88, and Highway's Exp 0.
template <class D, class V>
HWY_INLINE V Sigmoid(D d, V x) {
  const V e = hn::Exp(d, hn::Min(hn::Neg(x), hn::Set(d, 88.0f)));
  const V y = hn::Div(hn::Set(d, 1.0f), hn::Add(hn::Set(d, 1.0f), e));
  return hn::IfThenElse(hn::IsNaN(x), x, y);
}

/// y = op(x, z) element by element. The last few pass through a full vector: an element's bits don't depend on where
/// it stands.
template <class Op>
HWY_INLINE void Map(const float* x, const float* z, size_t n, float* y, const Op& op) {
  const DF d;
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(op(d, hn::LoadU(d, x + i), hn::LoadU(d, z + i)), d, y + i);
  if (i == n) return;
  HWY_ALIGN float a[kLanes] = {}, b[kLanes] = {};
  std::memcpy(a, x + i, (n - i) * sizeof(float));
  std::memcpy(b, z + i, (n - i) * sizeof(float));
  hn::Store(op(d, hn::Load(d, a), hn::Load(d, b)), d, a);
  std::memcpy(y + i, a, (n - i) * sizeof(float));
}

void GateRow(const float* x, const float* gates, size_t n, float* y) {
  Map(x, gates, n, y, [](DF d, auto value, auto g) HWY_ATTR { return hn::Mul(value, Sigmoid(d, g)); });
}

/// y = x · silu(z)
void SiluRow(const float* x, const float* z, size_t n, float* y) {
  Map(x, z, n, y, [](DF d, auto value, auto g) HWY_ATTR { return hn::Mul(value, hn::Mul(g, Sigmoid(d, g))); });
}

/// y = Σ taps[t] ⊙ inputs[t] + bias, oldest first; then silu if asked.
void ConvolveRow(const float* const* inputs, int n_taps, const float* taps, const float* bias, size_t n, bool silu,
                 float* y) {
  const auto sum = [&](auto d, size_t i) HWY_ATTR {
    auto acc = bias != nullptr ? hn::LoadU(d, bias + i) : hn::Zero(d);
    for (int t = 0; t < n_taps; ++t) {
      acc = hn::MulAdd(hn::LoadU(d, taps + size_t(t) * n + i), hn::LoadU(d, inputs[t] + i), acc);
    }
    hn::StoreU(acc, d, y + i);
  };
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum(DF(), i);
  for (; i < n; ++i) sum(hn::CappedTag<float, 1>(), i);
  if (silu) Map(y, y, n, y, [](DF d, auto value, auto) HWY_ATTR { return hn::Mul(value, Sigmoid(d, value)); });
}

/// NV vectors of columns of one head, from `src` to `dst`, both [key_dim, value_dim].
template <class D, int NV, bool kDelta>
HWY_INLINE void StepColumns(D d, const float* HWY_RESTRICT k, const float* HWY_RESTRICT q, const float* v,
                            HeadStep step, float skip, int key_dim, size_t stride, const float* src, float* dst,
                            float* y) {
  constexpr size_t kWidth = hn::MaxLanes(D());
  using V = hn::Vec<D>;
  const V decay = hn::Set(d, step.decay), strength = hn::Set(d, step.strength);
  V added[NV], out[NV];
  for (int n = 0; n < NV; ++n) out[n] = hn::Zero(d);
  if constexpr (kDelta) {
    for (int i = 0; i < key_dim; ++i) {
      const V key = hn::Set(d, k[i]);
      for (int n = 0; n < NV; ++n) {
        out[n] = hn::MulAdd(hn::Mul(hn::LoadU(d, src + i * stride + n * kWidth), decay), key, out[n]);
      }
    }
  }
  for (int n = 0; n < NV; ++n) {
    const V value = hn::LoadU(d, v + n * kWidth);
    added[n] = hn::Mul(kDelta ? hn::Sub(value, out[n]) : value, strength);
    out[n] = kDelta ? hn::Zero(d) : hn::Mul(value, hn::Set(d, skip));
  }
  for (int i = 0; i < key_dim; ++i) {
    const V key = hn::Set(d, k[i]), query = hn::Set(d, q[i]);
    for (int n = 0; n < NV; ++n) {
      const V s = hn::MulAdd(key, added[n], hn::Mul(hn::LoadU(d, src + i * stride + n * kWidth), decay));
      hn::StoreU(s, d, dst + i * stride + n * kWidth);
      out[n] = hn::MulAdd(s, query, out[n]);
    }
  }
  for (int n = 0; n < NV; ++n) hn::StoreU(out[n], d, y + n * kWidth);
}

template <bool kDelta>
HWY_INLINE void RunHeadOf(const HeadPass& p) {
  const RecurrentShape& s = *p.shape;
  const size_t channels = size_t(s.channels()), output = size_t(s.output()), stride = size_t(s.value_dim);
  const size_t group = size_t(p.head / (s.n_heads / s.n_groups)) * size_t(s.key_dim);
  const size_t keys = size_t(s.n_groups) * size_t(s.key_dim), values = size_t(p.head) * stride;
  const size_t own = s.tail() + size_t(p.head) * size_t(s.key_dim) * stride;
  float* const next = p.sequence->next + own;
  const float* src = next;
  if (p.sequence->state != nullptr) {
    src = p.sequence->state + own;
  } else {
    for (int i = 0; i < s.key_dim; ++i) std::fill(next + i * stride + p.first, next + i * stride + p.last, 0.0f);
  }
  for (int t = 0; t < p.sequence->n; ++t, src = next) {
    const size_t row = size_t(p.sequence->row + t);
    const float* mixed = p.mixed + row * channels;
    // q, k, v; or x, B, C, where B is the key and C the query.
    const float* q = mixed + (kDelta ? group : output + keys + group);
    const float* k = mixed + (kDelta ? keys + group : output + group);
    const float* v = mixed + (kDelta ? 2 * keys : 0) + values;
    float* y = p.y + row * output + size_t(s.place(p.head)) * stride;
    const HeadStep step = p.steps[row * size_t(s.n_heads) + size_t(p.head)];
    int column = p.first;
    const auto columns = [&]<class D, int NV>(D d, std::integral_constant<int, NV>) HWY_ATTR {
      constexpr int kWidth = NV * int(hn::MaxLanes(D()));
      for (; column + kWidth <= p.last; column += kWidth) {
        StepColumns<D, NV, kDelta>(d, k, q, v + column, step, p.skip, s.key_dim, stride, src + column, next + column,
                                   y + column);
      }
    };
    constexpr int kMost = std::min(8, std::max(1, kColumns / int(kLanes)));
    columns(DF(), std::integral_constant<int, kMost>());
    if constexpr (kMost > 1) columns(DF(), std::integral_constant<int, 1>());
    columns(hn::CappedTag<float, 1>(), std::integral_constant<int, 1>());
  }
}

void RunHead(const HeadPass& p) {
  p.shape->kind == Recurrence::kGatedDelta ? RunHeadOf<true>(p) : RunHeadOf<false>(p);
}

/// y = x · weight / sqrt(mean(x²) + eps), of `size` features; no weight: of ones.
void NormRow(const float* x, int size, const float* weight, float eps, float scale, float* y) {
  float sum = 0;
  for (int i = 0; i < size; ++i) sum += x[i] * x[i];
  const float factor = scale / std::sqrt(sum / float(size) + eps);
  for (int i = 0; i < size; ++i) y[i] = x[i] * factor * (weight != nullptr ? weight[i] : 1.0f);
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace torpor::kernels {

HWY_EXPORT(GateRow);
HWY_EXPORT(SiluRow);
HWY_EXPORT(ConvolveRow);
HWY_EXPORT(RunHead);
HWY_EXPORT(NormRow);

namespace {

/// body(first, last) over [0, m), in pieces worth waking a worker for where a row is `width` floats.
template <class Body>
void over_rows(int m, int width, const Body& body) {
  const int rows = std::max(1, 8 * 1024 / std::max(1, width)), tasks = (m + rows - 1) / rows;
  if (tasks <= 1) return body(0, m);
  ThreadPool::shared().parallel_for(size_t(tasks), [&](size_t task, int) {
    body(int(task) * rows, std::min(m, int(task + 1) * rows));
  });
}

float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x))); }
float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

void check(const Recurrent& w) {
  const RecurrentShape& s = w.shape;
  const size_t channels = size_t(s.channels()), heads = size_t(s.n_heads);
  const bool delta = s.kind == Recurrence::kGatedDelta, mamba = s.kind == Recurrence::kMamba2;
  const auto heads_fit = [&] {
    return s.n_groups > 0 && s.n_heads % s.n_groups == 0 && s.key_dim > 0 && w.log_decay.size() == heads &&
           w.step_bias.size() == heads && w.skip.size() == (mamba ? heads : 0) && s.norm.size > 0 &&
           s.output() % s.norm.size == 0 && w.norm.size() == size_t(delta ? s.value_dim : s.output()) &&
           (!delta || s.norm.size == s.value_dim);
  };
  const bool fits = s.taps > 1 && s.value_dim > 0 && w.conv.size() == size_t(s.taps) * channels &&
                    (w.conv_bias.empty() || w.conv_bias.size() == channels) && (delta || mamba) == (s.n_heads > 0) &&
                    (s.n_heads == 0 || heads_fit());
  if (!fits) throw Error(ErrorCode::kInvalidArgument, "A recurrent layer's weights don't fit its shape.");
}

/// Memory of the calling thread's, kept between calls.
struct Scratch {
  std::vector<float> tails, inputs, mixed;
  std::vector<HeadStep> steps;
};
Scratch& scratch_of_this_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

class Layer {
 public:
  Layer(const float* given, int m, const Recurrent& w, std::span<const RecurrentSequence> sequences, float* y)
      : given_(given), m_(m), w_(w), shape_(w.shape), sequences_(sequences), y_(y),
        channels_(size_t(shape_.channels())), delta_(shape_.kind == Recurrence::kGatedDelta),
        short_(shape_.kind == Recurrence::kShortConv),
        scratch_(scratch_of_this_thread()) {}

  void run() {
    scratch_.mixed.resize(size_t(m_) * channels_);
    scratch_.steps.resize(size_t(m_) * size_t(shape_.n_heads));
    if (short_) multiply_inputs();
    convolve();
    if (short_) return;
    run_heads();
    over_rows(m_, shape_.output(), [&](int first, int last) {
      for (int row = first; row < last; ++row) finish(size_t(row));
    });
  }

 private:
  const float* row_of(size_t row) const { return given_ + row * size_t(shape_.given()); }
  /// What row `row` gives the convolution.
  const float* input(size_t row) const {
    if (short_) return scratch_.inputs.data() + row * channels_;
    return row_of(row) + (delta_ ? 0 : shape_.output());
  }
  const float* gates(size_t row) const { return row_of(row) + (delta_ ? channels_ : 0); }

  /// B ⊙ x
  void multiply_inputs() {
    scratch_.inputs.resize(size_t(m_) * channels_);
    over_rows(m_, int(channels_), [&](int first, int last) {
      for (int row = first; row < last; ++row) {
        const float *b = row_of(size_t(row)), *x = b + 2 * channels_;
        float* to = scratch_.inputs.data() + size_t(row) * channels_;
        for (size_t i = 0; i < channels_; ++i) to[i] = b[i] * x[i];
      }
    });
  }

  void convolve() {
    const size_t kept = size_t(shape_.taps - 1), tail = shape_.tail();
    // Of all sequences, before any is overwritten: `next` may be `state`.
    scratch_.tails.assign(sequences_.size() * tail, 0.0f);
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const RecurrentSequence& s = sequences_[i];
      float* const own = scratch_.tails.data() + i * tail;
      if (s.state != nullptr) std::copy(s.state, s.state + tail, own);
      for (size_t t = 0; t < kept; ++t) {
        const float* from = at(own, s, int(t) + s.n - int(kept));
        std::copy(from, from + channels_, s.next + t * channels_);
      }
      over_rows(s.n, int(channels_), [&](int first, int last) {
        std::vector<const float*> inputs(kept + 1);
        for (int t = first; t < last; ++t) {
          for (size_t tap = 0; tap <= kept; ++tap) inputs[tap] = at(own, s, t + int(tap) - int(kept));
          mix(size_t(s.row + t), inputs);
        }
      });
    }
  }
  /// The convolution's input of token `t` of a sequence; of those before it, in its tail.
  const float* at(const float* tail, const RecurrentSequence& s, int t) const {
    return t < 0 ? tail + size_t(t + shape_.taps - 1) * channels_ : input(size_t(s.row + t));
  }

  /// A row's convolution, and what heads need of it.
  void mix(size_t row, const std::vector<const float*>& inputs) {
    float* const mixed = scratch_.mixed.data() + row * channels_;
    const float* bias = w_.conv_bias.empty() ? nullptr : w_.conv_bias.data();
    HWY_DYNAMIC_DISPATCH(ConvolveRow)(inputs.data(), shape_.taps, w_.conv.data(), bias, channels_, !short_, mixed);
    if (short_) {
      const float* c = row_of(row) + channels_;
      for (size_t i = 0; i < channels_; ++i) y_[row * channels_ + i] = c[i] * mixed[i];
      return;
    }
    const size_t heads = size_t(shape_.n_heads);
    HeadStep* const steps = scratch_.steps.data() + row * heads;
    const float* scalars = row_of(row) + channels_ + size_t(shape_.output());
    if (!delta_) {
      for (size_t h = 0; h < heads; ++h) {
        const float dt = std::clamp(softplus(scalars[h] + w_.step_bias[h]), shape_.min_step, shape_.max_step);
        steps[h] = {std::exp(-std::exp(w_.log_decay[h]) * dt), dt};
      }
      return;
    }
    for (size_t h = 0; h < heads; ++h) {
      const float step = softplus(scalars[heads + h] + w_.step_bias[h]);
      steps[h] = {std::exp(-std::exp(w_.log_decay[h]) * step), sigmoid(scalars[h])};
    }
    // Queries and keys of unit length; queries over the root of their size, too.
    const int dim = shape_.key_dim;
    const float inverse = 1 / float(dim), root = std::sqrt(inverse);
    for (int part = 0; part < 2 * shape_.n_groups; ++part) {
      float* const head = mixed + size_t(part) * size_t(dim);
      HWY_DYNAMIC_DISPATCH(NormRow)(head, dim, nullptr, 1e-6f * inverse, part < shape_.n_groups ? inverse : root, head);
    }
  }

  void run_heads() {
    const int blocks = (shape_.value_dim + kColumns - 1) / kColumns;
    const size_t of_sequence = size_t(shape_.n_heads) * size_t(blocks);
    ThreadPool::shared().parallel_for(sequences_.size() * of_sequence, [&](size_t task, int) {
      const int head = int(task % of_sequence) / blocks, first = int(task % of_sequence) % blocks * kColumns;
      HWY_DYNAMIC_DISPATCH(RunHead)({.shape = &shape_, .sequence = &sequences_[task / of_sequence],
                                     .mixed = scratch_.mixed.data(), .steps = scratch_.steps.data(), .head = head,
                                     .first = first, .last = std::min(shape_.value_dim, first + kColumns),
                                     .skip = delta_ ? 0 : w_.skip[size_t(head)], .y = y_});
    });
  }

  void finish(size_t row) {
    const int output = shape_.output();
    const OutputNorm& norm = shape_.norm;
    float* const y = y_ + row * size_t(output);
    if (norm.gate_before) HWY_DYNAMIC_DISPATCH(SiluRow)(y, gates(row), size_t(output), y);
    for (int at = 0; at < output; at += norm.size) {
      const float* weight = w_.norm.data() + (int(w_.norm.size()) == output ? at : 0);
      HWY_DYNAMIC_DISPATCH(NormRow)(y + at, norm.size, weight, norm.eps, 1, y + at);
    }
    if (!norm.gate_before) HWY_DYNAMIC_DISPATCH(SiluRow)(y, gates(row), size_t(output), y);
  }

  const float* const given_;
  const int m_;
  const Recurrent& w_;
  const RecurrentShape& shape_;
  const std::span<const RecurrentSequence> sequences_;
  float* const y_;
  const size_t channels_;
  const bool delta_, short_;
  Scratch& scratch_;  // of the thread that began: workers write into it, too
};

}  // namespace

void recurrent(const float* given, int m, const Recurrent& w, std::span<const RecurrentSequence> sequences, float* y) {
  ensure_cpu_target();
  check(w);
  if (m > 0) Layer(given, m, w, sequences, y).run();
}

void gate(const float* x, const float* gates, size_t n, float* y) {
  ensure_cpu_target();
  constexpr size_t kPiece = 16 * 1024;
  const size_t tasks = (n + kPiece - 1) / kPiece;
  const auto piece = [&](size_t task, int) {
    const size_t first = task * kPiece;
    HWY_DYNAMIC_DISPATCH(GateRow)(x + first, gates + first, std::min(kPiece, n - first), y + first);
  };
  if (tasks == 1) return piece(0, 0);
  ThreadPool::shared().parallel_for(tasks, piece);
}

}  // namespace torpor::kernels
#endif  // HWY_ONCE
