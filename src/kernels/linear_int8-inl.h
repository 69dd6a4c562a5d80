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

using DF8 = hn::CappedTag<float, 8>;
constexpr int kLanes8 = int(hn::MaxLanes(DF8()));

// One row: per block x8 = round(x / x_scale), then x_scale and x_scale * Σ x8. A bias is often larger than the weights that it
// is part of; with Σ x in place of the latter, the output would have all rounding errors times that bias.
void QuantizeRow(int k, const float* HWY_RESTRICT x, int8_t* HWY_RESTRICT out) {
  const DF8 d;
  const hn::RebindToSigned<DF8> di;
  float* scales = reinterpret_cast<float*>(out + k);
  for (int b = 0; b < k / kInt8Block; ++b, x += kInt8Block, out += kInt8Block) {
    // As integers the bits of |x| are in the order of |x|, NaN above all: it reaches x_scale, and so the output.
    auto most = hn::Zero(di);
    for (int i = 0; i < kInt8Block; i += kLanes8) most = hn::Max(most, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + i))));
    const float largest = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, most)));
    const auto inverse = hn::Set(d, largest > 0 ? 127.0f / largest : 0.0f);
    HWY_ALIGN int32_t rounded[kInt8Block];
    auto total = hn::Zero(di);
    for (int i = 0; i < kInt8Block; i += kLanes8) {
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

HWY_INLINE uint32_t LoadFour(const int8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  return four;
}

// dots [kRows] vectors of kLanes8 outputs: a block of kInt8Block columns, whose lines begin at `line` (of these outputs).
template <int kBits, int kRows>
HWY_INLINE void Int8Dots(const std::byte* line, const int8_t* x, size_t x_stride, hn::Vec<DF8> (&dots)[kRows]) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
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

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
