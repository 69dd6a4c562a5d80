// x · Wᵀ on packed weights. A row's bits depend on that row alone: whatever M, the tile or the thread, an output is
//
//   float weights:      sum = fma(x[k], w[k], sum), k in order;
//   quantized weights:  per group in order  dot = fma(x[k], q[k], dot), k in order,
//                                           sum = fma(dot, scale, sum), sum = fma(bias, Σ x of the group, sum);
//
// then its additive bias and its residual. The q's are read in place as q * 2^s (masked, not shifted) and meet x * 2^-s:
// rows are prepared so once, in one way, by prepare_rows().

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/linear.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
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

/// Rows that are prepared and multiplied at once, at most.
inline constexpr int kBlockRows = 512;
/// Columns of a panel that are unpacked at once: 16 KiB of f32, half of a usual L1.
inline constexpr int kBlockK = 256;

/// A worker's own memory.
struct LinearScratch {
  alignas(64) float weights[kBlockK * kPanel];
  alignas(64) float scales[kBlockK / 32 * 2 * kPanel];  // per group: 16 scales, 16 biases
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

/// Rows of x as a part's kernels read them.
struct PreparedRows {
  const float* x = nullptr;     // [rows][stride]
  size_t stride = 0;
  const float* sums = nullptr;  // of quantized weights: [rows][groups], Σ x of each group
  int groups = 0;
};

}  // namespace torpor::kernels
#endif

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Type = WeightSource::Type;

using DF = hn::CappedTag<float, kPanel>;
using VF = hn::Vec<DF>;
using DI = hn::RebindToSigned<DF>;
using DU = hn::RebindToUnsigned<DF>;
using VU = hn::Vec<DU>;
using DHalf = hn::Rebind<hwy::float16_t, DF>;
using DBf16 = hn::Rebind<hwy::bfloat16_t, DF>;
constexpr int kLanes = int(hn::MaxLanes(DF()));
constexpr int kVectors = kPanel / kLanes;  // of one k of a panel

// Rows of a register tile, and panels that a single row multiplies at once, by how many registers there are.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
constexpr int kTileRows = 12, kVectorPanels = 8;
#elif HWY_TARGET == HWY_AVX2
constexpr int kTileRows = 6, kVectorPanels = 4;
#elif HWY_TARGET == HWY_NEON
constexpr int kTileRows = 5, kVectorPanels = 2;
#else
constexpr int kTileRows = 2, kVectorPanels = 1;
#endif

// Loads 16-bit or 32-bit floats as f32.
template <Type kType>
HWY_INLINE VF LoadFloats(const std::byte* p, size_t i) {
  const DF d;
  if constexpr (kType == Type::kF32) {
    return hn::LoadU(d, reinterpret_cast<const float*>(p) + i);
  } else if constexpr (kType == Type::kF16) {
    return hn::PromoteTo(d, hn::LoadU(DHalf(), reinterpret_cast<const hwy::float16_t*>(p) + i));
  } else {
    return hn::PromoteTo(d, hn::LoadU(DBf16(), reinterpret_cast<const hwy::bfloat16_t*>(p) + i));
  }
}

// Where the J-th weight of a u32 lies, and the power of two by which Unpack's result exceeds it. The top one would be
// taken for a sign and is shifted down.
template <int kBits, int kJ>
constexpr int Position() {
  return kBits == 8 ? 8 * kJ : kJ < 4 ? 8 * kJ : 8 * (kJ - 4) + 4;
}
template <int kBits, int kJ>
constexpr int Exponent() {
  constexpr int kPosition = Position<kBits, kJ>();
  return kPosition + kBits == 32 ? 0 : kPosition;
}

// The J-th weight in each lane's u32 times 2^Exponent, as f32; exact.
template <int kBits, int kJ>
HWY_INLINE VF Unpack(VU line) {
  const DI di;
  constexpr int kPosition = Position<kBits, kJ>();
  if constexpr (kPosition + kBits == 32) {
    line = hn::ShiftRight<kPosition>(line);
  } else {
    line = hn::And(line, hn::Set(DU(), ((1u << kBits) - 1) << kPosition));
  }
  return hn::ConvertTo(DF(), hn::BitCast(di, line));
}

HWY_INLINE VU LoadLine(const std::byte* line, int vector) {
  return hn::Load(DU(), reinterpret_cast<const uint32_t*>(line) + vector * kLanes);
}

// ---- Rows of x, scaled for their weights' positions ----

// One row: out[k] = x[k] * 2^-Exponent, sums[g] = Σ x of group g, summed in 8 strided chains and then pairwise.
void PrepareRow(const PackedPart& part, int k, const float* HWY_RESTRICT x, float* HWY_RESTRICT out,
                float* HWY_RESTRICT sums) {
  const hn::CappedTag<float, 8> d;
  constexpr int kStep = int(hn::MaxLanes(d)), kParts = 8 / kStep;
  HWY_ALIGN static constexpr float kScale4[8] = {1,
                                                 1.0f / (1 << Exponent<4, 1>()),
                                                 1.0f / (1 << Exponent<4, 2>()),
                                                 1.0f / (1 << Exponent<4, 3>()),
                                                 1.0f / (1 << Exponent<4, 4>()),
                                                 1.0f / (1 << Exponent<4, 5>()),
                                                 1.0f / (1 << Exponent<4, 6>()),
                                                 1.0f / (1 << Exponent<4, 7>())};
  HWY_ALIGN static constexpr float kScale8[8] = {1, 1.0f / (1 << Exponent<8, 1>()), 1.0f / (1 << Exponent<8, 2>()),
                                                 1.0f / (1 << Exponent<8, 3>()),
                                                 1, 1.0f / (1 << Exponent<8, 1>()), 1.0f / (1 << Exponent<8, 2>()),
                                                 1.0f / (1 << Exponent<8, 3>())};
  const float* scale = part.bits == 4 ? kScale4 : kScale8;
  for (int g = 0; g < k / part.group; ++g) {
    hn::Vec<decltype(d)> total[kParts];
    for (int p = 0; p < kParts; ++p) total[p] = hn::Zero(d);
    for (int i = 0; i < part.group; i += 8) {
      for (int p = 0; p < kParts; ++p) {
        const auto v = hn::LoadU(d, x + i + p * kStep);
        total[p] = hn::Add(total[p], v);
        hn::StoreU(hn::Mul(v, hn::Load(d, scale + p * kStep)), d, out + i + p * kStep);
      }
    }
    HWY_ALIGN float chains[8];
    for (int p = 0; p < kParts; ++p) hn::Store(total[p], d, chains + p * kStep);
    sums[g] = ((chains[0] + chains[4]) + (chains[1] + chains[5])) + ((chains[2] + chains[6]) + (chains[3] + chains[7]));
    x += part.group;
    out += part.group;
  }
}

PreparedRows Prepare(ThreadPool& pool, const PackedPart& part, int k, const float* x, int rows) {
  if (part.type != Type::kAffine) return {x, size_t(k), nullptr, 0};
  const int groups = k / part.group;
  float* out = prepared_memory(size_t(rows) * (size_t(k) + groups));
  float* sums = out + size_t(rows) * k;
  constexpr int kRowsPerTask = 16;
  auto body = [&](size_t task, int) {
    const int last = std::min(rows, int(task + 1) * kRowsPerTask);
    for (int row = int(task) * kRowsPerTask; row < last; ++row) {
      PrepareRow(part, k, x + size_t(row) * k, out + size_t(row) * k, sums + size_t(row) * groups);
    }
  };
  pool.parallel_for(size_t(rows + kRowsPerTask - 1) / kRowsPerTask, std::ref(body));
  return {out, size_t(k), sums, groups};
}

// ---- One panel's columns [k0, k1) to f32 [k1 - k0][16]; of quantized weights, scales and biases to [groups][2][16] ----

template <int kBits, int kJ>
HWY_INLINE void UnpackTo(VU line, float* out) {
  hn::Store(Unpack<kBits, kJ>(line), DF(), out + kJ * kPanel);
}

template <int kBits, Type kScale>
void UnpackQuantized(const PackedPart& part, const std::byte* panel, int k0, int k1, float* out, float* scales) {
  constexpr int kPerLine = 32 / kBits;
  const int lines = part.group / kPerLine;
  const std::byte* end = panel + size_t(k1 / part.group) * part.group_bytes;
  for (const std::byte* g = panel + size_t(k0 / part.group) * part.group_bytes; g != end; g += part.group_bytes) {
    for (int i = 0; i < 2 * kPanel; i += kLanes) hn::Store(LoadFloats<kScale>(g, i), DF(), scales + i);
    scales += 2 * kPanel;
    const std::byte* line = g + 2 * kPanel * (kScale == Type::kF32 ? 4 : 2);
    for (int i = 0; i < lines; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const VU words = LoadLine(line, v);
        float* to = out + v * kLanes;
        UnpackTo<kBits, 0>(words, to);
        UnpackTo<kBits, 1>(words, to);
        UnpackTo<kBits, 2>(words, to);
        UnpackTo<kBits, 3>(words, to);
        if constexpr (kBits == 4) {
          UnpackTo<kBits, 4>(words, to);
          UnpackTo<kBits, 5>(words, to);
          UnpackTo<kBits, 6>(words, to);
          UnpackTo<kBits, 7>(words, to);
        }
      }
      line += kAlignment;
      out += kPerLine * kPanel;
    }
  }
}

template <Type kType>
void UnpackFloats(const std::byte* panel, int k0, int k1, float* out) {
  for (size_t i = size_t(k0) * kPanel; i < size_t(k1) * kPanel; i += kLanes) {
    hn::Store(LoadFloats<kType>(panel, i), DF(), out);
    out += kLanes;
  }
}

const float* PanelAsFloats(const PackedPart& part, const std::byte* panel, int k0, int k1, float* scratch,
                           float* scales) {
  switch (part.type) {
    case Type::kF32:
      return reinterpret_cast<const float*>(panel) + size_t(k0) * kPanel;
    case Type::kF16:
      UnpackFloats<Type::kF16>(panel, k0, k1, scratch);
      break;
    case Type::kBF16:
      UnpackFloats<Type::kBF16>(panel, k0, k1, scratch);
      break;
    case Type::kAffine:
      if (part.bits == 4) {
        if (part.scale_type == Type::kF32) UnpackQuantized<4, Type::kF32>(part, panel, k0, k1, scratch, scales);
        if (part.scale_type == Type::kF16) UnpackQuantized<4, Type::kF16>(part, panel, k0, k1, scratch, scales);
        if (part.scale_type == Type::kBF16) UnpackQuantized<4, Type::kBF16>(part, panel, k0, k1, scratch, scales);
      } else {
        if (part.scale_type == Type::kF32) UnpackQuantized<8, Type::kF32>(part, panel, k0, k1, scratch, scales);
        if (part.scale_type == Type::kF16) UnpackQuantized<8, Type::kF16>(part, panel, k0, k1, scratch, scales);
        if (part.scale_type == Type::kBF16) UnpackQuantized<8, Type::kBF16>(part, panel, k0, k1, scratch, scales);
      }
      break;
  }
  return scratch;
}

// ---- kRows rows of x times k columns of a panel; sums [kRows][16] go on from what they hold unless `first` ----

template <int kRows>
HWY_NOINLINE void Tile(const float* HWY_RESTRICT x, size_t stride, const float* HWY_RESTRICT panel, int k, bool first,
                       float* HWY_RESTRICT sums) {
  const DF d;
  VF acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = first ? hn::Zero(d) : hn::Load(d, sums + r * kPanel + v * kLanes);
  }
  for (int i = 0; i < k; ++i) {
    VF w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = hn::Load(d, panel + v * kLanes);
    panel += kPanel;
    for (int r = 0; r < kRows; ++r) {
      const VF xr = hn::Set(d, x[r * stride + i]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(xr, w[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[r][v], d, sums + r * kPanel + v * kLanes);
  }
}

// The same of quantized weights: `groups` groups of `k` columns each.
template <int kRows>
HWY_NOINLINE void GroupTile(const float* HWY_RESTRICT x, size_t stride, const float* HWY_RESTRICT panel, int k, int groups,
                            bool first, const float* HWY_RESTRICT scales, const float* HWY_RESTRICT x_sums,
                            size_t x_sums_stride, float* HWY_RESTRICT sums) {
  const DF d;
  if (first) {
    for (int i = 0; i < kRows * kPanel; i += kLanes) hn::Store(hn::Zero(d), d, sums + i);
  }
  for (int g = 0; g < groups; ++g) {
    VF dot[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) dot[r][v] = hn::Zero(d);
    }
    for (int i = 0; i < k; ++i) {
      VF w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = hn::Load(d, panel + v * kLanes);
      panel += kPanel;
      for (int r = 0; r < kRows; ++r) {
        const VF xr = hn::Set(d, x[r * stride + i]);
        for (int v = 0; v < kVectors; ++v) dot[r][v] = hn::MulAdd(xr, w[v], dot[r][v]);
      }
    }
    x += k;
    for (int r = 0; r < kRows; ++r) {
      const VF x_sum = hn::Set(d, x_sums[r * x_sums_stride + g]);
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + r * kPanel + v * kLanes;
        const VF sum = hn::MulAdd(dot[r][v], hn::Load(d, scales + v * kLanes), hn::Load(d, to));
        hn::Store(hn::MulAdd(hn::Load(d, scales + kPanel + v * kLanes), x_sum, sum), d, to);
      }
    }
    scales += 2 * kPanel;
  }
}

// What a block multiplies: columns [k0, k1) of one panel, unpacked.
struct Chunk {
  const PackedPart* part;
  const float* weights;
  const float* scales;
  int k0, k1;
};

template <int kRows>
HWY_INLINE void OneTile(const PreparedRows& x, int row, const Chunk& c, float* sums) {
  const float* from = x.x + size_t(row) * x.stride + c.k0;
  if (c.part->type == Type::kAffine) {
    const int group = c.part->group;
    GroupTile<kRows>(from, x.stride, c.weights, group, (c.k1 - c.k0) / group, c.k0 == 0, c.scales,
                     x.sums + size_t(row) * x.groups + c.k0 / group, size_t(x.groups), sums + row * kPanel);
  } else {
    Tile<kRows>(from, x.stride, c.weights, c.k1 - c.k0, c.k0 == 0, sums + row * kPanel);
  }
}

template <int kRows>
HWY_INLINE void TileTail(int rows, const PreparedRows& x, int row, const Chunk& c, float* sums) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      OneTile<kRows>(x, row, c, sums);
    } else {
      TileTail<kRows - 1>(rows, x, row, c, sums);
    }
  }
}

void Tiles(const PreparedRows& x, int rows, const Chunk& c, float* sums) {
  int row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) OneTile<kTileRows>(x, row, c, sums);
  TileTail<kTileRows - 1>(rows - row, x, row, c, sums);
}

// ---- One row of x times kPanels panels, straight from their packed form ----

template <int kBits, int kJ, int kPanels>
HWY_INLINE void Step(const std::byte* line, size_t panel_bytes, const float* x, VF (&dot)[kPanels][kVectors]) {
  const VF xk = hn::Set(DF(), x[kJ]);
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kVectors; ++v) {
      dot[p][v] = hn::MulAdd(xk, Unpack<kBits, kJ>(LoadLine(line + p * panel_bytes, v)), dot[p][v]);
    }
  }
}

template <int kBits, Type kScale, int kPanels>
HWY_INLINE void VectorQuantized(const PackedPart& part, const std::byte* panel, int k, const PreparedRows& row, float* sums) {
  constexpr int kPerLine = 32 / kBits;
  const DF d;
  const int lines = part.group / kPerLine, groups = k / part.group;
  const size_t panel_bytes = part.panel_bytes;
  const float* x = row.x;
  for (int i = 0; i < kPanels * kPanel; i += kLanes) hn::Store(hn::Zero(d), d, sums + i);
  for (int g = 0; g < groups; ++g) {
    VF dot[kPanels][kVectors];
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) dot[p][v] = hn::Zero(d);
    }
    const std::byte* line = panel + 2 * kPanel * (kScale == Type::kF32 ? 4 : 2);
    for (int i = 0; i < lines; ++i) {
      Step<kBits, 0, kPanels>(line, panel_bytes, x, dot);
      Step<kBits, 1, kPanels>(line, panel_bytes, x, dot);
      Step<kBits, 2, kPanels>(line, panel_bytes, x, dot);
      Step<kBits, 3, kPanels>(line, panel_bytes, x, dot);
      if constexpr (kBits == 4) {
        Step<kBits, 4, kPanels>(line, panel_bytes, x, dot);
        Step<kBits, 5, kPanels>(line, panel_bytes, x, dot);
        Step<kBits, 6, kPanels>(line, panel_bytes, x, dot);
        Step<kBits, 7, kPanels>(line, panel_bytes, x, dot);
      }
      x += kPerLine;
      line += kAlignment;
    }
    const VF x_sum = hn::Set(d, row.sums[g]);
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const std::byte* scales = panel + p * panel_bytes;
        float* to = sums + p * kPanel + v * kLanes;
        const VF sum = hn::MulAdd(dot[p][v], LoadFloats<kScale>(scales, v * kLanes), hn::Load(d, to));
        hn::Store(hn::MulAdd(LoadFloats<kScale>(scales, kPanel + v * kLanes), x_sum, sum), d, to);
      }
    }
    panel += part.group_bytes;
  }
}

template <Type kType, int kPanels>
HWY_INLINE void VectorFloats(const PackedPart& part, const std::byte* panel, int k, const float* x, float* sums) {
  const DF d;
  VF acc[kPanels][kVectors];
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kVectors; ++v) acc[p][v] = hn::Zero(d);
  }
  for (int i = 0; i < k; ++i) {
    const VF xk = hn::Set(d, x[i]);
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        acc[p][v] =
            hn::MulAdd(xk, LoadFloats<kType>(panel + p * part.panel_bytes, size_t(i) * kPanel + v * kLanes), acc[p][v]);
      }
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[p][v], d, sums + p * kPanel + v * kLanes);
  }
}

template <int kPanels>
void Vector(const PackedPart& part, const std::byte* panel, int k, const PreparedRows& row, float* sums) {
  switch (part.type) {
    case Type::kF32:
      return VectorFloats<Type::kF32, kPanels>(part, panel, k, row.x, sums);
    case Type::kF16:
      return VectorFloats<Type::kF16, kPanels>(part, panel, k, row.x, sums);
    case Type::kBF16:
      return VectorFloats<Type::kBF16, kPanels>(part, panel, k, row.x, sums);
    case Type::kAffine:
      break;
  }
  if (part.bits == 4) {
    if (part.scale_type == Type::kF32) VectorQuantized<4, Type::kF32, kPanels>(part, panel, k, row, sums);
    if (part.scale_type == Type::kF16) VectorQuantized<4, Type::kF16, kPanels>(part, panel, k, row, sums);
    if (part.scale_type == Type::kBF16) VectorQuantized<4, Type::kBF16, kPanels>(part, panel, k, row, sums);
  } else {
    if (part.scale_type == Type::kF32) VectorQuantized<8, Type::kF32, kPanels>(part, panel, k, row, sums);
    if (part.scale_type == Type::kF16) VectorQuantized<8, Type::kF16, kPanels>(part, panel, k, row, sums);
    if (part.scale_type == Type::kBF16) VectorQuantized<8, Type::kBF16, kPanels>(part, panel, k, row, sums);
  }
}

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

// Panels [first, last) of a part for a single row: as many at once as hide the latency of their chains.
template <int kPanels>
HWY_INLINE int RunPanels(const LinearCall& call, const PackedPart& part, const PreparedRows& x, int panel, int last, int row) {
  HWY_ALIGN float sums[kPanels * kPanel];
  for (; panel + kPanels <= last; panel += kPanels) {
    Vector<kPanels>(part, part.panel(panel), call.w->k, x, sums);
    for (int p = 0; p < kPanels; ++p) Finish(call, part, panel + p, row, sums + p * kPanel);
  }
  return panel;
}

void RunVector(const LinearCall& call, const PackedPart& part, const PreparedRows& x, int first, int last, int row) {
  int panel = RunPanels<kVectorPanels>(call, part, x, first, last, row);
  if constexpr (kVectorPanels > 2) panel = RunPanels<kVectorPanels / 2>(call, part, x, panel, last, row);
  if constexpr (kVectorPanels > 1) RunPanels<1>(call, part, x, panel, last, row);
}

// Panels [first, last) of a part for `rows` prepared rows, the first of which is row `row` of the call.
void RunBlock(const LinearCall& call, const PackedPart& part, const PreparedRows& x, int first, int last, int row, int rows) {
  LinearScratch& scratch = linear_scratch();
  const int k = call.w->k;
  // Equal steps of whole groups.
  const int steps = (k + kBlockK - 1) / kBlockK;
  int step = (k + steps - 1) / steps;
  if (part.group > 0) step = (step + part.group - 1) / part.group * part.group;
  for (int panel = first; panel < last; ++panel) {
    for (int k0 = 0; k0 < k; k0 += step) {
      const int k1 = std::min(k, k0 + step);
      const float* weights = PanelAsFloats(part, part.panel(panel), k0, k1, scratch.weights, scratch.scales);
      Tiles(x, rows, {&part, weights, scratch.scales, k0, k1}, scratch.sums);
    }
    for (int r = 0; r < rows; ++r) Finish(call, part, panel, row + r, scratch.sums + r * kPanel);
  }
}

void Linear(const LinearCall& call) {
  ThreadPool& pool = ThreadPool::shared();
  for (const PackedPart& part : call.w->parts) {
    for (int row = 0; row < call.m; row += kBlockRows) {
      const int rows = std::min(kBlockRows, call.m - row);
      const PreparedRows x = Prepare(pool, part, call.w->k, call.x + size_t(row) * call.w->k, rows);
      // Few tasks for one row, where each is short; more for many rows, where an even end matters. Tasks begin at even panels.
      const int pairs = (part.panels + 1) / 2;
      const int tasks = std::min(pairs, pool.size() * (rows == 1 ? 2 : 8));
      auto body = [&](size_t task, int) {
        const int first = int(task * pairs / tasks) * 2, last = std::min(part.panels, int((task + 1) * pairs / tasks) * 2);
        if (rows == 1) {
          RunVector(call, part, x, first, last, row);
        } else {
          RunBlock(call, part, x, first, last, row, rows);
        }
      };
      pool.parallel_for(size_t(tasks), std::ref(body));
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
}

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
