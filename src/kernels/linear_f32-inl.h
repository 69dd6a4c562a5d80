// Linear layers with f32 activations: the weights unpacked and multiplied, a tile of rows or a single one.
// Compiled once per target, as part of linear.cc.

#if defined(TORPOR_KERNELS_LINEAR_F32_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_LINEAR_F32_INL
#undef TORPOR_KERNELS_LINEAR_F32_INL
#else
#define TORPOR_KERNELS_LINEAR_F32_INL
#endif

#include <hwy/highway.h>

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

// By how many registers there are: rows of a tile; the most sums of few rows that are kept in registers; and those of a
// single row, enough to hide the latency of their chains. Highway numbers targets from the newest to the oldest, so one
// that it gains is no smaller than its elders.
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
constexpr int kTileRows = 12, kSums = 24, kSumsOfOne = 8;
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
constexpr int kTileRows = 6, kSums = 12, kSumsOfOne = 8;
#elif HWY_ARCH_ARM && HWY_TARGET < HWY_EMU128  // NEON; scalable vectors are left out of the build
constexpr int kTileRows = 5, kSums = 24, kSumsOfOne = 8;
#else
static_assert(HWY_TARGET >= (HWY_ARCH_ARM ? HWY_EMU128 : HWY_SSE4), "This target has registers for a larger tile.");
constexpr int kTileRows = 2, kSums = 12, kSumsOfOne = kVectors;
#endif

// Vectors of weights that `rows` rows meet at once: a power of two.
constexpr int VectorsAtOnce(int rows) { return std::min(kSumsOfOne, int(std::bit_floor(unsigned(kSums / rows)))); }
// ... as panels, and as vectors of each.
constexpr int PanelsAtOnce(int rows) { return std::max(1, VectorsAtOnce(rows) / kVectors); }
constexpr int VectorsOfPanel(int rows) { return std::min(kVectors, VectorsAtOnce(rows)); }

// Whether a part's rows, f32 or pairs, are few: each weight is unpacked into a register for every group of them. Of
// many rows it is unpacked once, into memory. That costs more where registers are many and bits are masked fast.
template <class X>
bool few_rows(const PackedPart& part, int rows) {
  if (part.group == 0) return rows == 1;  // of floats
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3_DL
  constexpr int kMost = std::is_same_v<X, int32_t> ? kBlockRows : 32;
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  constexpr int kMost = 32;
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
  constexpr int kMost = 24;
#else
  constexpr int kMost = kTogether;
#endif
  return part.integers() && rows <= kMost;
}

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

// What the end of a group reads: f32, f16 or bf16 scales and biases, or f16 scales alone, around a zero. Each has code
// of its own: a condition where sums are in registers sends these to memory.
template <Type kType, bool kAroundZero = false>
struct ScaleKind {
  static constexpr Type kScale = kType;
  static constexpr bool kZero = kAroundZero;
};
using F32Scales = ScaleKind<Type::kF32>;
using F16Scales = ScaleKind<Type::kF16>;
using Bf16Scales = ScaleKind<Type::kBF16>;
using ScalesAroundZero = ScaleKind<Type::kF16, true>;

// A group's biases from lane `lane` on, where `scale` are its scales.
template <class Kind>
HWY_INLINE VF LoadBiases(const std::byte* scales, VF scale, float zero, int lane) {
  if constexpr (Kind::kZero) return hn::Mul(hn::Set(DF(), -zero), scale);
  return LoadFloats<Kind::kScale>(scales, size_t(kPanel + lane));
}

// A group's [16] scales, and its [16] biases.
template <class Kind>
HWY_INLINE void StoreScales(const std::byte* scales, int zero, float* HWY_RESTRICT out) {
  for (int i = 0; i < kPanel; i += kLanes) {
    const VF scale = LoadFloats<Kind::kScale>(scales, size_t(i));
    hn::Store(scale, DF(), out + i);
    hn::Store(LoadBiases<Kind>(scales, scale, float(zero), i), DF(), out + kPanel + i);
  }
}

// Bit position of the J-th weight in a u32. Unpack leaves the weight at that position, so its result is too large by
// two to that power. The top weight would set the sign bit, so Unpack shifts it down.
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
  HWY_ALIGN static constexpr float kOnes[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  const float* scale = !part.integers() ? kOnes : part.word_bits() == 4 ? kScale4 : kScale8;
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
  if (part.group == 0) return x;
  const size_t columns = size_t(prepared_columns(part, k));
  const bool few = few_rows<float>(part, rows);
  float* out = prepared_memory(size_t(rows) * columns * (few ? 2 : 1));
  const int size = rows_per_task(rows, pool.size());
  auto body = [&](size_t task, int) {
    const int last = std::min(rows, int(task + 1) * size);
    for (int row = int(task) * size; row < last; ++row) {
      PrepareRow(part, k, x + size_t(row) * k, out + size_t(row) * columns);
    }
  };
  pool.parallel_for(size_t((rows + size - 1) / size), std::ref(body));
  if (few) return interleave(out, rows, columns, out + size_t(rows) * columns);
  return out;
}

// ---- One panel's columns [k0, k1) to f32: [columns][16], and of quantized weights per group its scales and biases, [2][16] ----

template <int kBits, int kJ>
HWY_INLINE void UnpackTo(VU line, float* out) {
  hn::Store(Unpack<kBits, kJ>(line), DF(), out + kJ * kPanel);
}

template <int kBits, class Kind>
void UnpackQuantized(const PackedPart& part, const std::byte* panel, int k0, int k1, float* out) {
  constexpr int kPerLine = 32 / kBits;
  const int lines = part.group / kPerLine;
  for (int g = k0 / part.group; g < k1 / part.group; ++g) {
    const std::byte* line = part.lines(panel, g);
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
    StoreScales<Kind>(part.scales(panel, g), part.zero, out);
    out += 2 * kPanel;
  }
}

template <int kBits>
void UnpackQuantized(const PackedPart& part, const std::byte* panel, int k0, int k1, float* out) {
  if (part.zero != 0) return UnpackQuantized<kBits, ScalesAroundZero>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kF32) UnpackQuantized<kBits, F32Scales>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kF16) UnpackQuantized<kBits, F16Scales>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kBF16) UnpackQuantized<kBits, Bf16Scales>(part, panel, k0, k1, out);
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
      if (part.word_bits() == 4) {
        UnpackQuantized<4>(part, panel, k0, k1, scratch);
      } else {
        UnpackQuantized<8>(part, panel, k0, k1, scratch);
      }
      break;
    default:  // not read in place
      break;
  }
  return scratch;
}

// ---- kRows prepared rows times kPanels panels of floats ----

// Panels that a tile of rows meets at once: of one, with vectors as wide as it, loads would be as many as multiply-adds.
constexpr int kTilePanels = kVectors == 1 && kTileRows > 6 ? 2 : 1;

// k columns of panels, in groups of `group` (0: float weights, in one piece), and of rows `stride` floats apart.
struct FloatBlock {
  const float* panels[kTilePanels];
  size_t stride;
  int k, group;
  bool first;  // sums begin here; else they go on from what they hold
};

// sums: [kPanels][kBlockRows][16].
template <int kRows, int kPanels, bool kGroups>
HWY_NOINLINE void Tile(const FloatBlock& block, const float* HWY_RESTRICT x, float* HWY_RESTRICT sums) {
  const DF d;
  const size_t stride = block.stride;
  const float* HWY_RESTRICT panel[kPanels];
  for (int p = 0; p < kPanels; ++p) panel[p] = block.panels[p];
  const auto at = [&](int r, int p, int v) { return sums + (p * kBlockRows + r) * kPanel + v * kLanes; };
  const auto each = [&](const auto& run) HWY_ATTR {
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVectors; ++v) run(r, p, v);
      }
    }
  };
  VF acc[kRows][kPanels][kVectors];
  if (block.first) each([&](int r, int p, int v) HWY_ATTR { hn::Store(hn::Zero(d), d, at(r, p, v)); });
  const int step = kGroups ? block.group : block.k;
  int done = 0;
  do {
    each([&](int r, int p, int v) HWY_ATTR { acc[r][p][v] = kGroups ? hn::Zero(d) : hn::Load(d, at(r, p, v)); });
    for (int i = 0; i < step; ++i) {
      VF w[kPanels][kVectors];
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVectors; ++v) w[p][v] = hn::Load(d, panel[p] + v * kLanes);
        panel[p] += kPanel;
      }
      for (int r = 0; r < kRows; ++r) {
        const VF xr = hn::Set(d, x[r * stride + i]);
        for (int p = 0; p < kPanels; ++p) {
          for (int v = 0; v < kVectors; ++v) acc[r][p][v] = hn::MulAdd(xr, w[p][v], acc[r][p][v]);
        }
      }
    }
    x += step;
    if constexpr (kGroups) {
      each([&](int r, int p, int v) HWY_ATTR {
        const VF scale = hn::Load(d, panel[p] + v * kLanes), bias = hn::Load(d, panel[p] + kPanel + v * kLanes);
        const VF sum = hn::MulAdd(acc[r][p][v], scale, hn::Load(d, at(r, p, v)));
        hn::Store(hn::MulAdd(hn::Set(d, x[r * stride]), bias, sum), d, at(r, p, v));
      });
      for (int p = 0; p < kPanels; ++p) panel[p] += 2 * kPanel;
      x += 1;
    }
    done += step;
  } while (done < block.k);
  if constexpr (!kGroups) each([&](int r, int p, int v) HWY_ATTR { hn::Store(acc[r][p][v], d, at(r, p, v)); });
}

template <int kRows, int kPanels, bool kGroups>
HWY_INLINE void Tiles(const FloatBlock& block, const float* x, int rows, float* sums) {
  for (; rows >= kRows; rows -= kRows) {
    Tile<kRows, kPanels, kGroups>(block, x, sums);
    x += kRows * block.stride;
    sums += kRows * kPanel;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) Tiles<kRows - 1, kPanels, kGroups>(block, x, rows, sums);
  }
}

// `panels` panels, kTilePanels or 1.
template <bool kGroups>
void Tiles(const FloatBlock& block, int panels, const float* x, int rows, float* sums) {
  if (panels == kTilePanels) return Tiles<kTileRows, kTilePanels, kGroups>(block, x, rows, sums);
  Tiles<kTileRows, 1, kGroups>(block, x, rows, sums);
}

// ---- kRows interleaved rows times kPanels panels, straight from their packed form: a weight is unpacked
// ---- once, into a register, and meets all rows. sums: [kPanels][kRows][16]; those of quantized weights are added to
// ----
//
// As much of the next panels, `ahead` bytes on, is brought into the cache as is read of these.

template <int kBits, int kJ, int kRows, int kPanels, int kAtOnce>
HWY_INLINE void Step(const std::byte* line, size_t panel_bytes, const float* x,
                     VF (&dot)[kPanels][kAtOnce][kRows]) {
  // Whichever are fewer wait in registers for the others.
  if constexpr (kRows <= kPanels * kAtOnce) {
    VF xk[kRows];
    for (int r = 0; r < kRows; ++r) xk[r] = hn::Set(DF(), x[kJ * kRows + r]);
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kAtOnce; ++v) {
        const VF w = Unpack<kBits, kJ>(LoadLine(line + p * panel_bytes, v));
        for (int r = 0; r < kRows; ++r) dot[p][v][r] = hn::MulAdd(xk[r], w, dot[p][v][r]);
      }
    }
  } else {
    VF w[kPanels][kAtOnce];
    for (int p = 0; p < kPanels; ++p) {
      for (int v = 0; v < kAtOnce; ++v) w[p][v] = Unpack<kBits, kJ>(LoadLine(line + p * panel_bytes, v));
    }
    for (int r = 0; r < kRows; ++r) {
      const VF xk = hn::Set(DF(), x[kJ * kRows + r]);
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kAtOnce; ++v) dot[p][v][r] = hn::MulAdd(xk, w[p][v], dot[p][v][r]);
      }
    }
  }
}

// The end of a group, whose scales are at `scales`; the rows' Σ x are at `x_sum`. sums: from vector `first` on.
template <class Kind, int kRows, int kPanels, int kAtOnce>
HWY_INLINE void AddGroup(const std::byte* scales, size_t panel_bytes, float zero, int first, const float* x_sum,
                         const VF (&dot)[kPanels][kAtOnce][kRows], float* HWY_RESTRICT sums) {
  const DF d;
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kAtOnce; ++v) {
      const int lane = (first + v) * kLanes;
      const VF scale = LoadFloats<Kind::kScale>(scales + p * panel_bytes, lane);
      const VF bias = LoadBiases<Kind>(scales + p * panel_bytes, scale, zero, lane);
      for (int r = 0; r < kRows; ++r) {
        float* at = sums + (p * kRows + r) * kPanel + lane;
        const VF sum = hn::MulAdd(dot[p][v][r], scale, hn::Load(d, at));
        hn::Store(hn::MulAdd(hn::Set(d, x_sum[r]), bias, sum), d, at);
      }
    }
  }
}

template <int kBits, int kRows, int kPanels>
HWY_NOINLINE void VectorQuantized(const PackedPart& part, const std::byte* panel, ptrdiff_t ahead, int k0, int k1,
                                  const float* HWY_RESTRICT x, float* HWY_RESTRICT sums) {
  constexpr int kPerLine = 32 / kBits, kAtOnce = VectorsOfPanel(kRows);
  const DF d;
  const int lines = part.group / kPerLine;
  const size_t panel_bytes = part.panel_bytes, lines_step = part.group_bytes, scales_step = part.scales_step();
  const auto zero = float(part.zero);
  const std::byte *scales = part.scales(panel, k0 / part.group), *begin = part.lines(panel, k0 / part.group);
  for (; k0 < k1; k0 += part.group) {
    for (int first = 0; first < kVectors; first += kAtOnce) {
      VF dot[kPanels][kAtOnce][kRows];
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kAtOnce; ++v) {
          for (int r = 0; r < kRows; ++r) dot[p][v][r] = hn::Zero(d);
        }
      }
      const std::byte* line = begin + size_t(first * kLanes) * 4;
      const float* at = x;
      for (int i = 0; i < lines; ++i) {
        for (int p = 0; p < kPanels; ++p) fetch(line + ahead + p * panel_bytes);
        Step<kBits, 0>(line, panel_bytes, at, dot);
        Step<kBits, 1>(line, panel_bytes, at, dot);
        Step<kBits, 2>(line, panel_bytes, at, dot);
        Step<kBits, 3>(line, panel_bytes, at, dot);
        if constexpr (kBits == 4) {
          Step<kBits, 4>(line, panel_bytes, at, dot);
          Step<kBits, 5>(line, panel_bytes, at, dot);
          Step<kBits, 6>(line, panel_bytes, at, dot);
          Step<kBits, 7>(line, panel_bytes, at, dot);
        }
        at += kPerLine * kRows;
        line += kAlignment;
      }
      if (part.zero != 0) {
        AddGroup<ScalesAroundZero>(scales, panel_bytes, zero, first, at, dot, sums);
        continue;
      }
      if (part.scale_type == Type::kF32) AddGroup<F32Scales>(scales, panel_bytes, zero, first, at, dot, sums);
      if (part.scale_type == Type::kF16) AddGroup<F16Scales>(scales, panel_bytes, zero, first, at, dot, sums);
      if (part.scale_type == Type::kBF16) AddGroup<Bf16Scales>(scales, panel_bytes, zero, first, at, dot, sums);
    }
    x += (part.group + 1) * kRows;
    begin += lines_step;
    scales += scales_step;
  }
}

template <Type kType, int kPanels>
HWY_INLINE void VectorFloats(const PackedPart& part, const std::byte* panel, ptrdiff_t ahead, int k, const float* x, float* sums) {
  const DF d;
  VF acc[kPanels][kVectors];
  for (int p = 0; p < kPanels; ++p) {
    for (int v = 0; v < kVectors; ++v) acc[p][v] = hn::Zero(d);
  }
  for (int i = 0; i < k; ++i) {
    const VF xk = hn::Set(d, x[i]);
    for (int p = 0; p < kPanels; ++p) {
      fetch(panel + ahead + p * part.panel_bytes + size_t(i) * kPanel * type_size(kType));
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

// The same for columns [k0, k1) of weights that are read in place; float weights take one row, and all columns.
template <int kRows, int kPanels>
HWY_INLINE void Vector(const PackedPart& part, const std::byte* panel, const std::byte* next, int k0, int k1,
                       const float* x, float* sums) {
  const ptrdiff_t ahead = next - panel;
  if (part.type == Type::kAffine) {
    if (part.word_bits() == 4) return VectorQuantized<4, kRows, kPanels>(part, panel, ahead, k0, k1, x, sums);
    return VectorQuantized<8, kRows, kPanels>(part, panel, ahead, k0, k1, x, sums);
  }
  if constexpr (kRows == 1) {
    if (part.type == Type::kF32) VectorFloats<Type::kF32, kPanels>(part, panel, ahead, k1, x, sums);
    if (part.type == Type::kF16) VectorFloats<Type::kF16, kPanels>(part, panel, ahead, k1, x, sums);
    if (part.type == Type::kBF16) VectorFloats<Type::kBF16, kPanels>(part, panel, ahead, k1, x, sums);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
