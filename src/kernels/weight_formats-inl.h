// Weights that kernels don't read where they lie: a few columns at a time become a panel of bytes in a core's L1, which
// the kernels of 8 bits read. So each format costs one function here, and its sums are those of the same weights in 8
// bits.
// Compiled once per target, as part of linear.cc.

#if defined(TORPOR_KERNELS_WEIGHT_FORMATS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_WEIGHT_FORMATS_INL
#undef TORPOR_KERNELS_WEIGHT_FORMATS_INL
#else
#define TORPOR_KERNELS_WEIGHT_FORMATS_INL
#endif

#include <hwy/highway.h>

#include <utility>

#include "kernels/linear_f32-inl.h"
#include "kernels/linear_int16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ---- One group of a panel as bytes: [group / 4][16 outputs][4 columns], and its [16] scales and [16] biases ----

// The kI-th four columns among those of a line of kWidth bits, each at bit kFrom of its byte.
template <int kWidth, int kFrom, int kI>
HWY_INLINE VU PlaneBytes(const std::byte* plane, int vector) {
  constexpr int kPerLine = 8 / kWidth, kShift = kI % kPerLine * kWidth;
  const VU line = LoadLine(plane + kI / kPerLine * kAlignment, vector);
  const VU mask = hn::Set(DU(), (((1u << kWidth) - 1) << kFrom) * 0x01010101u);
  if constexpr (kShift >= kFrom) {
    return hn::And(hn::ShiftRight<kShift - kFrom>(line), mask);
  } else {
    return hn::And(hn::ShiftLeft<kFrom - kShift>(line), mask);
  }
}

// The levels of codes: bytes without a sign. Those of E2M1 are 12 + 2 * the number; such a group has half its scale,
// and -12 times that as its bias.
constexpr int kE2m1Zero = 12;
HWY_INLINE VU LevelsOf(const uint8_t* levels, VU codes) {
#if HWY_TARGET == HWY_SCALAR
  const uint32_t four = hn::GetLane(codes);
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 8) out |= uint32_t(levels[(four >> i) & 15]) << i;
  return hn::Set(DU(), out);
#else
  const hn::Repartition<uint8_t, DU> d8;
  return hn::BitCast(DU(), hn::TableLookupBytes(hn::LoadDup128(d8, levels), hn::BitCast(d8, codes)));
#endif
}

// As much of the next panel, `ahead` bytes on, is brought into the cache as is read of this one.
// Where there are `levels`, codes become these.
template <int kLow, int kHigh, bool kLevels = false>
void JoinPlanes(const PackedPart& part, const std::byte* lines, ptrdiff_t ahead, uint32_t* HWY_RESTRICT out,
                const uint8_t* levels = nullptr) {
  // Words of 4 columns that fill whole lines of both planes.
  constexpr int kWords = kHigh == 0 ? 8 / kLow : 8 / std::min(kLow, kHigh);
  const std::byte* high = lines + part.plane_bytes(kLow);
  for (int done = 0; done < part.group; done += 4 * kWords) {
    for (int v = 0; v < kVectors; ++v) {
      [&]<size_t... kI>(std::index_sequence<kI...>) HWY_ATTR {
        const auto join = [&]<int kWord>() HWY_ATTR {
          VU bytes = PlaneBytes<kLow, 0, kWord>(lines, v);
          if constexpr (kHigh != 0) bytes = hn::Or(bytes, PlaneBytes<kHigh, kLow, kWord>(high, v));
          if constexpr (kLevels) bytes = LevelsOf(levels, bytes);
          hn::Store(bytes, DU(), out + kWord * kPanel + v * kLanes);
        };
        (join.template operator()<int(kI)>(), ...);
      }(std::make_index_sequence<kWords>());
    }
    out += kWords * kPanel;
    for (int i = 0; i < kWords * kLow / 8; ++i, lines += kAlignment) fetch(lines + ahead);
    for (int i = 0; i < kWords * kHigh / 8; ++i, high += kAlignment) fetch(high + ahead);
  }
}

// The E4M3 number at the top of each lane's u32, whatever is below it.
HWY_INLINE VF E4m3ToFloat(VU top) {
  // Sign, exponent and mantissa to their places in f32; its exponent is by 120 too small.
  const VI shifted = hn::ShiftRight<4>(hn::BitCast(DI(), top));
  const VI number = hn::And(shifted, hn::Set(DI(), int(0x87f00000u))), magnitude = hn::Set(DI(), 0x07f00000);
  const VF value = hn::Mul(hn::BitCast(DF(), number), hn::Set(DF(), 0x1p120f));
  const auto nan = hn::Eq(hn::And(number, magnitude), magnitude);
  return hn::IfThenElse(hn::RebindMask(DF(), nan), hn::BitCast(DF(), hn::Set(DI(), 0x7fc00000)), value);
}

// Scales of one byte; E8M0 is the exponent of an f32, 0 a subnormal one.
HWY_INLINE VF ByteScales(Type type, const std::byte* scales, int i) {
  const VU bytes = hn::PromoteTo(DU(), hn::LoadU(hn::Rebind<uint8_t, DU>(), reinterpret_cast<const uint8_t*>(scales) + i));
  if (type == Type::kNvfp4) return E4m3ToFloat(hn::ShiftLeft<24>(bytes));
  return hn::BitCast(DF(), hn::Max(hn::ShiftLeft<23>(bytes), hn::Set(DU(), 0x00400000u)));
}

// The scales and biases of group `g`, of a block at `block` whose scales have two levels: read_block_affine's.
void TwoLevelScales(const PackedPart& part, const std::byte* block, int g, ptrdiff_t ahead, float* HWY_RESTRICT out) {
  const BlockShape& shape = *part.two_level;
  const auto planes = part.integer_planes();
  const std::byte* lines = block + kAlignment;
  const int groups = part.groups_of_block(), of_block = g & (groups - 1);
  if (of_block == 0) {
    for (int i = 0; i <= planes.low_lines + planes.high_lines; ++i) fetch(block + ahead + i * int(kAlignment));
  }
  for (int v = 0; v < kVectors; ++v) {
    const auto integer = [&](int i) HWY_ATTR {
      VU value = hn::And(hn::ShiftRightSame(LoadLine(lines + i / 8 * kAlignment, v), i % 8 * 4), hn::Set(DU(), 15));
      if (planes.high_bits != 0) {
        const int per_line_bits = planes.high_bits == 2 ? 4 : 3;  // 16 or 8 in a line
        const std::byte* line = lines + size_t(planes.low_lines + (i >> per_line_bits)) * kAlignment;
        const int shift = (i & ((1 << per_line_bits) - 1)) * planes.high_bits;
        const VU above = hn::ShiftRightSame(LoadLine(line, v), shift);
        value = hn::Or(value, hn::ShiftLeft<4>(hn::And(above, hn::Set(DU(), (1u << planes.high_bits) - 1))));
      }
      return hn::BitCast(DI(), value);
    };
    const VF d = LoadFloats<Type::kF16>(block, size_t(v * kLanes));
    const auto centred = hn::Sub(integer(of_block), hn::Set(DI(), shape.scale_zero));
    const VF scale = hn::Mul(d, hn::ConvertTo(DF(), centred));
    VF bias;
    if (shape.minima) {
      const VF dmin = LoadFloats<Type::kF16>(block, size_t(kPanel + v * kLanes));
      bias = hn::Neg(hn::Mul(dmin, hn::ConvertTo(DF(), integer(groups + of_block))));
    } else {
      bias = hn::Mul(hn::Set(DF(), -float(shape.zero)), scale);
    }
    hn::Store(scale, DF(), out + v * kLanes);
    hn::Store(bias, DF(), out + kPanel + v * kLanes);
  }
}

// The scales and biases of group `g` of a panel, [2][16].
HWY_INLINE void GroupScales(const PackedPart& part, const std::byte* panel, int g, ptrdiff_t ahead,
                            float* HWY_RESTRICT out) {
  const std::byte* scales = part.scales(panel, g);
  if (part.two_level != nullptr) return TwoLevelScales(part, scales, g, ahead, out);
  if (part.type != Type::kAffine) {
    for (int i = 0; i < kPanel; i += kLanes) {
      const VF half = hn::Mul(ByteScales(part.type, scales, i), hn::Set(DF(), 0.5f));
      hn::Store(half, DF(), out + i);
      hn::Store(hn::Mul(half, hn::Set(DF(), -float(kE2m1Zero))), DF(), out + kPanel + i);
    }
    return;
  }
  if (part.zero != 0) return StoreScales<ScalesAroundZero>(scales, part.zero, out);
  if (part.scale_type == Type::kF32) StoreScales<F32Scales>(scales, part.zero, out);
  if (part.scale_type == Type::kF16) StoreScales<F16Scales>(scales, part.zero, out);
  if (part.scale_type == Type::kBF16) StoreScales<Bf16Scales>(scales, part.zero, out);
}

// Group `g` of a panel.
void GroupAsBytes(const PackedPart& part, const std::byte* panel, int g, ptrdiff_t ahead, uint32_t* lines, float* scales) {
  const std::byte* from = part.lines(panel, g);
  const auto [low, high] = part.planes;
  if (const Codebook codebook = part.codebook_of_codes(); codebook != Codebook::kNone) {
    JoinPlanes<4, 0, true>(part, from, ahead, lines, codebook_levels(codebook));
  } else if (low == 4 && high == 0) {
    JoinPlanes<4, 0>(part, from, ahead, lines);
  }
  if (low == 2 && high == 0) JoinPlanes<2, 0>(part, from, ahead, lines);
  if (low == 2 && high == 1) JoinPlanes<2, 1>(part, from, ahead, lines);
  if (low == 4 && high == 1) JoinPlanes<4, 1>(part, from, ahead, lines);
  if (low == 4 && high == 2) JoinPlanes<4, 2>(part, from, ahead, lines);
  GroupScales(part, panel, g, ahead, scales);
}

// ---- Columns [k0, k1) of a panel, of a format that is not read in place ----

// What groups become, as a part: bytes with f32 scales, `columns` of them in a panel.
PackedPart PartOfBytes(const PackedPart& part, int columns) {
  PackedPart bytes;
  bytes.type = Type::kAffine;
  bytes.group = part.group;
  bytes.planes = {8, 0};
  bytes.scale_type = Type::kF32;
  bytes.group_bytes = 2 * kPanel * sizeof(float) + bytes.plane_bytes(8);
  bytes.panel_bytes = bytes.group_bytes * size_t(columns / part.group);
  return bytes;
}

// `out` is a panel of `bytes`.
void PanelAsBytes(const PackedPart& part, const PackedPart& bytes, const std::byte* panel, int k0, int k1, ptrdiff_t ahead,
                  std::byte* out) {
  for (int g = k0 / part.group; g < k1 / part.group; ++g, out += bytes.group_bytes) {
    auto* scales = reinterpret_cast<float*>(out);
    GroupAsBytes(part, panel, g, ahead, reinterpret_cast<uint32_t*>(scales + 2 * kPanel), scales);
  }
}

// E4M3 codes as floats, the way PanelAsFloats has them; biases are 0.
void UnpackE4m3(const PackedPart& part, const std::byte* panel, int k0, int k1, float* out) {
  for (int g = k0 / part.group; g < k1 / part.group; ++g) {
    const std::byte* line = part.lines(panel, g);
    for (int i = 0; i < part.group; i += 4, line += kAlignment, out += 4 * kPanel) {
      for (int v = 0; v < kVectors; ++v) {
        const VU words = LoadLine(line, v);
        float* to = out + v * kLanes;
        hn::Store(E4m3ToFloat(hn::ShiftLeft<24>(words)), DF(), to);
        hn::Store(E4m3ToFloat(hn::ShiftLeft<16>(words)), DF(), to + kPanel);
        hn::Store(E4m3ToFloat(hn::ShiftLeft<8>(words)), DF(), to + 2 * kPanel);
        hn::Store(E4m3ToFloat(words), DF(), to + 3 * kPanel);
      }
    }
    for (int i = 0; i < kPanel; i += kLanes) {
      hn::Store(ByteScales(part.type, part.scales(panel, g), i), DF(), out + i);
      hn::Store(hn::Zero(DF()), DF(), out + kPanel + i);
    }
    out += 2 * kPanel;
  }
}

/// One group as bytes, with its scales and biases before them.
struct alignas(kAlignment) ByteGroup {
  std::byte bytes[(2 + kLargestGroup / 4) * kPanel * 4];
};

// As PanelAsFloats and UnpackPairs have them.
const float* AnyPanelAsFloats(const PackedPart& part, const std::byte* panel, int k0, int k1, float* scratch) {
  if (part.read_in_place()) return PanelAsFloats(part, panel, k0, k1, scratch);
  if (!part.integers()) {
    UnpackE4m3(part, panel, k0, k1, scratch);
    return scratch;
  }
  const PackedPart bytes = PartOfBytes(part, part.group);
  float* out = scratch;
  for (int k = k0; k < k1; k += part.group, out += (part.group + 2) * kPanel) {
    ByteGroup group;
    PanelAsBytes(part, bytes, panel, k, k + part.group, 0, group.bytes);
    PanelAsFloats(bytes, group.bytes, 0, part.group, out);
  }
  return scratch;
}

void UnpackAnyPairs(const PackedPart& part, const std::byte* panel, int k0, int k1, int32_t* out) {
  if (part.read_in_place()) return UnpackPairs(part, panel, k0, k1, out);
  const PackedPart bytes = PartOfBytes(part, part.group);
  for (int k = k0; k < k1; k += part.group, out += int16_panel_words(part, part.group)) {
    ByteGroup group;
    PanelAsBytes(part, bytes, panel, k, k + part.group, 0, group.bytes);
    UnpackPairs(bytes, group.bytes, 0, part.group, out);
  }
}

// ---- Groups of interleaved rows times kPanels panels of any format; sums of each group: [kPanels][rows][16] ----

// Equal steps of whole groups through k columns, of at most `most`, a multiple of all groups.
int BlockStep(const PackedPart& part, int k, int most) {
  const int steps = (k + most - 1) / most, step = (k + steps - 1) / steps;
  return part.group > 0 ? (step + part.group - 1) / part.group * part.group : step;
}

// Of panels that are read in place: as many columns as stay in L1 with those of a group's rows.
constexpr int kFewColumns = 1024;

// kRows: of the largest group. As much of the panels at `next` as of these is brought into the cache.
template <int kRows, int kPanels, class X>
void GroupsOfRows(const PackedPart& part, const std::byte* panel, const std::byte* next, int k, const X* x,
                  const RowGroups& groups, float* sums) {
  for (int i = 0; i < kPanels * groups.rows * kPanel; i += kLanes) hn::Store(hn::Zero(DF()), DF(), sums + i);
  const bool in_place = part.read_in_place();
  const int step = in_place ? BlockStep(part, k, groups.count == 1 ? k : kFewColumns) : kLargestGroup;
  const PackedPart bytes = in_place ? PackedPart{} : PartOfBytes(part, step);
  auto* scratch = reinterpret_cast<std::byte*>(linear_scratch().weights);
  static_assert(kPanels * (kLargestGroup / 4 + kLargestGroup / 16 * 2) * kPanel <= kBlockWords);
  for (int k0 = 0; k0 < k; k0 += step) {
    const int columns = std::min(k - k0, step);
    const std::byte *from = scratch, *then = scratch;
    const int begin_k = in_place ? k0 : 0, end_k = begin_k + columns;
    if (in_place) {
      from = panel;
      then = next;
    } else {
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* packed = panel + size_t(p) * part.panel_bytes;
        PanelAsBytes(part, bytes, packed, k0, k0 + columns, next - panel, scratch + size_t(p) * bytes.panel_bytes);
      }
    }
    for (int g = 0; g < groups.count; ++g, then = from) {
      const size_t begin = size_t(groups.begin(g)), size = size_t(groups.begin(g + 1)) - begin;
      const X* rows = x + begin * row_stride(part, k, x) + size * row_stride(part, k0, x);
      float* to = sums + begin * kPanels * kPanel;
      if (size == kRows) Vector<kRows, kPanels>(in_place ? part : bytes, from, then, begin_k, end_k, rows, to);
      if constexpr (kRows > 1) {
        if (size < kRows) Vector<kRows - 1, kPanels>(in_place ? part : bytes, from, then, begin_k, end_k, rows, to);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
