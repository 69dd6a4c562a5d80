// Linear layers with 16-bit activations on Arm's products of bytes, for many rows: dot products (dotprod), or those of
// matrices (i8mm). The integers and the sums are those of linear_int16-inl.h. Compiled once per target, as part of
// linear.cc; only NEON's get it.

#if defined(TORPOR_KERNELS_LINEAR_DOT_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_LINEAR_DOT_INL
#undef TORPOR_KERNELS_LINEAR_DOT_INL
#else
#define TORPOR_KERNELS_LINEAR_DOT_INL
#endif

#include <hwy/highway.h>

#include <utility>

#include "kernels/linear_blocks-inl.h"

#if TORPOR_HAVE_DOT
HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows whose sums of products wait in registers, with those of one panel's outputs.
constexpr int kDotRows = 4;

using D8 = hn::Repartition<uint8_t, DU>;
using V8 = hn::Vec<D8>;

// sum + the four products of each lane's bytes of w and the kLane-th four bytes of x. Both have a sign, or none has.
// (Not the intrinsics: Highway compiles this target without dot products, which not all its CPUs have. So the assembler
// is told; what it took before it still takes.)
#ifdef __ARM_FEATURE_DOTPROD
#define TORPOR_DOT_ARCH
#else
#define TORPOR_DOT_ARCH ".arch armv8.2-a+crypto+dotprod\n\t"
#endif
template <bool kSigned, int kLane>
HWY_INLINE VI AddFourProducts(VI sum, VU w, V8 x) {
  if constexpr (kSigned) {
    asm(TORPOR_DOT_ARCH "sdot %0.4s, %1.16b, %2.4b[%c3]" : "+w"(sum.raw) : "w"(w.raw), "w"(x.raw), "i"(kLane));
  } else {
    asm(TORPOR_DOT_ARCH "udot %0.4s, %1.16b, %2.4b[%c3]" : "+w"(sum.raw) : "w"(w.raw), "w"(x.raw), "i"(kLane));
  }
  return sum;
}
#undef TORPOR_DOT_ARCH

// 16 columns of kDotRows rows, `stride` bytes apart, times those of a panel. With a sign, weights are taken less 128.
template <bool kSigned>
HWY_INLINE void AddColumns(const uint8_t* x, int stride, const uint32_t* w, VI (&dot)[kDotRows][kVectors]) {
  V8 of_x[kDotRows];
  for (int r = 0; r < kDotRows; ++r) of_x[r] = hn::LoadU(D8(), x + r * stride);
  const auto four = [&]<int kI>() HWY_ATTR {
    for (int v = 0; v < kVectors; ++v) {
      VU weights = hn::Load(DU(), w + kI * kPanel + v * kLanes);
      if constexpr (kSigned) weights = hn::Xor(weights, hn::Set(DU(), 0x80808080u));
      for (int r = 0; r < kDotRows; ++r) dot[r][v] = AddFourProducts<kSigned, kI>(dot[r][v], weights, of_x[r]);
    }
  };
  [&]<size_t... kI>(std::index_sequence<kI...>) HWY_ATTR {
    (four.template operator()<int(kI)>(), ...);
  }(std::make_index_sequence<4>());
}

// Σ of a group's signed bytes.
HWY_INLINE int32_t SumOfBytes(int group, const uint8_t* x) {
  VI sum = hn::Zero(DI());
  const V8 ones = hn::Set(D8(), 1);
  for (int i = 0; i < group; i += 16) {
    sum = AddFourProducts<true, 0>(sum, hn::BitCast(DU(), hn::LoadU(D8(), x + i)), ones);
  }
  return hn::GetLane(hn::SumOfLanes(DI(), sum));
}

// Four rows of a group times a panel: dot = 256 * Σ high * w + Σ low * w. Rows are `group` bytes apart.
HWY_INLINE void DotsOfRows(int group, const uint8_t* high, const uint8_t* low, const uint32_t* w,
                           VI (&dot)[kDotRows][kVectors]) {
  for (int r = 0; r < kDotRows; ++r) {
    // The 128 that weights are short of.
    const VI rest = hn::Set(DI(), 128 * SumOfBytes(group, high + r * group));
    for (int v = 0; v < kVectors; ++v) dot[r][v] = rest;
  }
  for (int i = 0; i < group; i += 16) AddColumns<true>(high + i, group, w + i / 4 * kPanel, dot);
  for (int r = 0; r < kDotRows; ++r) {
    for (int v = 0; v < kVectors; ++v) dot[r][v] = hn::ShiftLeft<8>(dot[r][v]);
  }
  for (int i = 0; i < group; i += 16) AddColumns<false>(low + i, group, w + i / 4 * kPanel, dot);
}

#if TORPOR_HAVE_I8MM
// ---- The same by products of matrices: 2 outputs x 8 columns times 2 rows x 8 columns are 2 x 2 sums ----

#ifdef __ARM_FEATURE_MATMUL_INT8
#define TORPOR_I8MM_ARCH
#else
#define TORPOR_I8MM_ARCH ".arch armv8.2-a+crypto+dotprod+i8mm\n\t"
#endif
// sum + w's two outputs times x's two rows, [output][row]. x has a sign, or none.
template <bool kSigned>
HWY_INLINE VI AddMatrixProduct(VI sum, VU w, V8 x) {
  if constexpr (kSigned) {
    asm(TORPOR_I8MM_ARCH "usmmla %0.4s, %1.16b, %2.16b" : "+w"(sum.raw) : "w"(w.raw), "w"(x.raw));
  } else {
    asm(TORPOR_I8MM_ARCH "ummla %0.4s, %1.16b, %2.16b" : "+w"(sum.raw) : "w"(w.raw), "w"(x.raw));
  }
  return sum;
}
#undef TORPOR_I8MM_ARCH

constexpr int kOutputPairs = kPanel / 2, kRowPairs = kDotRows / 2;

// Of unpacked bytes: where two lines had four columns of each output, pairs of outputs have all eight.
HWY_INLINE void PairOutputs(int group, int groups, uint32_t* w) {
  for (int g = 0; g < groups; ++g, w += 2 * kPanel) {
    for (int i = 0; i < group; i += 8, w += 2 * kPanel) {
      VU first[kVectors], second[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        first[v] = hn::Load(DU(), w + v * kLanes);
        second[v] = hn::Load(DU(), w + kPanel + v * kLanes);
      }
      for (int v = 0; v < kVectors; ++v) {
        hn::Store(hn::InterleaveLower(DU(), first[v], second[v]), DU(), w + 2 * v * kLanes);
        hn::Store(hn::InterleaveUpper(DU(), first[v], second[v]), DU(), w + (2 * v + 1) * kLanes);
      }
    }
  }
}

template <bool kSigned>
HWY_INLINE void AddMatrices(int group, const uint8_t* x, const uint32_t* w, VI (&sums)[kRowPairs][kOutputPairs]) {
  const hn::Repartition<uint64_t, DU> d64;
  const D8 d8;
  for (int i = 0; i < group; i += 16) {
    V8 rows[2][kRowPairs];  // the first eight columns of two rows, and the next eight
    for (int q = 0; q < kRowPairs; ++q) {
      const auto even = hn::BitCast(d64, hn::LoadU(d8, x + i + 2 * q * group));
      const auto odd = hn::BitCast(d64, hn::LoadU(d8, x + i + (2 * q + 1) * group));
      rows[0][q] = hn::BitCast(d8, hn::InterleaveLower(d64, even, odd));
      rows[1][q] = hn::BitCast(d8, hn::InterleaveUpper(d64, even, odd));
    }
    for (int half = 0; half < 2; ++half, w += 2 * kPanel) {
      for (int p = 0; p < kOutputPairs; ++p) {
        const VU outputs = hn::Load(DU(), w + p * kLanes);
        for (int q = 0; q < kRowPairs; ++q) {
          sums[q][p] = AddMatrixProduct<kSigned>(sums[q][p], outputs, rows[half][q]);
        }
      }
    }
  }
}

// DotsOfRows, of weights as PairOutputs leaves them.
HWY_INLINE void MatricesOfRows(int group, const uint8_t* high, const uint8_t* low, const uint32_t* w,
                               VI (&dot)[kDotRows][kVectors]) {
  VI sums[kRowPairs][kOutputPairs];
  for (int q = 0; q < kRowPairs; ++q) {
    for (int p = 0; p < kOutputPairs; ++p) sums[q][p] = hn::Zero(DI());
  }
  AddMatrices<true>(group, high, w, sums);
  for (int q = 0; q < kRowPairs; ++q) {
    for (int p = 0; p < kOutputPairs; ++p) sums[q][p] = hn::ShiftLeft<8>(sums[q][p]);
  }
  AddMatrices<false>(group, low, w, sums);
  for (int q = 0; q < kRowPairs; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      dot[2 * q][v] = hn::ConcatEven(DI(), sums[q][2 * v + 1], sums[q][2 * v]);
      dot[2 * q + 1][v] = hn::ConcatOdd(DI(), sums[q][2 * v + 1], sums[q][2 * v]);
    }
  }
}
#endif

// 16 prepared rows times `groups` groups of a panel; sums [16][16] go on from what they hold unless `first`.
template <bool kMatrices>
HWY_NOINLINE void DotTile(int group, const uint8_t* x, const uint32_t* w, int groups, bool first,
                          float* HWY_RESTRICT sums) {
  const DF d;
  for (int g = 0; g < groups; ++g) {
    const auto* of_x = reinterpret_cast<const float*>(x + 2 * kByteTileRows * group);
    const auto* scales = reinterpret_cast<const float*>(w + group / 4 * kPanel);
    for (int row = 0; row < kByteTileRows; row += kDotRows) {
      const uint8_t *high = x + row * group, *low = high + kByteTileRows * group;
      VI dot[kDotRows][kVectors];
#if TORPOR_HAVE_I8MM
      if constexpr (kMatrices) MatricesOfRows(group, high, low, w, dot);
#endif
      if constexpr (!kMatrices) DotsOfRows(group, high, low, w, dot);
      for (int v = 0; v < kVectors; ++v) {
        const VF scale = hn::Load(d, scales + v * kLanes), bias = hn::Load(d, scales + kPanel + v * kLanes);
        for (int r = 0; r < kDotRows; ++r) {
          float* at = sums + (row + r) * kPanel + v * kLanes;
          const VF before = first && g == 0 ? hn::Zero(d) : hn::Load(d, at);
          const VF scaled = hn::Mul(scale, hn::Set(d, of_x[row + r]));
          const VF sum = hn::MulAdd(hn::ConvertTo(d, dot[r][v]), scaled, before);
          hn::Store(hn::MulAdd(hn::Set(d, of_x[kByteTileRows + row + r]), bias, sum), d, at);
        }
      }
    }
    x += byte_tile_group_bytes(group);
    w += (group / 4 + 2) * kPanel;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();
#endif  // TORPOR_HAVE_DOT

#endif  // per-target guard
