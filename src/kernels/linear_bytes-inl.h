// Few rows of 16-bit activations on x86 with VNNI, for integers that are not read in place: a row is two rows of bytes,
//
//   x16 = 256 * high + low,  Σ x16 * q = 256 * Σ high * q + Σ low * q
//
// which meet the weights' codes as soon as these are bytes in a register. The integers and the sums are those of
// linear_int16-inl.h, which other targets take.
// Compiled once per target, as part of linear.cc.

#if defined(TORPOR_KERNELS_LINEAR_BYTES_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_LINEAR_BYTES_INL
#undef TORPOR_KERNELS_LINEAR_BYTES_INL
#else
#define TORPOR_KERNELS_LINEAR_BYTES_INL
#endif

#include <hwy/highway.h>

#include <utility>

#include "kernels/weight_formats-inl.h"

#undef TORPOR_HAVE_VNNI
#if HWY_ARCH_X86_64 && HWY_TARGET <= HWY_AVX3_DL
#define TORPOR_HAVE_VNNI 1
#else
#define TORPOR_HAVE_VNNI 0
#endif

#if TORPOR_HAVE_VNNI
HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows that meet weights so, at most. Of more, the sums of two bytes take registers that pairs put to better use.
constexpr int kByteRows = 4;
inline bool meets_bytes(const PackedPart& part, int rows) { return rows <= kByteRows && !part.read_in_place(); }
// Panels that `rows` rows meet at once.
constexpr int BytePanelsAtOnce(int rows) { return std::min(8, int(std::bit_floor(unsigned(10 / rows)))); }

// ---- Rows of x: per group its high bytes (signed), its low ones, 128 * Σ low, x_scale and x_scale * Σ x16 ----

inline size_t byte_row_words(const PackedPart& part, int k) {
  return size_t(k) / 2 + size_t(k) / size_t(part.group) * 3;
}

// The low byte of each lane. (Not TruncateTo: Highway 1.0.3's picks the wrong bytes on AVX3_DL.)
HWY_INLINE void StoreLowBytes(VU v, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v.raw));
}

void QuantizeRowAsBytes(const PackedPart& part, int k, const float* HWY_RESTRICT x, int32_t* HWY_RESTRICT out) {
  for (int g = 0; g < k / part.group; ++g, x += part.group) {
    HWY_ALIGN int32_t rounded[kLargestGroup];
    const RoundedGroup of = RoundGroup(part.group, x, rounded);
    auto* high = reinterpret_cast<uint8_t*>(out);
    auto total = hn::Zero(DI());
    for (int i = 0; i < part.group; i += kLanes) {
      const VU v = hn::BitCast(DU(), hn::Load(DI(), rounded + i));
      StoreLowBytes(hn::ShiftRight<8>(v), high + i);
      StoreLowBytes(v, high + part.group + i);
      total = hn::Add(total, hn::BitCast(DI(), hn::And(v, hn::Set(DU(), 255))));
    }
    out += part.group / 2;
    *out++ = 128 * hn::GetLane(hn::SumOfLanes(DI(), total));
    *out++ = std::bit_cast<int32_t>(of.scale);
    *out++ = std::bit_cast<int32_t>(of.sum);
  }
}

const int32_t* PrepareFewBytes(ThreadPool& pool, const PackedPart& part, int k, const float* x, int rows) {
  const size_t words = byte_row_words(part, k);
  auto* out = reinterpret_cast<int32_t*>(prepared_memory(size_t(rows) * words * 2));
  const int size = rows_per_task(rows, pool.size());
  auto body = [&](size_t task, int) {
    const int last = std::min(rows, int(task + 1) * size);
    for (int row = int(task) * size; row < last; ++row) {
      QuantizeRowAsBytes(part, k, x + size_t(row) * k, out + size_t(row) * words);
    }
  };
  pool.parallel_for(size_t((rows + size - 1) / size), std::ref(body));
  return interleave(out, rows, words, out + size_t(rows) * words);
}

// ---- kRows interleaved rows times kPanels panels; sums: [kPanels][kRows][16] ----

// sum + the four products of each lane's bytes, of which those of `u` have no sign and those of `s` have one.
HWY_INLINE VI AddByteProducts(VI sum, VU u, VU s) {
  // Not the intrinsic: Highway 1.0.3 compiles this target without AVX512-VNNI, which all its CPUs have.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(u.raw), "v"(s.raw));
  return sum;
}

// The kI-th four codes of a group's `lines`, of which `high` are those of the high bits.
template <int kLow, int kHigh, int kI>
HWY_INLINE VU CodesOf(const std::byte* lines, const std::byte* high) {
  if constexpr (kHigh == 0) {
    return PlaneBytes<kLow, 0, kI>(lines, 0);
  } else {
    return hn::Or(PlaneBytes<kLow, 0, kI>(lines, 0), PlaneBytes<kHigh, kLow, kI>(high, 0));
  }
}

// As much of the next panels, `ahead` bytes on, is brought into the cache as is read of these.
template <int kLow, int kHigh, bool kLevels, int kRows, int kPanels>
HWY_NOINLINE void BytePanels(const PackedPart& part, const std::byte* panel, ptrdiff_t ahead, int k,
                             const int32_t* HWY_RESTRICT x, float* HWY_RESTRICT sums) {
  constexpr int kWords = kHigh == 0 ? 8 / kLow : 8 / std::min(kLow, kHigh);  // that fill whole lines of both planes
  constexpr int kLowLines = kWords * kLow / 8, kHighLines = kWords * kHigh / 8;
  const DF d;
  const int words = part.group / 4;
  const size_t panel_bytes = part.panel_bytes, low_bytes = part.plane_bytes(kLow);
  const uint8_t* levels = kLevels ? codebook_levels(part.codebook_of_codes()) : nullptr;
  for (int i = 0; i < kPanels * kRows; ++i) hn::Store(hn::Zero(d), d, sums + i * kPanel);
  for (int g = 0; g < k / part.group; ++g) {
    VI high[kPanels][kRows], low[kPanels][kRows];
    for (int p = 0; p < kPanels; ++p) {
      for (int r = 0; r < kRows; ++r) {
        high[p][r] = hn::Zero(DI());
        // Levels may pass 127: they get a sign by taking 128 off, which `low` begins with, times Σ low.
        low[p][r] = kLevels ? hn::Set(DI(), x[2 * words * kRows + r]) : hn::Zero(DI());
      }
    }
    const std::byte *line = part.lines(panel, g), *above = line + low_bytes;
    const int32_t *x_high = x, *x_low = x + words * kRows;
    for (int done = 0; done < words; done += kWords) {
      const auto step = [&]<int kI>() HWY_ATTR {
        VU w[kPanels];
        for (int p = 0; p < kPanels; ++p) {
          w[p] = CodesOf<kLow, kHigh, kI>(line + p * panel_bytes, above + p * panel_bytes);
          if constexpr (kLevels) w[p] = LevelsOf(levels, w[p]);
        }
        for (int r = 0; r < kRows; ++r) {
          const VU of_high = hn::Set(DU(), uint32_t(x_high[kI * kRows + r]));
          const VU of_low = hn::Set(DU(), uint32_t(x_low[kI * kRows + r]));
          for (int p = 0; p < kPanels; ++p) {
            high[p][r] = AddByteProducts(high[p][r], w[p], of_high);
            const VU with_sign = kLevels ? hn::Xor(w[p], hn::Set(DU(), 0x80808080u)) : w[p];
            low[p][r] = AddByteProducts(low[p][r], of_low, with_sign);
          }
        }
      };
      [&]<size_t... kI>(std::index_sequence<kI...>) HWY_ATTR {
        (step.template operator()<int(kI)>(), ...);
      }(std::make_index_sequence<kWords>());
      for (int p = 0; p < kPanels; ++p) {
        for (int i = 0; i < kLowLines; ++i) fetch(line + ahead + p * panel_bytes + i * int(kAlignment));
        for (int i = 0; i < kHighLines; ++i) fetch(above + ahead + p * panel_bytes + i * int(kAlignment));
      }
      line += kLowLines * kAlignment;
      above += kHighLines * kAlignment;
      x_high += kWords * kRows;
      x_low += kWords * kRows;
    }
    x += 2 * words * kRows;
    for (int p = 0; p < kPanels; ++p) {
      HWY_ALIGN float scales[2 * kPanel];
      GroupScales(part, panel + p * panel_bytes, g, ahead, scales);
      const VF scale = hn::Load(d, scales), bias = hn::Load(d, scales + kPanel);
      for (int r = 0; r < kRows; ++r) {
        const float x_scale = std::bit_cast<float>(x[kRows + r]), x_sum = std::bit_cast<float>(x[2 * kRows + r]);
        float* at = sums + (p * kRows + r) * kPanel;
        const VI dot = hn::Add(hn::ShiftLeft<8>(high[p][r]), low[p][r]);
        const VF sum = hn::MulAdd(hn::ConvertTo(d, dot), hn::Mul(scale, hn::Set(d, x_scale)), hn::Load(d, at));
        hn::Store(hn::MulAdd(hn::Set(d, x_sum), bias, sum), d, at);
      }
    }
    x += 3 * kRows;
  }
}

template <int kRows, int kPanels>
HWY_INLINE void ByteVector(const PackedPart& part, const std::byte* panel, const std::byte* next, int k,
                           const int32_t* x, float* sums) {
  const ptrdiff_t ahead = next - panel;
  const auto run = [&]<int kLow, int kHigh, bool kLevels>() HWY_ATTR {
    BytePanels<kLow, kHigh, kLevels, kRows, kPanels>(part, panel, ahead, k, x, sums);
  };
  if (part.codebook_of_codes() != Codebook::kNone) return run.template operator()<4, 0, true>();
  const auto [low, high] = part.planes;
  if (low == 4 && high == 0) return run.template operator()<4, 0, false>();
  if (low == 4 && high == 1) return run.template operator()<4, 1, false>();
  if (low == 4 && high == 2) return run.template operator()<4, 2, false>();
  if (low == 2 && high == 0) return run.template operator()<2, 0, false>();
  if (low == 2 && high == 1) return run.template operator()<2, 1, false>();
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();
#endif  // TORPOR_HAVE_VNNI

#endif  // per-target guard
