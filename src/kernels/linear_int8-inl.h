// Linear layers with 8-bit activations: rows quantized, exact integer dot products.
// Compiled once per target, as part of linear.cc.

#if defined(TORPOR_KERNELS_LINEAR_INT8_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_LINEAR_INT8_INL
#undef TORPOR_KERNELS_LINEAR_INT8_INL
#else
#define TORPOR_KERNELS_LINEAR_INT8_INL
#endif

#include <hwy/highway.h>

#include "kernels/linear_f32-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ---- Quantized weights times 8-bit rows ----

// One row: per block x8 = round(x / x_scale), then x_scale and x_scale * Σ x8. A bias is often larger than the weights that it
// is part of; with Σ x in place of the latter, the output would have all rounding errors times that bias.
void QuantizeRow(int k, const float* HWY_RESTRICT x, int8_t* HWY_RESTRICT out) {
  const DF d;
  const DI di;
  float* scales = reinterpret_cast<float*>(out + k);
  for (int b = 0; b < k / kInt8Block; ++b, x += kInt8Block, out += kInt8Block) {
    // As integers the bits of |x| are in the order of |x|, NaN above all: it reaches x_scale, and so the output.
    auto most = hn::Zero(di);
    for (int i = 0; i < kInt8Block; i += kLanes) most = hn::Max(most, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + i))));
    const float largest = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, most)));
    const auto inverse = hn::Set(d, largest > 0 ? 127.0f / largest : 0.0f);
    HWY_ALIGN int32_t rounded[kInt8Block];
    auto total = hn::Zero(di);
    for (int i = 0; i < kInt8Block; i += kLanes) {
      auto v = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse));
      v = hn::Min(hn::Max(v, hn::Set(di, -127)), hn::Set(di, 127));
      hn::Store(v, di, rounded + i);
      total = hn::Add(total, v);
    }
    for (int i = 0; i < kInt8Block; ++i) out[i] = int8_t(rounded[i]);
    scales[2 * b] = largest / 127.0f;
    scales[2 * b + 1] = scales[2 * b] * float(hn::GetLane(hn::SumOfLanes(di, total)));
  }
}

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
// Of kLanes outputs a block's lines, and of rows the same four columns in every lane.
using DU8 = hn::Repartition<uint8_t, DF>;
using DI8 = hn::Repartition<int8_t, DF>;
using DI16 = hn::Repartition<int16_t, DF>;

HWY_INLINE hn::Vec<DI8> FourOf(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return hn::BitCast(DI8(), hn::Set(DI(), four));
}

#if HWY_TARGET <= HWY_AVX3_DL
HWY_INLINE hn::Vec<DI> AddFours(hn::Vec<DI> sum, hn::Vec<DU8> w, hn::Vec<DI8> x) {
  return hn::Vec<DI>{_mm512_dpbusd_epi32(sum.raw, w.raw, x.raw)};
}
#else
HWY_INLINE hn::Vec<DI16> MulPairs(hn::Vec<DU8> w, hn::Vec<DI8> x) {
#if HWY_TARGET <= HWY_AVX3
  return hn::Vec<DI16>{_mm512_maddubs_epi16(w.raw, x.raw)};
#else
  return hn::Vec<DI16>{_mm256_maddubs_epi16(w.raw, x.raw)};
#endif
}
HWY_INLINE hn::Vec<DI> MulPairs(hn::Vec<DI16> a, hn::Vec<DI16> b) {
#if HWY_TARGET <= HWY_AVX3
  return hn::Vec<DI>{_mm512_madd_epi16(a.raw, b.raw)};
#else
  return hn::Vec<DI>{_mm256_madd_epi16(a.raw, b.raw)};
#endif
}
#endif
#endif

// dots: of kRows rows a block of kInt8Block columns, whose lines begin at `line` (of these outputs). Exact everywhere.
template <int kBits, int kRows>
HWY_INLINE void Int8Dots(const std::byte* line, const int8_t* x, size_t x_stride, VF (&dots)[kRows]) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  const auto nibble = hn::Set(DU8(), uint8_t{15});
#if HWY_TARGET <= HWY_AVX3_DL
  hn::Vec<DI> total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = hn::Zero(DI());
#else
  // Products of a nibble and an i8 stay below 15 * 127; 16 of them fit 16 bits.
  hn::Vec<DI16> low[kRows], high[kRows];
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = hn::Zero(DI16());
#endif
  for (int i = 0; i < kBits; ++i, line += kAlignment) {
    const auto words = hn::Load(DU(), reinterpret_cast<const uint32_t*>(line));
    const auto w_low = hn::And(hn::BitCast(DU8(), words), nibble);
    const auto w_high = hn::And(hn::BitCast(DU8(), hn::ShiftRight<4>(words)), nibble);
    for (int r = 0; r < kRows; ++r) {
      const int8_t* from = x + r * x_stride;
#if HWY_TARGET <= HWY_AVX3_DL
      if constexpr (kBits == 4) {
        total[r] = AddFours(AddFours(total[r], w_low, FourOf(from + i * 8)), w_high, FourOf(from + i * 8 + 4));
      } else {
        total[r] = AddFours(total[r], hn::BitCast(DU8(), words), FourOf(from + i * 4));
      }
#else
      if constexpr (kBits == 4) {
        low[r] = hn::Add(low[r], MulPairs(w_low, FourOf(from + i * 8)));
        low[r] = hn::Add(low[r], MulPairs(w_high, FourOf(from + i * 8 + 4)));
      } else {
        low[r] = hn::Add(low[r], MulPairs(w_low, FourOf(from + i * 4)));
        high[r] = hn::Add(high[r], MulPairs(w_high, FourOf(from + i * 4)));
      }
#endif
    }
  }
  for (int r = 0; r < kRows; ++r) {
#if HWY_TARGET <= HWY_AVX3_DL
    dots[r] = hn::ConvertTo(DF(), total[r]);
#else
    auto dot = MulPairs(low[r], hn::Set(DI16(), int16_t{1}));
    if constexpr (kBits == 8) dot = hn::Add(dot, MulPairs(high[r], hn::Set(DI16(), int16_t{16})));
    dots[r] = hn::ConvertTo(DF(), dot);
#endif
  }
#else
  const DI di;
  constexpr int kPerLine = 32 / kBits;
  hn::Vec<DI> total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = hn::Zero(di);
  for (int i = 0; i < kBits; ++i) {
    const auto words = hn::Load(DU(), reinterpret_cast<const uint32_t*>(line + size_t(i) * kAlignment));
    for (int j = 0; j < kPerLine; ++j) {
      const int shift = kBits == 8 ? 8 * j : j < 4 ? 8 * j : 8 * (j - 4) + 4;
      const auto q = hn::BitCast(di, hn::And(hn::ShiftRightSame(words, shift), hn::Set(DU(), (1u << kBits) - 1)));
      for (int r = 0; r < kRows; ++r) {
        total[r] = hn::Add(total[r], hn::Mul(q, hn::Set(di, int32_t(x[r * x_stride + i * kPerLine + j]))));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) dots[r] = hn::ConvertTo(DF(), total[r]);
#endif
}

// Rows that meet a weight at once.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
constexpr int kInt8Rows = 8;
#else
constexpr int kInt8Rows = 4;
#endif

// kRows rows times a panel; what lies `ahead` of its lines is brought into the cache.
template <int kBits, Type kScale, int kRows>
HWY_NOINLINE void Int8Tile(const PackedPart& part, const std::byte* panel, ptrdiff_t ahead, int k, const int8_t* x,
                           float* HWY_RESTRICT sums) {
  const DF d;
  const size_t stride = int8_row_bytes(k);
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    VF acc[kRows], dots[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = hn::Zero(d);
    const std::byte* g = panel;
    for (int k0 = 0; k0 < k; k0 += part.group, g += part.group_bytes) {
      const VF scale = LoadFloats<kScale>(g, lane), bias = LoadFloats<kScale>(g, kPanel + lane);
      const std::byte* line = g + 2 * kPanel * type_size(kScale) + lane * 4;
      for (int at = k0; at < k0 + part.group; at += kInt8Block, line += kBits * kAlignment) {
        for (int i = 0; i < kBits; ++i) hwy::Prefetch(line + ahead + size_t(i) * kAlignment);
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

template <int kBits, Type kScale, int kRows>
void Int8Tiles(const PackedPart& part, const std::byte* panel, ptrdiff_t ahead, int k, const int8_t* x, int rows,
               float* sums) {
  for (; rows >= kRows; rows -= kRows) {
    Int8Tile<kBits, kScale, kRows>(part, panel, ahead, k, x, sums);
    x += kRows * int8_row_bytes(k);
    sums += kRows * kPanel;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) Int8Tiles<kBits, kScale, kRows - 1>(part, panel, ahead, k, x, rows, sums);
  }
}

template <int kBits>
void Int8Panel(const PackedPart& part, const std::byte* panel, ptrdiff_t ahead, int k, const int8_t* x, int rows,
               float* sums) {
  if (part.scale_type == Type::kF32) Int8Tiles<kBits, Type::kF32, kInt8Rows>(part, panel, ahead, k, x, rows, sums);
  if (part.scale_type == Type::kF16) Int8Tiles<kBits, Type::kF16, kInt8Rows>(part, panel, ahead, k, x, rows, sums);
  if (part.scale_type == Type::kBF16) Int8Tiles<kBits, Type::kBF16, kInt8Rows>(part, panel, ahead, k, x, rows, sums);
}

// All rows times a panel; sums [rows][16]. The panel at `next` comes next.
void Int8Panel(const PackedPart& part, const std::byte* panel, const std::byte* next, int k, const int8_t* x, int rows,
               float* sums) {
  if (part.bits == 4) return Int8Panel<4>(part, panel, next - panel, k, x, rows, sums);
  return Int8Panel<8>(part, panel, next - panel, k, x, rows, sums);
}

const int8_t* PrepareInt8(ThreadPool& pool, int k, const float* x, int rows) {
  const size_t bytes = int8_row_bytes(k);
  auto* out = reinterpret_cast<int8_t*>(prepared_memory(size_t(rows) * bytes / sizeof(float)));
  const int size = rows_per_task(rows, pool.size());
  auto body = [&](size_t task, int) {
    const int last = std::min(rows, int(task + 1) * size);
    for (int row = int(task) * size; row < last; ++row) QuantizeRow(k, x + size_t(row) * k, out + row * bytes);
  };
  pool.parallel_for(size_t((rows + size - 1) / size), std::ref(body));
  return out;
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
