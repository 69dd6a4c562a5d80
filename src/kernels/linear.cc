// x · Wᵀ on packed weights. A row's bits depend on that row alone: whatever M, the tile or the thread, an output is the
// same chains of multiply-adds over k, in order:
//
//   float weights:      sum = fma(x[k], w[k], sum);
//   quantized weights:  per group dot = fma(x[k], q[k], dot); sum = fma(dot, scale, sum); sum = fma(Σ x of the group, bias, sum);
//
// then its additive bias and its residual. The q's are read in place as q * 2^s (masked, not shifted) and meet x * 2^-s.
// Prepare() makes rows so, with the groups' sums in their places: a group of 32 is 33 columns.
//
// With Activations::kInt8, rows meet quantized weights as 8-bit integers with a scale per 32 columns, and
//
//   dot = Σ x8[k] * q[k] of the 32, exact;  sum = fma(dot, scale * x_scale, sum);  sum = fma(x_scale * Σ x8, bias, sum).

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/linear.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "kernels/compute.h"
#include "kernels/packed_layout.h"
#include "kernels/thread_pool.h"

#ifndef TORPOR_KERNELS_LINEAR_ONCE
#define TORPOR_KERNELS_LINEAR_ONCE
namespace torpor::kernels {

/// One call, as every target's kernel takes it.
struct LinearCall {
  const float* x;
  int m;
  const PackedLinear::Impl* w;
  const float* residual;  // or nullptr
  float* y;
  Activation activation;  // of a gated weight
};

/// Rows that are prepared and multiplied at once, at most: few enough that kBlockK columns of them stay in a core's L2 from
/// panel to panel, and most of them whole tiles.
inline constexpr int kBlockRows = 144;
/// Columns of a panel that are unpacked at once: 16 KiB of f32, half of a usual L1.
inline constexpr int kBlockK = 256;

/// A worker's own memory.
struct LinearScratch {
  alignas(64) float weights[(kBlockK + 2 * kBlockK / 32) * kPanel];
  alignas(64) float sums[kBlockRows * kPanel];
};
inline LinearScratch& linear_scratch() {
  static thread_local std::unique_ptr<LinearScratch> scratch = std::make_unique<LinearScratch>();
  return *scratch;
}

/// Memory of the calling thread's for prepared rows, kept between calls.
inline float* prepared_memory(size_t size) {
  static thread_local AlignedBuffer<float> memory;
  if (memory.size() < size) memory = AlignedBuffer<float>(size);
  return memory.data();
}

/// Columns of a part's prepared rows that stand for [0, k): a quantized group has one more, its sum.
inline int prepared_columns(const PackedPart& part, int k) { return part.group > 0 ? k + k / part.group : k; }

/// Columns of an 8-bit row that share a scale, and the bytes of such a row: [K] i8, then per block x_scale and
/// x_scale * Σ x8.
inline constexpr int kInt8Block = 32;
inline size_t int8_row_bytes(int k) { return size_t(k) + size_t(k) / kInt8Block * 2 * sizeof(float); }

/// Rows that one task prepares: few rows are done sooner than another thread is awake.
inline int rows_per_task(int rows, int threads) { return rows <= 16 ? rows : std::clamp(rows / (4 * threads), 1, 16); }

}  // namespace torpor::kernels
#endif

#include "kernels/linear_f32-inl.h"
#include "kernels/linear_int8-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ---- What happens to a finished sum ----

// Both activations are x * sigmoid(s), s = x or the polynomial whose sigmoid is GELU's tanh form.
template <class D, class V>
HWY_INLINE V Activate(D d, Activation activation, V x) {
  V s = x;
  if (activation == Activation::kGeluTanh) {
    const V cubic = hn::MulAdd(hn::Mul(hn::Set(d, 0.044715f), hn::Mul(x, x)), x, x);
    s = hn::Mul(hn::Set(d, 1.5957691216057308f), cubic);  // 2 sqrt(2 / pi)
  }
  const V e = hn::Exp(d, hn::Min(hn::Neg(s), hn::Set(d, 88.0f)));
  return hn::Div(x, hn::Add(hn::Set(d, 1.0f), e));
}

// The outputs of `panel` (of `part`) in row `row`, from its 16 sums.
void Finish(const LinearCall& call, const PackedPart& part, int panel, int row, float* HWY_RESTRICT sums) {
  const DF d;
  if (part.bias.data() != nullptr) {
    const float* bias = part.bias.data() + size_t(panel) * kPanel;
    for (int i = 0; i < kPanel; i += kLanes) hn::Store(hn::Add(hn::Load(d, sums + i), hn::Load(d, bias + i)), d, sums + i);
  }
  int width = kPanel;
  if (call.w->gated) {
    width = kGatedPanel;
    const hn::CappedTag<float, kGatedPanel> dg;
    for (int i = 0; i < kGatedPanel; i += int(hn::MaxLanes(dg))) {
      const auto gate = hn::Load(dg, sums + i), up = hn::Load(dg, sums + kGatedPanel + i);
      hn::Store(hn::Mul(Activate(dg, call.activation, gate), up), dg, sums + i);
    }
  }
  const int column = panel * width, count = std::min(width, part.n - column);
  const size_t at = size_t(row) * call.w->n + part.first + column;
  float* y = call.y + at;
  if (call.residual != nullptr) {
    const float* residual = call.residual + at;
    if (count == kPanel) {
      for (int i = 0; i < kPanel; i += kLanes) {
        hn::StoreU(hn::Add(hn::Load(d, sums + i), hn::LoadU(d, residual + i)), d, y + i);
      }
    } else {
      for (int i = 0; i < count; ++i) y[i] = sums[i] + residual[i];
    }
  } else {
    std::memcpy(y, sums, size_t(count) * sizeof(float));
  }
}

// ---- Few rows: all of them meet the weights of a panel while those are in registers ----

constexpr int kFewRows = 8;

// run<n>(panel, ahead) for the panels of [panel, end): kPanels at once, the rest by halves. Those at `ahead` come next,
// and at the end those at `after`.
template <int kPanels, class F>
HWY_INLINE void EachPanels(int panel, int end, int after, const F& run) {
  for (; panel + kPanels <= end; panel += kPanels) {
    run.template operator()<kPanels>(panel, panel + kPanels < end ? panel + kPanels : after);
  }
  if constexpr (kPanels > 1) EachPanels<kPanels / 2>(panel, end, after, run);
}

// The same for all panels of a part, in tasks.
template <int kPanels, class F>
void EachPanels(ThreadPool& pool, const PackedPart& part, const F& run) {
  const int size = linear_task(part.panels, kPanels, 1, 1, pool.size()).panels;
  auto body = [&](int task, int next) HWY_ATTR {
    EachPanels<kPanels>(task * size, std::min(part.panels, (task + 1) * size), next * size, run);
  };
  pool.parallel_ends((part.panels + size - 1) / size, std::ref(body));
}

// `rows` rows, the first of which is row `row` of the call.
template <int kRows>
void RunFew(ThreadPool& pool, const LinearCall& call, const PackedPart& part, const float* x, int row, int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return RunFew<kRows - 1>(pool, call, part, x, row, rows);
  }
  const size_t stride = size_t(prepared_columns(part, call.w->k));
  auto run = [&]<int kPanels>(int panel, int ahead) HWY_ATTR {
    HWY_ALIGN float sums[kPanels * kRows * kPanel];
    Vector<kRows, kPanels>(part, part.panel(panel), part.panel(ahead), call.w->k, x, stride, sums);
    for (int i = 0; i < kPanels * kRows; ++i) Finish(call, part, panel + i / kRows, row + i % kRows, sums + i * kPanel);
  };
  EachPanels<PanelsAtOnce(kRows)>(pool, part, run);
}

void RunFewInt8(ThreadPool& pool, const LinearCall& call, const PackedPart& part, const int8_t* x, int row, int rows) {
  auto run = [&]<int>(int panel, int ahead) HWY_ATTR {
    HWY_ALIGN float sums[kFewRows * kPanel];
    Int8Panel(part, part.panel(panel), part.panel(ahead), call.w->k, x, rows, sums);
    for (int r = 0; r < rows; ++r) Finish(call, part, panel, row + r, sums + r * kPanel);
  };
  EachPanels<1>(pool, part, run);
}

// ---- Many rows ----

// Panels [first, last) of a part for `rows` prepared rows, the first of which is row `row` of the call.
void RunBlock(const LinearCall& call, const PackedPart& part, const float* x, int first, int last, int row, int rows) {
  LinearScratch& scratch = linear_scratch();
  const int k = call.w->k;
  const size_t stride = size_t(prepared_columns(part, k));
  // Equal steps of whole groups.
  const int steps = (k + kBlockK - 1) / kBlockK;
  int step = (k + steps - 1) / steps;
  if (part.group > 0) step = (step + part.group - 1) / part.group * part.group;
  for (int panel = first; panel < last; ++panel) {
    for (int k0 = 0; k0 < k; k0 += step) {
      const int k1 = std::min(k, k0 + step);
      const float* weights = PanelAsFloats(part, part.panel(panel), k0, k1, scratch.weights);
      const float* from = x + prepared_columns(part, k0);
      if (part.group > 0) {
        Tiles<true>(from, rows, stride, weights, k1 - k0, part.group, k0 == 0, scratch.sums);
      } else {
        Tiles<false>(from, rows, stride, weights, k1 - k0, 0, k0 == 0, scratch.sums);
      }
    }
    for (int r = 0; r < rows; ++r) Finish(call, part, panel, row + r, scratch.sums + r * kPanel);
  }
}

void RunInt8(const LinearCall& call, const PackedPart& part, const int8_t* x, int first, int last, int row, int rows) {
  float* sums = linear_scratch().sums;
  for (int panel = first; panel < last; ++panel) {
    Int8Panel(part, part.panel(panel), part.panel(panel + 1), call.w->k, x, rows, sums);
    for (int r = 0; r < rows; ++r) Finish(call, part, panel, row + r, sums + r * kPanel);
  }
}

void Linear(const LinearCall& call) {
  ThreadPool& pool = ThreadPool::shared();
  for (const PackedPart& part : call.w->parts) {
    for (int row = 0; row < call.m; row += kBlockRows) {
      const int rows = std::min(kBlockRows, call.m - row);
      const float* given = call.x + size_t(row) * call.w->k;
      const bool int8 = call.w->activations == Activations::kInt8 && part.type == Type::kAffine;
      const int8_t* x8 = int8 ? PrepareInt8(pool, call.w->k, given, rows) : nullptr;
      const float* x = int8 ? nullptr : Prepare(pool, part, call.w->k, given, rows);
      if (rows <= kFewRows && int8) {
        RunFewInt8(pool, call, part, x8, row, rows);
        continue;
      }
      if (rows == 1 || (rows <= kFewRows && part.type == Type::kAffine)) {
        RunFew<kFewRows>(pool, call, part, x, row, rows);
        continue;
      }
      // Pairs of panels, for a gated panel's outputs fill half a cache line.
      const LinearTask size = linear_task(part.panels, 2, rows, kTileRows, pool.size());
      const int stretches = (part.panels + size.panels - 1) / size.panels, pieces = (rows + size.rows - 1) / size.rows;
      auto body = [&](size_t task, int) {
        const int first = int(task) % stretches * size.panels, last = std::min(part.panels, first + size.panels);
        const int begin = int(task) / stretches * size.rows, count = std::min(size.rows, rows - begin);
        if (int8) {
          RunInt8(call, part, x8 + size_t(begin) * int8_row_bytes(call.w->k), first, last, row + begin, count);
        } else {
          const float* from = x + size_t(begin) * size_t(prepared_columns(part, call.w->k));
          RunBlock(call, part, from, first, last, row + begin, count);
        }
      };
      pool.parallel_for(size_t(stretches * pieces), std::ref(body));
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include "kernels/cpu_target.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

HWY_EXPORT(Linear);

}  // namespace

void linear(const float* x, int m, const PackedLinear& w, const float* residual, float* y) {
  if (w.impl().gated) throw Error(ErrorCode::kInvalidArgument, "A gated weight needs gated_linear.");
  if (m <= 0) return;
  ensure_cpu_target();
  HWY_DYNAMIC_DISPATCH(Linear)({x, m, &w.impl(), residual, y, Activation::kSilu});
}

void gated_linear(const float* x, int m, const PackedLinear& w, Activation activation, float* y) {
  if (!w.impl().gated) throw Error(ErrorCode::kInvalidArgument, "gated_linear needs a weight packed by pack_gated.");
  if (m <= 0) return;
  ensure_cpu_target();
  HWY_DYNAMIC_DISPATCH(Linear)({x, m, &w.impl(), nullptr, y, activation});
}

}  // namespace torpor::kernels

#endif  // HWY_ONCE
