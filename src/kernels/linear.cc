// x · Wᵀ on packed weights. A row's bits depend on that row alone: whatever M, the tile or the thread, an output is the
// same chains of multiply-adds over k, in order:
//
//   float weights:      sum = fma(x[k], w[k], sum);
//   quantized weights:  per group dot = fma(x[k], q[k], dot); sum = fma(dot, scale, sum); sum = fma(Σ x of the group, bias, sum);
//
// then its additive bias and its residual. The q's are read in place as q * 2^s (masked, not shifted) and meet x * 2^-s.
// Prepare() makes rows so, with the groups' sums in their places: a group of 32 is 33 columns.
//
// With Activations::kInt16, rows meet quantized weights as 16-bit integers with a scale per group, and
//
//   dot = Σ x16[k] * q[k] of the group, exact;  sum = fma(dot, scale * x_scale, sum);  sum = fma(x_scale * Σ x16, bias, sum).

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/linear.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <span>
#include <type_traits>

#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/packed_layout.h"
#include "kernels/reading_order.h"
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
/// Words of these; or of twice as many as pairs of 16-bit integers, or four times as many as bytes; with the scales and biases
/// of groups of 16 or more.
inline constexpr int kBlockWords = (kBlockK + 8 * kBlockK / 16) * kPanel;

/// A worker's own memory.
struct LinearScratch {
  alignas(64) float weights[kBlockWords];
  alignas(64) float sums[2 * kBlockRows * kPanel];
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

/// The largest magnitude of a 16-bit value.
inline constexpr float kLargest16 = 32767;
/// 32-bit words of a row of 16-bit values: per group half as many as columns, then x_scale and x_scale * Σ x16.
inline size_t int16_row_words(const PackedPart& part, int k) { return size_t(k) / 2 + size_t(k) / size_t(part.group) * 2; }

/// Words of `columns` of an unpacked panel: pairs, and per group its scales and biases.
inline size_t int16_panel_words(const PackedPart& part, int columns) {
  return size_t(columns / 2 + columns / part.group * 2) * kPanel;
}

/// Rows of a tile of bytes (AMX's, or of Arm's dot products); AMX's columns; panels that rows meet at once, while both
/// are in a core's L1.
inline constexpr int kByteTileRows = 16, kAmxColumns = 64, kByteTilePanels = 2;
/// Bytes of a group of 16 prepared rows: high bytes, low bytes, scales and sums.
inline size_t byte_tile_group_bytes(int group) { return kByteTileRows * (2 * size_t(group) + 2 * sizeof(float)); }

/// Elements from one prepared row to the next.
inline size_t row_stride(const PackedPart& part, int k, const float*) { return size_t(prepared_columns(part, k)); }
inline size_t row_stride(const PackedPart& part, int k, const int32_t*) { return int16_row_words(part, k); }
/// Of rows in blocks of kByteTileRows this is a share of the block.
inline size_t row_stride(const PackedPart& part, int k, const uint8_t*) {
  return size_t(k / part.group) * byte_tile_group_bytes(part.group) / kByteTileRows;
}

/// Rows that meet the weights of a panel while those are in registers, at most.
inline constexpr int kTogether = 8;
/// Few rows, in groups of at most kTogether whose sizes differ by one at most.
struct RowGroups {
  int rows;
  int count = (rows + kTogether - 1) / kTogether;
  int begin(int group) const { return group * rows / count; }
  int of(int row) const { return ((row + 1) * count - 1) / rows; }
  int most() const { return (rows + count - 1) / count; }
};

/// Few prepared rows, `words` 32-bit words each, as kernels read them. Of each group: the first words of all rows, the
/// second, and so on.
template <class T>
const T* interleave(const T* rows, int n, size_t words, T* out) {
  if (n == 1) return rows;
  const RowGroups groups{n};
  for (int g = 0; g < groups.count; ++g) {
    const size_t begin = size_t(groups.begin(g)), size = size_t(groups.begin(g + 1)) - begin;
    const T* from = rows + begin * words;
    T* to = out + begin * words;
    for (size_t i = 0; i < words; ++i) {
      for (size_t r = 0; r < size; ++r) to[i * size + r] = from[r * words + i];
    }
  }
  return out;
}

/// The calling thread's.
inline ReadingOrder& reading_order() {
  static thread_local std::unique_ptr<ReadingOrder> order = std::make_unique<ReadingOrder>();
  return *order;
}

/// Rows that one task prepares: few rows are done sooner than another thread is awake.
inline int rows_per_task(int rows, int threads) { return rows <= 16 ? rows : std::clamp(rows / (4 * threads), 1, 16); }

}  // namespace torpor::kernels
#endif

#include "kernels/linear_f32-inl.h"
#include "kernels/linear_int16-inl.h"
#include "kernels/weight_formats-inl.h"
#include "kernels/linear_bytes-inl.h"
#include "kernels/linear_amx-inl.h"
#include "kernels/linear_dot-inl.h"

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

// sums of a gated panel become its outputs; of two, `stride` floats apart, the first's become those of both.
HWY_INLINE void Gate(Activation activation, int panels, size_t stride, float* HWY_RESTRICT sums) {
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kLanes == kPanel) {
    if (panels == 2) {
      const DF d;
      const hn::Half<DF> half;
      const auto both = [&](int i) HWY_ATTR {
        return hn::Combine(d, hn::Load(half, sums + stride + i), hn::Load(half, sums + i));
      };
      const VF gate = both(0), up = both(kGatedPanel);
      return hn::Store(hn::Mul(Activate(d, activation, gate), up), d, sums);
    }
  }
#endif
  const hn::CappedTag<float, kGatedPanel> d;
  for (int i = 0; i < kGatedPanel; i += int(hn::MaxLanes(d))) {
    const auto gate = hn::Load(d, sums + i), up = hn::Load(d, sums + kGatedPanel + i);
    hn::Store(hn::Mul(Activate(d, activation, gate), up), d, sums + i);
  }
}
// Gated panels that Gate() takes at once: their outputs fill a vector.
constexpr int kGatesAtOnce = kLanes == kPanel ? 2 : 1;

// The outputs of one panel (of `part`) in row `row` from its 16 sums, or of kGatesAtOnce gated ones.
HWY_INLINE void Finish(const LinearCall& call, const PackedPart& part, int panel, int panels, size_t stride, int row,
                       float* HWY_RESTRICT sums) {
  const DF d;
  if (part.bias.data() != nullptr) {
    const float* bias = part.bias.data() + size_t(panel) * kPanel;
    for (int p = 0; p < panels; ++p) {
      for (int i = 0; i < kPanel; i += kLanes) {
        float* at = sums + size_t(p) * stride + i;
        hn::Store(hn::Add(hn::Load(d, at), hn::Load(d, bias + p * kPanel + i)), d, at);
      }
    }
  }
  if (call.w->gated) Gate(call.activation, panels, stride, sums);
  const int width = call.w->gated ? kGatedPanel : kPanel;
  const int column = panel * width, count = std::min(panels * width, part.n - column);
  const size_t at = size_t(row) * call.w->n + part.first + column;
  const float* residual = call.residual == nullptr ? nullptr : call.residual + at;
  float* y = call.y + at;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const VF sum = hn::Load(d, sums + i);
    hn::StoreU(residual == nullptr ? sum : hn::Add(sum, hn::LoadU(d, residual + i)), d, y + i);
  }
  for (; i < count; ++i) y[i] = residual == nullptr ? sums[i] : sums[i] + residual[i];
}

// `count` panels from `panel` on for `rows` rows; sums [count], `stride` floats apart, of [rows][16].
void FinishPanels(const LinearCall& call, const PackedPart& part, int panel, int count, size_t stride, int row, int rows,
                  float* sums) {
  const int at_once = call.w->gated ? kGatesAtOnce : 1;
  for (int p = 0; p < count; p += at_once) {
    const int panels = std::min(at_once, count - p);
    for (int r = 0; r < rows; ++r) {
      Finish(call, part, panel + p, panels, stride, row + r, sums + size_t(p) * stride + size_t(r) * kPanel);
    }
  }
}

// ---- Few rows: all of them meet the weights of a panel while those are in registers ----

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
  const std::span<const std::byte> weights{part.data.get(), part.panel_bytes * size_t(part.panels)};
  pool.parallel_ends((part.panels + size - 1) / size, std::ref(body), reading_order().next(weights));
}

// `rows` rows, the first of which is row `row` of the call; kRows of them in the largest group. Group after group meets
// columns of the panels while those are in a core's L1.
template <int kRows, class X>
void RunFew(ThreadPool& pool, const LinearCall& call, const PackedPart& part, const X* x, int row, int rows) {
  const RowGroups groups{rows};
  if constexpr (kRows > 1) {
    if (groups.most() < kRows) return RunFew<kRows - 1>(pool, call, part, x, row, rows);
  }
  auto run = [&]<int kPanels>(int panel, int ahead) HWY_ATTR {
    float* sums = linear_scratch().sums;
    GroupsOfRows<kRows, kPanels>(part, part.panel(panel), part.panel(ahead), call.w->k, x, groups, sums);
    for (int g = 0; g < groups.count; ++g) {
      const int begin = groups.begin(g), size = groups.begin(g + 1) - begin;
      FinishPanels(call, part, panel, kPanels, size_t(size) * kPanel, row + begin, size, sums + begin * kPanels * kPanel);
    }
  };
  EachPanels<PanelsAtOnce(kRows)>(pool, part, run);
}

#if TORPOR_HAVE_VNNI
// The same for at most kRows rows as bytes.
template <int kRows>
void RunBytes(ThreadPool& pool, const LinearCall& call, const PackedPart& part, const int32_t* x, int row, int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return RunBytes<kRows - 1>(pool, call, part, x, row, rows);
  }
  auto run = [&]<int kPanels>(int panel, int ahead) HWY_ATTR {
    HWY_ALIGN float sums[kPanels * kRows * kPanel];
    ByteVector<kRows, kPanels>(part, part.panel(panel), part.panel(ahead), call.w->k, x, sums);
    FinishPanels(call, part, panel, kPanels, kRows * kPanel, row, kRows, sums);
  };
  EachPanels<BytePanelsAtOnce(kRows)>(pool, part, run);
}
#endif

// ---- Many rows ----

// Panels [first, last) of a part for `rows` prepared rows, the first of which is row `row` of the call.
void RunBlock(const LinearCall& call, const PackedPart& part, const float* x, int first, int last, int row, int rows) {
  LinearScratch& scratch = linear_scratch();
  const int k = call.w->k, step = BlockStep(part, k, kBlockK / kTilePanels);
  FloatBlock block{.stride = size_t(prepared_columns(part, k)), .group = part.group};
  for (int panel = first; panel < last; panel += kTilePanels) {
    const int count = std::min(kTilePanels, last - panel);
    for (int k0 = 0; k0 < k; k0 += step) {
      const int k1 = std::min(k, k0 + step);
      for (int p = 0; p < count; ++p) {
        float* to = scratch.weights + p * kBlockWords / kTilePanels;
        block.panels[p] = AnyPanelAsFloats(part, part.panel(panel + p), k0, k1, to);
      }
      block.k = k1 - k0;
      block.first = k0 == 0;
      const float* from = x + prepared_columns(part, k0);
      if (part.group > 0) {
        Tiles<true>(block, count, from, rows, scratch.sums);
      } else {
        Tiles<false>(block, count, from, rows, scratch.sums);
      }
    }
    FinishPanels(call, part, panel, count, kBlockRows * kPanel, row, rows, scratch.sums);
  }
}

void RunBlock(const LinearCall& call, const PackedPart& part, const int32_t* x, int first, int last, int row, int rows) {
  LinearScratch& scratch = linear_scratch();
  auto* unpacked = reinterpret_cast<int32_t*>(scratch.weights);
  const int k = call.w->k;
  // A word is two columns.
  const int step = BlockStep(part, k, 2 * kBlockK / kTilePanels);
  PairBlock block{.panels = unpacked, .panel_words = int16_panel_words(part, step), .stride = int16_row_words(part, k),
                  .pairs = part.group / 2};
  for (int panel = first; panel < last; panel += kTilePanels) {
    const int count = std::min(kTilePanels, last - panel);
    for (int k0 = 0; k0 < k; k0 += step) {
      const int k1 = std::min(k, k0 + step);
      for (int p = 0; p < count; ++p) {
        UnpackAnyPairs(part, part.panel(panel + p), k0, k1, unpacked + p * block.panel_words);
      }
      block.groups = (k1 - k0) / part.group;
      block.first = k0 == 0;
      const int32_t* from = x + int16_row_words(part, k0);
      if (count == kTilePanels) {
        PairTiles<kTileRows, kTilePanels>(block, from, rows, scratch.sums);
      } else {
        PairTiles<kTileRows, 1>(block, from, rows, scratch.sums);
      }
    }
    FinishPanels(call, part, panel, count, kBlockRows * kPanel, row, rows, scratch.sums);
  }
}

#if TORPOR_HAVE_VNNI || TORPOR_HAVE_DOT
void RunBlock(const LinearCall& call, const PackedPart& part, const uint8_t* x, int first, int last, int row, int rows) {
  LinearScratch& scratch = linear_scratch();
  auto* unpacked = reinterpret_cast<uint32_t*>(scratch.weights);
#if TORPOR_HAVE_VNNI
  const AmxTiles tiles(part.group);
#elif TORPOR_HAVE_I8MM
  const bool matrices = matrix_products_in_use();
#endif
  const int k = call.w->k;
  // A word is four columns.
  const int step = BlockStep(part, k, 4 * kBlockK / kByteTilePanels);
  const size_t panel_words = size_t(step / 4 + step / part.group * 2) * kPanel;
  const size_t block = row_stride(part, k, x) * kByteTileRows;
  for (int panel = first; panel < last; panel += kByteTilePanels) {
    const int count = std::min(kByteTilePanels, last - panel);
    for (int k0 = 0; k0 < k; k0 += step) {
      const int k1 = std::min(k, k0 + step);
      const int groups = (k1 - k0) / part.group;
      for (int p = 0; p < count; ++p) {
        UnpackBytes(part, part.panel(panel + p), k0, k1, unpacked + p * panel_words);
#if TORPOR_HAVE_I8MM
        if (matrices) PairOutputs(part.group, groups, unpacked + p * panel_words);
#endif
      }
      const uint8_t* from = x + size_t(k0 / part.group) * byte_tile_group_bytes(part.group);
      for (int r = 0; r < rows; r += kByteTileRows, from += block) {
        for (int p = 0; p < count; ++p) {
          const uint32_t* weights = unpacked + p * panel_words;
          float* sums = scratch.sums + (p * kBlockRows + r) * kPanel;
#if TORPOR_HAVE_VNNI
          AmxTile(part.group, from, weights, groups, k0 == 0, sums);
#else
#if TORPOR_HAVE_I8MM
          if (matrices) {
            DotTile<true>(part.group, from, weights, groups, k0 == 0, sums);
            continue;
          }
#endif
          DotTile<false>(part.group, from, weights, groups, k0 == 0, sums);
#endif
        }
      }
    }
    FinishPanels(call, part, panel, count, kBlockRows * kPanel, row, rows, scratch.sums);
  }
}
#endif

// All panels of a part for `rows` prepared rows, the first of which is row `row` of the call.
template <class X>
void RunRows(ThreadPool& pool, const LinearCall& call, const PackedPart& part, const X* x, int row, int rows) {
  if constexpr (!std::is_same_v<X, uint8_t>) {
    if (few_rows<X>(part, rows)) return RunFew<kTogether>(pool, call, part, x, row, rows);
  }
  // Pairs of panels, for a gated panel's outputs fill half a cache line.
  const int tile = std::is_same_v<X, uint8_t> ? kByteTileRows : kTileRows;
  const LinearTask size = linear_task(part.panels, 2, rows, tile, pool.size());
  const int stretches = (part.panels + size.panels - 1) / size.panels, pieces = (rows + size.rows - 1) / size.rows;
  auto body = [&](size_t task, int) {
    const int first = int(task) % stretches * size.panels, last = std::min(part.panels, first + size.panels);
    const int begin = int(task) / stretches * size.rows, count = std::min(size.rows, rows - begin);
    RunBlock(call, part, x + size_t(begin) * row_stride(part, call.w->k, x), first, last, row + begin, count);
  };
  pool.parallel_for(size_t(stretches * pieces), std::ref(body));
}

void Linear(const LinearCall& call) {
  ThreadPool& pool = ThreadPool::shared();
  for (const PackedPart& part : call.w->parts) {
    for (int row = 0; row < call.m; row += kBlockRows) {
      const int rows = std::min(kBlockRows, call.m - row);
      const float* given = call.x + size_t(row) * call.w->k;
      if (call.w->activations == Activations::kInt16 && part.integers()) {
#if TORPOR_HAVE_VNNI
        if (meets_bytes(part, rows)) {
          RunBytes<kByteRows>(pool, call, part, PrepareFewBytes(pool, part, call.w->k, given, rows), row, rows);
          continue;
        }
#endif
#if TORPOR_HAVE_VNNI || TORPOR_HAVE_DOT
        if (rows > kTogether && byte_tiles_in_use()) {
          RunRows(pool, call, part, PrepareBytes(pool, part, call.w->k, given, rows), row, rows);
          continue;
        }
#endif
        RunRows(pool, call, part, PrepareInt16(pool, part, call.w->k, given, rows), row, rows);
      } else {
        RunRows(pool, call, part, Prepare(pool, part, call.w->k, given, rows), row, rows);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

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
