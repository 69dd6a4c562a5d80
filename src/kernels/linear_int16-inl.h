// Linear layers with 16-bit activations: rows quantized, exact integer dot products.
// Compiled once per target, as part of linear.cc.

#if defined(TORPOR_KERNELS_LINEAR_INT16_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_LINEAR_INT16_INL
#undef TORPOR_KERNELS_LINEAR_INT16_INL
#else
#define TORPOR_KERNELS_LINEAR_INT16_INL
#endif

#include <hwy/highway.h>

#include "kernels/linear_f32-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ---- Pairs: a u32 of weights masked and shifted is two of them as 16-bit integers ----

using VI = hn::Vec<DI>;
// The column, among those of a u32, of the first of its j-th pair; the second's is two further.
constexpr int PairColumn(int bits, int j) { return bits == 8 ? j : j / 2 + j % 2 * 4; }

template <int kBits, int kJ>
HWY_INLINE VI PairOf(VU words) {
  return hn::BitCast(DI(), hn::And(hn::ShiftRight<kBits * kJ>(words), hn::Set(DU(), ((1u << kBits) - 1) * 0x10001u)));
}

// sum + the two products of each lane's pairs. No sum of a group passes 128 * 255 * 32767 < 2^31.
HWY_INLINE VI AddProducts(VI sum, VI w, VI x) {
#if HWY_TARGET == HWY_SCALAR
  const VI low = hn::And(w, hn::Set(DI(), 0xffff)), high = hn::ShiftRight<16>(w);
  sum = hn::Add(sum, hn::Mul(low, hn::ShiftRight<16>(hn::ShiftLeft<16>(x))));
  return hn::Add(sum, hn::Mul(high, hn::ShiftRight<16>(x)));
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
  // Not the intrinsic: Highway 1.0.3 compiles this target without AVX512-VNNI, which all its CPUs have.
  asm("vpdpwssd %2, %1, %0" : "+v"(sum.raw) : "v"(w.raw), "v"(x.raw));
  return sum;
#else
  const hn::Repartition<int16_t, DI> d16;
  VI odd = hn::Zero(DI());
  const VI even = hn::ReorderWidenMulAccumulate(DI(), hn::BitCast(d16, w), hn::BitCast(d16, x), hn::Zero(DI()), odd);
  return hn::Add(sum, hn::RearrangeToOddPlusEven(even, odd));
#endif
}

// ---- Rows of x ----

// A group of x as integers: x16 = round(x / x_scale) in `rounded`, then x_scale and x_scale * Σ x16. A bias is often larger
// than the weights that it is part of; with Σ x in place of the latter, the output would have all rounding errors times that
// bias.
struct RoundedGroup {
  float scale, sum;
};
HWY_INLINE RoundedGroup RoundGroup(int group, const float* HWY_RESTRICT x, int32_t* HWY_RESTRICT rounded) {
  const DF d;
  const DI di;
  // As integers the bits of |x| are in the order of |x|, NaN above all: it reaches the scale, and so the output.
  auto most = hn::Zero(di);
  for (int i = 0; i < group; i += kLanes) most = hn::Max(most, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + i))));
  const float largest = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, most)));
  // Below this the quotient would be infinite; the group counts as zeros.
  const auto inverse = hn::Set(d, largest > 1e-30f ? kLargest16 / largest : 0.0f);
  auto total = hn::Zero(di);
  for (int i = 0; i < group; i += kLanes) {
    auto v = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse));
    v = hn::Min(hn::Max(v, hn::Set(di, -int(kLargest16))), hn::Set(di, int(kLargest16)));
    hn::Store(v, di, rounded + i);
    total = hn::Add(total, v);
  }
  const float scale = largest / kLargest16;
  return {scale, scale * float(hn::GetLane(hn::SumOfLanes(di, total)))};
}

// Columns of a line, and words of a row that meet them.
constexpr int ColumnsOfLine(int bits) { return 32 / bits; }
constexpr int PairsOfLine(int bits) { return 16 / bits; }

// Some rounded columns as the weights' pairs of kBits lie.
#if HWY_TARGET == HWY_SCALAR
constexpr int kColumnsAtOnce = 8;
template <int kBits>
HWY_INLINE void PairUp(const int32_t* HWY_RESTRICT columns, int32_t* HWY_RESTRICT out) {
  for (int j = 0; j < 4; ++j) {
    const int32_t* pair = columns + (kBits == 8 && j > 1 ? 2 + j : PairColumn(kBits, j));
    out[j] = int32_t(uint32_t(pair[0] & 0xffff) | uint32_t(pair[2]) << 16);
  }
}
#else
constexpr int kColumnsAtOnce = std::max(8, kLanes);
template <int kBits>
HWY_INLINE void PairUp(const int32_t* HWY_RESTRICT columns, int32_t* HWY_RESTRICT out) {
  const DI d;
  // Of every four columns 0, 2 and 1, 3; then anything.
  const auto pairs = [&](const int32_t* at) HWY_ATTR {
    const VI v = hn::Load(d, at);
    return hn::Or(hn::And(v, hn::Set(d, 0xffff)), hn::ShiftLeft<16>(hn::Shuffle1032(v)));
  };
  if constexpr (kLanes == 4) {
    const VI low = pairs(columns), high = pairs(columns + 4);
    hn::Store(kBits == 8 ? hn::ConcatLowerLower(d, high, low) : hn::InterleaveLower(d, low, high), d, out);
  } else {
    HWY_ALIGN static constexpr int32_t kOrder4[16] = {0, 4, 1, 5, 8 % kLanes, 12 % kLanes, 9 % kLanes, 13 % kLanes};
    HWY_ALIGN static constexpr int32_t kOrder8[16] = {0, 1, 4, 5, 8 % kLanes, 9 % kLanes, 12 % kLanes, 13 % kLanes};
    const VI all = hn::TableLookupLanes(pairs(columns), hn::SetTableIndices(d, kBits == 8 ? kOrder8 : kOrder4));
    const hn::Half<DI> half;
    hn::Store(hn::LowerHalf(half, all), half, out);
  }
}
#endif

// A row is the `r`-th of `rows` that lie together. Of each group come their pairs, of one row after another those that
// meet a line, then their scales, then their sums.
template <int kBits, int kGroup>
void QuantizeRow(int k, const float* HWY_RESTRICT x, int r, int rows, int32_t* HWY_RESTRICT out) {
  constexpr int kPairs = PairsOfLine(kBits);
  for (int g = 0; g < k / kGroup; ++g, x += kGroup) {
    HWY_ALIGN int32_t rounded[kGroup], pairs[kGroup / 2];
    const RoundedGroup of = RoundGroup(kGroup, x, rounded);
    for (int i = 0; i < kGroup; i += kColumnsAtOnce) PairUp<kBits>(rounded + i, pairs + i / 2);
    int32_t* to = out + r * kPairs;
    for (int i = 0; i < kGroup / 2; i += kPairs, to += rows * kPairs) {
      std::memcpy(to, pairs + i, sizeof(int32_t) * kPairs);
    }
    out += kGroup / 2 * rows;
    out[r] = std::bit_cast<int32_t>(of.scale);
    out[rows + r] = std::bit_cast<int32_t>(of.sum);
    out += 2 * rows;
  }
}

template <int kBits>
void QuantizeRow(int group, int k, const float* x, int r, int rows, int32_t* out) {
  if (group == 16) QuantizeRow<kBits, 16>(k, x, r, rows, out);
  if (group == 32) QuantizeRow<kBits, 32>(k, x, r, rows, out);
  if (group == 64) QuantizeRow<kBits, 64>(k, x, r, rows, out);
  if (group == 128) QuantizeRow<kBits, 128>(k, x, r, rows, out);
}

const int32_t* PrepareInt16(ThreadPool& pool, const PackedPart& part, int k, const float* x, int rows) {
  const size_t words = int16_row_words(part, k);
  const bool few = few_rows<int32_t>(part, rows);
  auto* out = reinterpret_cast<int32_t*>(prepared_memory(size_t(rows) * words));
  const int size = rows_per_task(rows, pool.size());
  const RowGroups groups{rows};
  auto body = [&](size_t task, int) {
    const int last = std::min(rows, int(task + 1) * size);
    for (int row = int(task) * size; row < last; ++row) {
      // Of many rows each is alone.
      const int begin = few ? groups.begin(groups.of(row)) : row;
      const int together = few ? groups.begin(groups.of(row) + 1) - begin : 1;
      const float* from = x + size_t(row) * k;
      int32_t* to = out + size_t(begin) * words;
      if (part.word_bits() == 4) {
        QuantizeRow<4>(part.group, k, from, row - begin, together, to);
      } else {
        QuantizeRow<8>(part.group, k, from, row - begin, together, to);
      }
    }
  };
  pool.parallel_for(size_t((rows + size - 1) / size), std::ref(body));
  return out;
}

// ---- kRows rows that lie together times kPanels panels, straight from their packed form, added to sums:
// [kPanels][kRows][16] ----
//
// As much of the next panels, `ahead` bytes on, is brought into the cache as is read of these.

template <int kBits, int kJ, int kRows, int kPanels, int kAtOnce>
HWY_INLINE void PairStep(const std::byte* line, size_t panel_bytes, const int32_t* x,
                         VI (&dot)[kPanels][kAtOnce][kRows]) {
  VI w[kPanels][kAtOnce];
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kAtOnce; ++v) w[p][v] = PairOf<kBits, kJ>(LoadLine(line + p * panel_bytes, v));
  }
  for (int r = 0; r < kRows; ++r) {
    const VI pair = hn::Set(DI(), x[r * PairsOfLine(kBits) + kJ]);
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kAtOnce; ++v) dot[p][v][r] = AddProducts(dot[p][v][r], w[p][v], pair);
    }
  }
}

// The end of a group, whose scales are at `scales`; the rows' x_scale are at `of_x`, then x_scale * Σ x16.
template <class Kind, int kRows, int kPanels, int kAtOnce>
HWY_INLINE void AddPairGroup(const std::byte* scales, size_t panel_bytes, float zero, int first, const int32_t* of_x,
                             const VI (&dot)[kPanels][kAtOnce][kRows], float* HWY_RESTRICT sums) {
  const DF d;
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kAtOnce; ++v) {
      const int lane = (first + v) * kLanes;
      const VF scale = LoadFloats<Kind::kScale>(scales + p * panel_bytes, lane);
      const VF bias = LoadBiases<Kind>(scales + p * panel_bytes, scale, zero, lane);
      for (int r = 0; r < kRows; ++r) {
        const float x_scale = std::bit_cast<float>(of_x[r]), x_sum = std::bit_cast<float>(of_x[kRows + r]);
        float* at = sums + (p * kRows + r) * kPanel + lane;
        const VF scaled = hn::Mul(scale, hn::Set(d, x_scale));
        const VF sum = hn::MulAdd(hn::ConvertTo(d, dot[p][v][r]), scaled, hn::Load(d, at));
        hn::Store(hn::MulAdd(hn::Set(d, x_sum), bias, sum), d, at);
      }
    }
  }
}

template <int kBits, int kRows, int kPanels>
HWY_NOINLINE void PairPanels(const PackedPart& part, const std::byte* panel, ptrdiff_t ahead, int k0, int k1,
                             const int32_t* HWY_RESTRICT x, float* HWY_RESTRICT sums) {
  constexpr int kPairs = PairsOfLine(kBits), kAtOnce = VectorsOfPanel(kRows);
  const int lines = part.group / ColumnsOfLine(kBits);
  const size_t panel_bytes = part.panel_bytes, lines_step = part.group_bytes, scales_step = part.scales_step();
  const auto zero = float(part.zero);
  const std::byte *scales = part.scales(panel, k0 / part.group), *begin = part.lines(panel, k0 / part.group);
  for (; k0 < k1; k0 += part.group) {
    for (int first = 0; first < kVectors; first += kAtOnce) {
      VI dot[kPanels][kAtOnce][kRows];
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kAtOnce; ++v) {
          for (int r = 0; r < kRows; ++r) dot[p][v][r] = hn::Zero(DI());
        }
      }
      const std::byte* line = begin + size_t(first * kLanes) * 4;
      const int32_t* at = x;
      for (int i = 0; i < lines; ++i) {
        for (int p = 0; p < kPanels; ++p) fetch(line + ahead + p * panel_bytes);
        PairStep<kBits, 0>(line, panel_bytes, at, dot);
        PairStep<kBits, 1>(line, panel_bytes, at, dot);
        if constexpr (kBits == 4) {
          PairStep<kBits, 2>(line, panel_bytes, at, dot);
          PairStep<kBits, 3>(line, panel_bytes, at, dot);
        }
        at += kPairs * kRows;
        line += kAlignment;
      }
      if (part.zero != 0) {
        AddPairGroup<ScalesAroundZero>(scales, panel_bytes, zero, first, at, dot, sums);
        continue;
      }
      if (part.scale_type == Type::kF32) AddPairGroup<F32Scales>(scales, panel_bytes, zero, first, at, dot, sums);
      if (part.scale_type == Type::kF16) AddPairGroup<F16Scales>(scales, panel_bytes, zero, first, at, dot, sums);
      if (part.scale_type == Type::kBF16) AddPairGroup<Bf16Scales>(scales, panel_bytes, zero, first, at, dot, sums);
    }
    x += (part.group / 2 + 2) * kRows;
    begin += lines_step;
    scales += scales_step;
  }
}

template <int kRows, int kPanels>
HWY_INLINE void Vector(const PackedPart& part, const std::byte* panel, const std::byte* next, int k0, int k1,
                       const int32_t* x, float* sums) {
  if (part.word_bits() == 4) return PairPanels<4, kRows, kPanels>(part, panel, next - panel, k0, k1, x, sums);
  return PairPanels<8, kRows, kPanels>(part, panel, next - panel, k0, k1, x, sums);
}

// ---- Many rows: one panel's columns [k0, k1) as pairs, [pairs][16] i32, and per group its scales and biases, [2][16] ----

template <int kBits, int kJ>
HWY_INLINE void PairTo(VU words, int32_t* out) {
  hn::Store(PairOf<kBits, kJ>(words), DI(), out + kJ * kPanel);
}

template <int kBits, class Kind>
void UnpackPairs(const PackedPart& part, const std::byte* panel, int k0, int k1, int32_t* out) {
  constexpr int kPairs = 16 / kBits;
  const int lines = part.group * kBits / 32;
  for (int g = k0 / part.group; g < k1 / part.group; ++g) {
    const std::byte* line = part.lines(panel, g);
    for (int i = 0; i < lines; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const VU words = LoadLine(line, v);
        int32_t* to = out + v * kLanes;
        PairTo<kBits, 0>(words, to);
        PairTo<kBits, 1>(words, to);
        if constexpr (kBits == 4) {
          PairTo<kBits, 2>(words, to);
          PairTo<kBits, 3>(words, to);
        }
      }
      line += kAlignment;
      out += kPairs * kPanel;
    }
    StoreScales<Kind>(part.scales(panel, g), part.zero, reinterpret_cast<float*>(out));
    out += 2 * kPanel;
  }
}

template <int kBits>
void UnpackPairs(const PackedPart& part, const std::byte* panel, int k0, int k1, int32_t* out) {
  if (part.zero != 0) return UnpackPairs<kBits, ScalesAroundZero>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kF32) UnpackPairs<kBits, F32Scales>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kF16) UnpackPairs<kBits, F16Scales>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kBF16) UnpackPairs<kBits, Bf16Scales>(part, panel, k0, k1, out);
}

void UnpackPairs(const PackedPart& part, const std::byte* panel, int k0, int k1, int32_t* out) {
  if (part.word_bits() == 4) return UnpackPairs<4>(part, panel, k0, k1, out);
  UnpackPairs<8>(part, panel, k0, k1, out);
}

/// Groups of kPanels unpacked panels, `panel_words` apart, and of prepared rows, `stride` words apart.
struct PairBlock {
  const int32_t* panels;
  size_t panel_words;
  size_t stride;
  int groups, pairs;  // pairs of a group
  bool first;         // sums begin here; else they go on from what they hold
};

// kRows prepared rows times kPanels panels; sums [kPanels][kBlockRows][16].
template <int kRows, int kPanels>
HWY_NOINLINE void PairTile(const PairBlock& block, const int32_t* HWY_RESTRICT x, float* HWY_RESTRICT sums) {
  const DF d;
  const DI di;
  const int32_t* HWY_RESTRICT w = block.panels;
  const size_t stride = block.stride, panel_words = block.panel_words;
  const int pairs = block.pairs;
  if (block.first) {
    for (int p = 0; p < kPanels; ++p) {
      for (int i = 0; i < kRows * kPanel; i += kLanes) hn::Store(hn::Zero(d), d, sums + p * kBlockRows * kPanel + i);
    }
  }
  for (int g = 0; g < block.groups; ++g) {
    VI dot[kRows][kPanels][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVectors; ++v) dot[r][p][v] = hn::Zero(di);
      }
    }
    for (int i = 0; i < pairs; ++i) {
      VI now[kPanels][kVectors];
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVectors; ++v) now[p][v] = hn::Load(di, w + p * panel_words + v * kLanes);
      }
      w += kPanel;
      for (int r = 0; r < kRows; ++r) {
        const VI xr = hn::Set(di, x[r * stride + i]);
        for (int p = 0; p < kPanels; ++p) {
          for (int v = 0; v < kVectors; ++v) dot[r][p][v] = AddProducts(dot[r][p][v], now[p][v], xr);
        }
      }
    }
    x += pairs;
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const int32_t* scales = w + p * panel_words + v * kLanes;
        const VF scale = hn::BitCast(d, hn::Load(di, scales)), bias = hn::BitCast(d, hn::Load(di, scales + kPanel));
        for (int r = 0; r < kRows; ++r) {
          const VF x_scale = hn::BitCast(d, hn::Set(di, x[r * stride])), x_sum = hn::BitCast(d, hn::Set(di, x[r * stride + 1]));
          float* at = sums + (p * kBlockRows + r) * kPanel + v * kLanes;
          const VF sum = hn::MulAdd(hn::ConvertTo(d, dot[r][p][v]), hn::Mul(scale, x_scale), hn::Load(d, at));
          hn::Store(hn::MulAdd(x_sum, bias, sum), d, at);
        }
      }
    }
    w += 2 * kPanel;
    x += 2;
  }
}

template <int kRows, int kPanels>
HWY_INLINE void PairTiles(const PairBlock& block, const int32_t* x, int rows, float* sums) {
  for (; rows >= kRows; rows -= kRows) {
    PairTile<kRows, kPanels>(block, x, sums);
    x += kRows * block.stride;
    sums += kRows * kPanel;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) PairTiles<kRows - 1, kPanels>(block, x, rows, sums);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
