// x · Wᵀ on packed weights. A row's bits depend on that row alone: whatever M, the tile or the thread, an output is one
// chain of multiply-adds over k in order, of weights made f32 in one way:
//
//   float weights:      sum = fma(x[k], w[k], sum);
//   quantized weights:  sum = fma(x[k], q[k] * scale, sum), after each group sum = fma(Σ x of the group, bias, sum);
//
// then its additive bias and its residual. The q's are read in place as q * 2^s (masked, not shifted) and meet x * 2^-s.
// Prepare() makes rows so, with the groups' sums in their places: a group of 32 is 33 columns, the last one weighed by the bias.
//
// With Activations::kInt8, rows meet quantized weights as 8-bit integers with a scale per 32 columns, and
//
//   dot = Σ x8[k] * q[k] of the 32, exact;  sum = fma(dot, scale * x_scale, sum);  sum = fma(Σ x of the 32, bias, sum).

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
  Activations activations;
};

/// Rows that are prepared and multiplied at once, at most.
inline constexpr int kBlockRows = 512;
/// Columns of a panel that are unpacked at once: 16 KiB of f32, half of a usual L1.
inline constexpr int kBlockK = 256;

/// A worker's own memory.
struct LinearScratch {
  alignas(64) float weights[(kBlockK + kBlockK / 32) * kPanel];
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

/// Columns of an 8-bit row that share a scale, and the bytes of such a row: [K] i8, then per block x_scale and Σ x.
inline constexpr int kInt8Block = 32;
inline size_t int8_row_bytes(int k) { return size_t(k) + size_t(k) / kInt8Block * 2 * sizeof(float); }

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

// One row: per group x[k] * 2^-Exponent, then Σ x, summed in 8 strided chains and those pairwise.
void PrepareRow(const PackedPart& part, int k, const float* HWY_RESTRICT x, float* HWY_RESTRICT out) {
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
    out[part.group] = ((chains[0] + chains[4]) + (chains[1] + chains[5])) + ((chains[2] + chains[6]) + (chains[3] + chains[7]));
    x += part.group;
    out += part.group + 1;
  }
}

const float* Prepare(ThreadPool& pool, const PackedPart& part, int k, const float* x, int rows) {
  if (part.type != Type::kAffine) return x;
  const size_t columns = size_t(prepared_columns(part, k));
  float* out = prepared_memory(size_t(rows) * columns);
  constexpr int kRowsPerTask = 16;
  auto body = [&](size_t task, int) {
    const int last = std::min(rows, int(task + 1) * kRowsPerTask);
    for (int row = int(task) * kRowsPerTask; row < last; ++row) {
      PrepareRow(part, k, x + size_t(row) * k, out + size_t(row) * columns);
    }
  };
  pool.parallel_for(size_t(rows + kRowsPerTask - 1) / kRowsPerTask, std::ref(body));
  return out;
}

// ---- One panel's columns [k0, k1) to f32 [prepared columns][16] ----

template <int kBits, int kJ>
HWY_INLINE void UnpackTo(VU line, VF scale, float* out) {
  hn::Store(hn::Mul(Unpack<kBits, kJ>(line), scale), DF(), out + kJ * kPanel);
}

template <int kBits, Type kScale>
void UnpackQuantized(const PackedPart& part, const std::byte* panel, int k0, int k1, float* out) {
  constexpr int kPerLine = 32 / kBits;
  const int lines = part.group / kPerLine;
  const std::byte* end = panel + size_t(k1 / part.group) * part.group_bytes;
  for (const std::byte* g = panel + size_t(k0 / part.group) * part.group_bytes; g != end; g += part.group_bytes) {
    VF scale[kVectors];
    for (int v = 0; v < kVectors; ++v) scale[v] = LoadFloats<kScale>(g, v * kLanes);
    const std::byte* line = g + 2 * kPanel * (kScale == Type::kF32 ? 4 : 2);
    for (int i = 0; i < lines; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const VU words = LoadLine(line, v);
        float* to = out + v * kLanes;
        UnpackTo<kBits, 0>(words, scale[v], to);
        UnpackTo<kBits, 1>(words, scale[v], to);
        UnpackTo<kBits, 2>(words, scale[v], to);
        UnpackTo<kBits, 3>(words, scale[v], to);
        if constexpr (kBits == 4) {
          UnpackTo<kBits, 4>(words, scale[v], to);
          UnpackTo<kBits, 5>(words, scale[v], to);
          UnpackTo<kBits, 6>(words, scale[v], to);
          UnpackTo<kBits, 7>(words, scale[v], to);
        }
      }
      line += kAlignment;
      out += kPerLine * kPanel;
    }
    for (int i = 0; i < kPanel; i += kLanes) hn::Store(LoadFloats<kScale>(g, kPanel + i), DF(), out + i);
    out += kPanel;
  }
}

template <Type kType>
void UnpackFloats(const std::byte* panel, int k0, int k1, float* out) {
  for (size_t i = size_t(k0) * kPanel; i < size_t(k1) * kPanel; i += kLanes) {
    hn::Store(LoadFloats<kType>(panel, i), DF(), out);
    out += kLanes;
  }
}

const float* PanelAsFloats(const PackedPart& part, const std::byte* panel, int k0, int k1, float* scratch) {
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
        if (part.scale_type == Type::kF32) UnpackQuantized<4, Type::kF32>(part, panel, k0, k1, scratch);
        if (part.scale_type == Type::kF16) UnpackQuantized<4, Type::kF16>(part, panel, k0, k1, scratch);
        if (part.scale_type == Type::kBF16) UnpackQuantized<4, Type::kBF16>(part, panel, k0, k1, scratch);
      } else {
        if (part.scale_type == Type::kF32) UnpackQuantized<8, Type::kF32>(part, panel, k0, k1, scratch);
        if (part.scale_type == Type::kF16) UnpackQuantized<8, Type::kF16>(part, panel, k0, k1, scratch);
        if (part.scale_type == Type::kBF16) UnpackQuantized<8, Type::kBF16>(part, panel, k0, k1, scratch);
      }
      break;
  }
  return scratch;
}

// ---- kRows prepared rows times k columns of a panel; sums [kRows][16] go on from what they hold unless `first` ----

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

template <int kRows>
HWY_INLINE void TileTail(int rows, const float* x, size_t stride, const float* panel, int k, bool first, float* sums) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      Tile<kRows>(x, stride, panel, k, first, sums);
    } else {
      TileTail<kRows - 1>(rows, x, stride, panel, k, first, sums);
    }
  }
}

void Tiles(const float* x, int rows, size_t stride, const float* panel, int k, bool first, float* sums) {
  int row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    Tile<kTileRows>(x + row * stride, stride, panel, k, first, sums + row * kPanel);
  }
  TileTail<kTileRows - 1>(rows - row, x + row * stride, stride, panel, k, first, sums + row * kPanel);
}

// ---- One prepared row times kPanels panels, straight from their packed form ----

template <int kBits, int kJ, int kPanels>
HWY_INLINE void Step(const std::byte* line, size_t panel_bytes, const VF (&scale)[kPanels][kVectors], const float* x,
                     VF (&acc)[kPanels][kVectors]) {
  const VF xk = hn::Set(DF(), x[kJ]);
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kVectors; ++v) {
      const VF w = hn::Mul(Unpack<kBits, kJ>(LoadLine(line + p * panel_bytes, v)), scale[p][v]);
      acc[p][v] = hn::MulAdd(xk, w, acc[p][v]);
    }
  }
}

template <int kBits, Type kScale, int kPanels>
HWY_INLINE void VectorQuantized(const PackedPart& part, const std::byte* panel, int k, const float* x, float* sums) {
  constexpr int kPerLine = 32 / kBits;
  const DF d;
  const int lines = part.group / kPerLine, groups = k / part.group;
  const size_t panel_bytes = part.panel_bytes;
  VF acc[kPanels][kVectors];
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kVectors; ++v) acc[p][v] = hn::Zero(d);
  }
  for (int g = 0; g < groups; ++g) {
    VF scale[kPanels][kVectors];
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) scale[p][v] = LoadFloats<kScale>(panel + p * panel_bytes, v * kLanes);
    }
    const std::byte* line = panel + 2 * kPanel * (kScale == Type::kF32 ? 4 : 2);
    for (int i = 0; i < lines; ++i) {
      Step<kBits, 0, kPanels>(line, panel_bytes, scale, x, acc);
      Step<kBits, 1, kPanels>(line, panel_bytes, scale, x, acc);
      Step<kBits, 2, kPanels>(line, panel_bytes, scale, x, acc);
      Step<kBits, 3, kPanels>(line, panel_bytes, scale, x, acc);
      if constexpr (kBits == 4) {
        Step<kBits, 4, kPanels>(line, panel_bytes, scale, x, acc);
        Step<kBits, 5, kPanels>(line, panel_bytes, scale, x, acc);
        Step<kBits, 6, kPanels>(line, panel_bytes, scale, x, acc);
        Step<kBits, 7, kPanels>(line, panel_bytes, scale, x, acc);
      }
      x += kPerLine;
      line += kAlignment;
    }
    const VF x_sum = hn::Set(d, *x++);
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        acc[p][v] = hn::MulAdd(x_sum, LoadFloats<kScale>(panel + p * panel_bytes, kPanel + v * kLanes), acc[p][v]);
      }
    }
    panel += part.group_bytes;
  }
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kVectors; ++v) hn::Store(acc[p][v], d, sums + p * kPanel + v * kLanes);
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
void Vector(const PackedPart& part, const std::byte* panel, int k, const float* x, float* sums) {
  switch (part.type) {
    case Type::kF32:
      return VectorFloats<Type::kF32, kPanels>(part, panel, k, x, sums);
    case Type::kF16:
      return VectorFloats<Type::kF16, kPanels>(part, panel, k, x, sums);
    case Type::kBF16:
      return VectorFloats<Type::kBF16, kPanels>(part, panel, k, x, sums);
    case Type::kAffine:
      break;
  }
  if (part.bits == 4) {
    if (part.scale_type == Type::kF32) VectorQuantized<4, Type::kF32, kPanels>(part, panel, k, x, sums);
    if (part.scale_type == Type::kF16) VectorQuantized<4, Type::kF16, kPanels>(part, panel, k, x, sums);
    if (part.scale_type == Type::kBF16) VectorQuantized<4, Type::kBF16, kPanels>(part, panel, k, x, sums);
  } else {
    if (part.scale_type == Type::kF32) VectorQuantized<8, Type::kF32, kPanels>(part, panel, k, x, sums);
    if (part.scale_type == Type::kF16) VectorQuantized<8, Type::kF16, kPanels>(part, panel, k, x, sums);
    if (part.scale_type == Type::kBF16) VectorQuantized<8, Type::kBF16, kPanels>(part, panel, k, x, sums);
  }
}

// ---- Quantized weights times 8-bit rows ----

using DF8 = hn::CappedTag<float, 8>;
constexpr int kLanes8 = int(hn::MaxLanes(DF8()));

void QuantizeRow(int k, const float* HWY_RESTRICT x, int8_t* HWY_RESTRICT out) {
  const DF8 d;
  const hn::RebindToSigned<DF8> di;
  constexpr int kParts = 8 / kLanes8;
  float* scales = reinterpret_cast<float*>(out + k);
  for (int b = 0; b < k / kInt8Block; ++b, x += kInt8Block, out += kInt8Block) {
    hn::Vec<DF8> most[kParts], total[kParts];
    for (int p = 0; p < kParts; ++p) most[p] = total[p] = hn::Zero(d);
    for (int i = 0; i < kInt8Block; i += 8) {
      for (int p = 0; p < kParts; ++p) {
        const auto v = hn::LoadU(d, x + i + p * kLanes8);
        most[p] = hn::Max(most[p], hn::Abs(v));
        total[p] = hn::Add(total[p], v);
      }
    }
    HWY_ALIGN float largest[8], chains[8];
    for (int p = 0; p < kParts; ++p) {
      hn::Store(most[p], d, largest + p * kLanes8);
      hn::Store(total[p], d, chains + p * kLanes8);
    }
    const float most_of_all = *std::max_element(largest, largest + 8);
    const auto inverse = hn::Set(d, most_of_all > 0 ? 127.0f / most_of_all : 0.0f);
    HWY_ALIGN int32_t rounded[kInt8Block];
    for (int i = 0; i < kInt8Block; i += kLanes8) {
      const auto v = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse));
      hn::Store(hn::Min(hn::Max(v, hn::Set(di, -127)), hn::Set(di, 127)), di, rounded + i);
    }
    for (int i = 0; i < kInt8Block; ++i) out[i] = int8_t(rounded[i]);
    // What isn't finite makes Σ x and so the output not finite.
    scales[2 * b] = most_of_all / 127.0f;
    scales[2 * b + 1] =
        ((chains[0] + chains[4]) + (chains[1] + chains[5])) + ((chains[2] + chains[6]) + (chains[3] + chains[7]));
  }
}

HWY_INLINE uint32_t LoadFour(const int8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  return four;
}

// dots [kRows] vectors of kLanes8 outputs: a block of kInt8Block columns, whose lines begin at `line` (of these outputs).
template <int kBits, int kRows>
HWY_INLINE void Int8Dots(const std::byte* line, const int8_t* x, size_t x_stride, hn::Vec<DF8> (&dots)[kRows]) {
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  // Products of a nibble and an i8 stay below 15 * 127; 16 of them fit 16 bits.
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  __m256i low[kRows], high[kRows];
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = _mm256_setzero_si256();
  for (int i = 0; i < kBits; ++i) {
    const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(line + size_t(i) * kAlignment));
    const __m256i w_low = _mm256_and_si256(words, nibble), w_high = _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble);
    for (int r = 0; r < kRows; ++r) {
      const int8_t* from = x + r * x_stride;
      if constexpr (kBits == 4) {
        const __m256i x_low = _mm256_set1_epi32(int(LoadFour(from + i * 8))), x_high = _mm256_set1_epi32(int(LoadFour(from + i * 8 + 4)));
        low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(w_low, x_low));
        low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(w_high, x_high));
      } else {
        const __m256i four = _mm256_set1_epi32(int(LoadFour(from + i * 4)));
        low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(w_low, four));
        high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(w_high, four));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    __m256i dot = _mm256_madd_epi16(low[r], _mm256_set1_epi16(1));
    if constexpr (kBits == 8) dot = _mm256_add_epi32(dot, _mm256_madd_epi16(high[r], _mm256_set1_epi16(16)));
    dots[r] = hn::Vec<DF8>{_mm256_cvtepi32_ps(dot)};
  }
#else
  const hn::RebindToSigned<DF8> di;
  const hn::RebindToUnsigned<DF8> du;
  constexpr int kPerLine = 32 / kBits;
  hn::Vec<decltype(di)> total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = hn::Zero(di);
  for (int i = 0; i < kBits; ++i) {
    const auto words = hn::Load(du, reinterpret_cast<const uint32_t*>(line + size_t(i) * kAlignment));
    for (int j = 0; j < kPerLine; ++j) {
      const int shift = kBits == 8 ? 8 * j : j < 4 ? 8 * j : 8 * (j - 4) + 4;
      const auto q = hn::BitCast(di, hn::And(hn::ShiftRightSame(words, shift), hn::Set(du, (1u << kBits) - 1)));
      for (int r = 0; r < kRows; ++r) {
        total[r] = hn::Add(total[r], hn::Mul(q, hn::Set(di, int32_t(x[r * x_stride + i * kPerLine + j]))));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) dots[r] = hn::ConvertTo(DF8(), total[r]);
#endif
}

template <Type kScale>
HWY_INLINE hn::Vec<DF8> LoadScales(const std::byte* p, size_t i) {
  const DF8 d;
  if constexpr (kScale == Type::kF32) {
    return hn::LoadU(d, reinterpret_cast<const float*>(p) + i);
  } else if constexpr (kScale == Type::kF16) {
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::float16_t, DF8>(), reinterpret_cast<const hwy::float16_t*>(p) + i));
  } else {
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::bfloat16_t, DF8>(), reinterpret_cast<const hwy::bfloat16_t*>(p) + i));
  }
}

template <int kBits, Type kScale, int kRows>
HWY_NOINLINE void Int8Tile(const PackedPart& part, const std::byte* panel, int k, const int8_t* x, float* HWY_RESTRICT sums) {
  const DF8 d;
  const size_t stride = int8_row_bytes(k);
  for (int lane = 0; lane < kPanel; lane += kLanes8) {
    hn::Vec<DF8> acc[kRows], dots[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = hn::Zero(d);
    const std::byte* g = panel;
    for (int k0 = 0; k0 < k; k0 += part.group, g += part.group_bytes) {
      const auto scale = LoadScales<kScale>(g, lane), bias = LoadScales<kScale>(g, kPanel + lane);
      const std::byte* line = g + 2 * kPanel * (kScale == Type::kF32 ? 4 : 2) + lane * 4;
      for (int at = k0; at < k0 + part.group; at += kInt8Block, line += kBits * kAlignment) {
        Int8Dots<kBits, kRows>(line, x + at, stride, dots);
        for (int r = 0; r < kRows; ++r) {
          const float* of_x = reinterpret_cast<const float*>(x + r * stride + k) + at / kInt8Block * 2;
          acc[r] = hn::MulAdd(dots[r], hn::Mul(scale, hn::Set(d, of_x[0])), acc[r]);
          acc[r] = hn::MulAdd(hn::Set(d, of_x[1]), bias, acc[r]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) hn::Store(acc[r], d, sums + r * kPanel + lane);
  }
}

template <int kBits, Type kScale>
void Int8Tiles(const PackedPart& part, const std::byte* panel, int k, const int8_t* x, int rows, float* sums) {
  const size_t stride = int8_row_bytes(k);
  int row = 0;
  for (; row + 4 <= rows; row += 4) Int8Tile<kBits, kScale, 4>(part, panel, k, x + row * stride, sums + row * kPanel);
  for (; row < rows; ++row) Int8Tile<kBits, kScale, 1>(part, panel, k, x + row * stride, sums + row * kPanel);
}

void Int8Panel(const PackedPart& part, const std::byte* panel, int k, const int8_t* x, int rows, float* sums) {
  if (part.bits == 4) {
    if (part.scale_type == Type::kF32) Int8Tiles<4, Type::kF32>(part, panel, k, x, rows, sums);
    if (part.scale_type == Type::kF16) Int8Tiles<4, Type::kF16>(part, panel, k, x, rows, sums);
    if (part.scale_type == Type::kBF16) Int8Tiles<4, Type::kBF16>(part, panel, k, x, rows, sums);
  } else {
    if (part.scale_type == Type::kF32) Int8Tiles<8, Type::kF32>(part, panel, k, x, rows, sums);
    if (part.scale_type == Type::kF16) Int8Tiles<8, Type::kF16>(part, panel, k, x, rows, sums);
    if (part.scale_type == Type::kBF16) Int8Tiles<8, Type::kBF16>(part, panel, k, x, rows, sums);
  }
}

const int8_t* PrepareInt8(ThreadPool& pool, int k, const float* x, int rows) {
  const size_t bytes = int8_row_bytes(k);
  auto* out = reinterpret_cast<int8_t*>(prepared_memory(size_t(rows) * bytes / sizeof(float)));
  constexpr int kRowsPerTask = 16;
  auto body = [&](size_t task, int) {
    const int last = std::min(rows, int(task + 1) * kRowsPerTask);
    for (int row = int(task) * kRowsPerTask; row < last; ++row) QuantizeRow(k, x + size_t(row) * k, out + row * bytes);
  };
  pool.parallel_for(size_t(rows + kRowsPerTask - 1) / kRowsPerTask, std::ref(body));
  return out;
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
HWY_INLINE int RunPanels(const LinearCall& call, const PackedPart& part, const float* x, int panel, int last, int row) {
  HWY_ALIGN float sums[kPanels * kPanel];
  for (; panel + kPanels <= last; panel += kPanels) {
    Vector<kPanels>(part, part.panel(panel), call.w->k, x, sums);
    for (int p = 0; p < kPanels; ++p) Finish(call, part, panel + p, row, sums + p * kPanel);
  }
  return panel;
}

void RunVector(const LinearCall& call, const PackedPart& part, const float* x, int first, int last, int row) {
  int panel = RunPanels<kVectorPanels>(call, part, x, first, last, row);
  if constexpr (kVectorPanels > 2) panel = RunPanels<kVectorPanels / 2>(call, part, x, panel, last, row);
  if constexpr (kVectorPanels > 1) RunPanels<1>(call, part, x, panel, last, row);
}

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
      const int first_column = prepared_columns(part, k0), columns = prepared_columns(part, k1) - first_column;
      Tiles(x + first_column, rows, stride, weights, columns, k0 == 0, scratch.sums);
    }
    for (int r = 0; r < rows; ++r) Finish(call, part, panel, row + r, scratch.sums + r * kPanel);
  }
}

void RunInt8(const LinearCall& call, const PackedPart& part, const int8_t* x, int first, int last, int row, int rows) {
  float* sums = linear_scratch().sums;
  for (int panel = first; panel < last; ++panel) {
    Int8Panel(part, part.panel(panel), call.w->k, x, rows, sums);
    for (int r = 0; r < rows; ++r) Finish(call, part, panel, row + r, sums + r * kPanel);
  }
}

void Linear(const LinearCall& call) {
  ThreadPool& pool = ThreadPool::shared();
  for (const PackedPart& part : call.w->parts) {
    for (int row = 0; row < call.m; row += kBlockRows) {
      const int rows = std::min(kBlockRows, call.m - row);
      const float* given = call.x + size_t(row) * call.w->k;
      const bool int8 = call.activations == Activations::kInt8 && part.type == Type::kAffine;
      const int8_t* x8 = int8 ? PrepareInt8(pool, call.w->k, given, rows) : nullptr;
      const float* x = int8 ? nullptr : Prepare(pool, part, call.w->k, given, rows);
      // Few tasks for one row, where each is short; more for many rows, where an even end matters. Tasks begin at even panels.
      const int pairs = (part.panels + 1) / 2;
      const int tasks = std::min(pairs, pool.size() * (rows == 1 ? 2 : 8));
      auto body = [&](size_t task, int) {
        const int first = int(task * pairs / tasks) * 2, last = std::min(part.panels, int((task + 1) * pairs / tasks) * 2);
        if (int8) {
          RunInt8(call, part, x8, first, last, row, rows);
        } else if (rows == 1) {
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

#include <atomic>
#include <cstdlib>
#include <string>

#include "kernels/cpu_target.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

HWY_EXPORT(Linear);

Activations activations_from_environment() {
  const char* text = std::getenv("TORPOR_ACTIVATIONS");
  const std::string name = text == nullptr ? "" : text;
  if (name.empty() || name == "f32") return Activations::kF32;
  if (name == "int8") return Activations::kInt8;
  throw Error(ErrorCode::kInvalidArgument, "TORPOR_ACTIVATIONS must be f32 or int8, not '" + name + "'.");
}

std::atomic<Activations>& chosen_activations() {
  static std::atomic<Activations> chosen{activations_from_environment()};
  return chosen;
}

}  // namespace

Activations activations() { return chosen_activations().load(); }
void set_activations(Activations activations) { chosen_activations().store(activations); }

void linear(const float* x, int m, const PackedLinear& w, const float* residual, float* y) {
  if (w.impl().gated) throw Error(ErrorCode::kInvalidArgument, "A gated weight needs gated_linear.");
  if (m <= 0) return;
  ensure_cpu_target();
  HWY_DYNAMIC_DISPATCH(Linear)({x, m, &w.impl(), residual, y, Activation::kSilu, activations()});
}

void gated_linear(const float* x, int m, const PackedLinear& w, Activation activation, float* y) {
  if (!w.impl().gated) throw Error(ErrorCode::kInvalidArgument, "gated_linear needs a weight packed by pack_gated.");
  if (m <= 0) return;
  ensure_cpu_target();
  HWY_DYNAMIC_DISPATCH(Linear)({x, m, &w.impl(), nullptr, y, activation, activations()});
}

}  // namespace torpor::kernels

#endif  // HWY_ONCE
