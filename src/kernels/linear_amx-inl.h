// Linear layers with 16-bit activations on AMX, for many rows: the integers and the sums are those of linear_int16-inl.h.
// Compiled once per target, as part of linear.cc; only targets whose CPUs may have AMX get it.

#if defined(TORPOR_KERNELS_LINEAR_AMX_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_LINEAR_AMX_INL
#undef TORPOR_KERNELS_LINEAR_AMX_INL
#else
#define TORPOR_KERNELS_LINEAR_AMX_INL
#endif

#include <hwy/highway.h>

#include "kernels/linear_blocks-inl.h"

#if TORPOR_HAVE_VNNI  // targets whose CPUs may have AMX
HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ---- Tiles ----
//
// Written as assembler: neither Highway nor its targets know AMX. No other code has tiles, so no compiler keeps any in use.
// tmm0 and tmm1 take the products of the high and the low bytes, tmm2 and tmm3 hold those bytes, tmm4 the weights.

// This thread's tiles have shapes while this lives.
class AmxTiles {
 public:
  explicit AmxTiles(int group) {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(Config) == 64);
    const int columns = std::min(group, kAmxColumns);
    const auto shape = [&](int tile, int rows, int row_bytes) {
      config.rows[tile] = uint8_t(rows);
      config.row_bytes[tile] = uint16_t(row_bytes);
    };
    for (const int sums : {0, 1}) shape(sums, kByteTileRows, kPanel * 4);
    for (const int rows : {2, 3}) shape(rows, kByteTileRows, columns);
    shape(4, columns / 4, kPanel * 4);
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~AmxTiles() { asm volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// dots, [2][16 rows][16 outputs]: a group's sums of products of the high bytes, and of the low ones.
template <int kGroup>
HWY_INLINE void AmxDots(const uint8_t* x, const uint32_t* w, int32_t* dots) {
  constexpr ptrdiff_t kLine = kPanel * 4;
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1" : : :);
  for (int i = 0; i < kGroup; i += kAmxColumns) {
    asm volatile(
        "tileloadd (%0, %3, 1), %%tmm2\n\t"
        "tileloadd (%2, %4, 1), %%tmm4\n\t"
        "tdpbsud %%tmm4, %%tmm2, %%tmm0\n\t"
        "tileloadd (%1, %3, 1), %%tmm3\n\t"
        "tdpbuud %%tmm4, %%tmm3, %%tmm1"
        :
        : "r"(x + i), "r"(x + kByteTileRows * kGroup + i), "r"(w + i / 4 * kPanel), "r"(ptrdiff_t{kGroup}), "r"(kLine)
        : "memory");
  }
  asm volatile(
      "tilestored %%tmm0, (%0, %2, 1)\n\t"
      "tilestored %%tmm1, (%1, %2, 1)"
      :
      : "r"(dots), "r"(dots + kByteTileRows * kPanel), "r"(kLine)
      : "memory");
}

// 16 prepared rows times `groups` groups of a panel; sums [16][16] go on from what they hold unless `first`.
template <int kGroup>
HWY_NOINLINE void AmxTile(const uint8_t* x, const uint32_t* w, int groups, bool first, float* HWY_RESTRICT sums) {
  const DF d;
  const DI di;
  constexpr int kDots = 2 * kByteTileRows * kPanel, kWords = (kGroup / 4 + 2) * kPanel;
  HWY_ALIGN int32_t dots[2][kDots];
  VF sum[kByteTileRows];
  for (int r = 0; r < kByteTileRows; ++r) sum[r] = first ? hn::Zero(d) : hn::Load(d, sums + r * kPanel);
  AmxDots<kGroup>(x, w, dots[0]);
  for (int g = 0; g < groups; ++g) {
    // The tiles work on the next group meanwhile.
    if (g + 1 < groups) AmxDots<kGroup>(x + byte_tile_group_bytes(kGroup), w + kWords, dots[(g + 1) % 2]);
    const auto* of_x = reinterpret_cast<const float*>(x + 2 * kByteTileRows * kGroup);
    const auto* scales = reinterpret_cast<const float*>(w + kGroup / 4 * kPanel);
    const VF scale = hn::Load(d, scales), bias = hn::Load(d, scales + kPanel);
    const int32_t *high = dots[g % 2], *low = high + kByteTileRows * kPanel;
    for (int r = 0; r < kByteTileRows; ++r) {
      const VI dot = hn::Add(hn::ShiftLeft<8>(hn::Load(di, high + r * kPanel)), hn::Load(di, low + r * kPanel));
      sum[r] = hn::MulAdd(hn::ConvertTo(d, dot), hn::Mul(scale, hn::Set(d, of_x[r])), sum[r]);
      sum[r] = hn::MulAdd(hn::Set(d, of_x[kByteTileRows + r]), bias, sum[r]);
    }
    x += byte_tile_group_bytes(kGroup);
    w += kWords;
  }
  for (int r = 0; r < kByteTileRows; ++r) hn::Store(sum[r], d, sums + r * kPanel);
}

void AmxTile(int group, const uint8_t* x, const uint32_t* w, int groups, bool first, float* sums) {
  if (group == 16) AmxTile<16>(x, w, groups, first, sums);
  if (group == 32) AmxTile<32>(x, w, groups, first, sums);
  if (group == 64) AmxTile<64>(x, w, groups, first, sums);
  if (group == 128) AmxTile<128>(x, w, groups, first, sums);
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();
#endif  // TORPOR_HAVE_VNNI

#endif  // per-target guard
