// Rows of the cache as the attention kernel reads and writes them, once per target: element types, and blocks of rows
// turned into what the products want. Included by attention-inl.h.

#if defined(TORPOR_KERNELS_ATTENTION_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_ATTENTION_ROWS_INL_H_
#undef TORPOR_KERNELS_ATTENTION_ROWS_INL_H_
#else
#define TORPOR_KERNELS_ATTENTION_ROWS_INL_H_
#endif

#include <cstring>

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kSumLanes>;
using VF = hn::Vec<DF>;
constexpr size_t kLanes = hn::MaxLanes(DF()), kSumParts = kSumLanes / kLanes;

// ---- the cache's element types

struct RowsF32 {
  using Element = float;
  static constexpr bool kIsFloat = true;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const float* p) {
    return hn::LoadU(d, p);
  }
  static HWY_INLINE void store(const float* from, size_t n, float* to) { std::memcpy(to, from, n * sizeof(float)); }
};

/// A block that was made f32 in a worker's own memory.
struct RowsWidened : RowsF32 {};

struct RowsBF16 {
  using Element = uint16_t;
  static constexpr bool kIsFloat = false;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const uint16_t* p) {
    const hn::Rebind<uint32_t, D> d32;
    const hn::Rebind<uint16_t, D> d16;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, p))));
  }
  static HWY_INLINE void store(const float* from, size_t n, uint16_t* to) {
    for (size_t i = 0; i < n; ++i) {
      uint32_t u;
      std::memcpy(&u, from + i, 4);
      const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
      to[i] = uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
    }
  }
};

#undef TORPOR_HAVE_F16
// By the order of targets, as in linear_f32-inl.h, so that those that Highway gains convert in hardware too.
#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)) || (HWY_ARCH_ARM && HWY_TARGET < HWY_EMU128)
#define TORPOR_HAVE_F16 1
#else
#define TORPOR_HAVE_F16 0
#endif

struct RowsF16 {
  using Element = uint16_t;
  static constexpr bool kIsFloat = false;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const uint16_t* p) {
#if TORPOR_HAVE_F16
    const hn::Rebind<hwy::float16_t, D> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
#else
    // Exponent and mantissa moved into place and rescaled: exact for normal and subnormal numbers; the rest by mask.
    const hn::Rebind<uint32_t, D> d32;
    const hn::Rebind<uint16_t, D> d16;
    const auto half = hn::PromoteTo(d32, hn::LoadU(d16, p));
    const auto magnitude = hn::ShiftLeft<13>(hn::And(half, hn::Set(d32, 0x7fffu)));
    const auto sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(d32, 0x8000u)));
    const auto finite = hn::BitCast(d32, hn::Mul(hn::BitCast(d, magnitude), hn::Set(d, 0x1p112f)));
    const auto special = hn::Or(magnitude, hn::Set(d32, 0x7f800000u));
    const auto exponent = hn::Set(d32, 0x7c00u << 13);
    const auto is_special = hn::Eq(hn::And(magnitude, exponent), exponent);
    return hn::BitCast(d, hn::Or(sign, hn::IfThenElse(is_special, special, finite)));
#endif
  }
  static HWY_INLINE uint16_t encode(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    const uint32_t sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return uint16_t(sign | 0x7e00 | ((u >> 13) & 0x3ff));
    if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (u >= 0x38800000) return uint16_t(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13));
    // Subnormal: adding 0.5 leaves the multiple of 2^-24, rounded to even, in the low mantissa bits.
    float magnitude;
    std::memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    std::memcpy(&u, &magnitude, 4);
    return uint16_t(sign | (u - 0x3f000000));
  }
  static HWY_INLINE void store(const float* from, size_t n, uint16_t* to) {
    size_t i = 0;
#if TORPOR_HAVE_F16
    const DF d;
    const hn::Rebind<hwy::float16_t, DF> d16;
    for (; i + kLanes <= n; i += kLanes) {
      hn::StoreU(hn::DemoteTo(d16, hn::LoadU(d, from + i)), d16, reinterpret_cast<hwy::float16_t*>(to + i));
    }
#endif
    for (; i < n; ++i) to[i] = encode(from[i]);
  }
};

/// One element, wherever whole vectors don't fit.
template <class Rows>
HWY_INLINE float load_one(const typename Rows::Element* p) {
  const hn::CappedTag<float, 1> d1;
  return hn::GetLane(Rows::load(d1, p));
}

// ---- blocks of keys and values as f32

/// One head's keys and values of a block, as the cache holds them.
template <class Element>
struct Block {
  const Element* keys;
  const Element* values;
};

#if HWY_TARGET != HWY_SCALAR

/// Transposes N rows by N columns; the rows begin at `row(0)`, ..., `row(N - 1)`.
template <class Row>
HWY_INLINE void transpose_square(const Row& row, float* HWY_RESTRICT out) {
  const hn::CappedTag<float, 8> d;
  const hn::Repartition<double, decltype(d)> d64;
  constexpr size_t N = hn::MaxLanes(d);
  static_assert(N == 4 || N == 8);
  hn::Vec<decltype(d)> in[N];
  for (size_t e = 0; e < N; ++e) in[e] = hn::LoadU(d, row(e));
  for (size_t part = 0; part < N / 4; ++part) {
    hn::Vec<decltype(d)> a[4];
    for (size_t e = 0; e < 4; ++e) {
      if constexpr (N == 4) {
        a[e] = in[e];
      } else {
        a[e] = part == 0 ? hn::ConcatLowerLower(d, in[e + 4], in[e]) : hn::ConcatUpperUpper(d, in[e + 4], in[e]);
      }
    }
    const auto t0 = hn::BitCast(d64, hn::InterleaveLower(d, a[0], a[1]));
    const auto t1 = hn::BitCast(d64, hn::InterleaveLower(d, a[2], a[3]));
    const auto t2 = hn::BitCast(d64, hn::InterleaveUpper(d, a[0], a[1]));
    const auto t3 = hn::BitCast(d64, hn::InterleaveUpper(d, a[2], a[3]));
    float* to = out + 4 * part * kBlock;
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, t0, t1)), d, to);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, t0, t1)), d, to + kBlock);
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, t2, t3)), d, to + 2 * kBlock);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, t2, t3)), d, to + 3 * kBlock);
  }
}

/// The same for elements of 16 bits: N rows by 8 columns, 8 by 8 in each 128-bit block.
template <class Row>
HWY_INLINE void transpose_square(const Row& row, uint16_t* HWY_RESTRICT out) {
  const hn::CappedTag<uint16_t, 16> d;
  using V = hn::Vec<decltype(d)>;
  const hn::Repartition<uint32_t, decltype(d)> d32;
  const hn::Repartition<uint64_t, decltype(d)> d64;
  constexpr size_t N = hn::MaxLanes(d);
  static_assert(N == 8 || N == 16);
  V a[8], b[8];
  for (size_t e = 0; e < 8; ++e) {
    if constexpr (N == 8) {
      a[e] = hn::LoadU(d, row(e));
    } else {
      const hn::Half<decltype(d)> half;
      a[e] = hn::Combine(d, hn::LoadU(half, row(e + 8)), hn::LoadU(half, row(e)));
    }
  }
  for (size_t e = 0; e < 4; ++e) {  // pairs of rows: dims 0 to 3, dims 4 to 7
    b[e] = hn::InterleaveLower(d, a[2 * e], a[2 * e + 1]);
    b[4 + e] = hn::InterleaveUpper(d, a[2 * e], a[2 * e + 1]);
  }
  for (size_t e = 0; e < 4; ++e) {  // fours: a[2 e] has dims 2 e and 2 e + 1 of rows 0 to 3, a[2 e + 1] of rows 4 to 7
    const size_t from = e / 2 * 4;
    for (size_t part = 0; part < 2; ++part) {
      const auto x = hn::BitCast(d32, b[from + 2 * part]), y = hn::BitCast(d32, b[from + 2 * part + 1]);
      a[2 * e + part] = hn::BitCast(d, e % 2 == 0 ? hn::InterleaveLower(d32, x, y) : hn::InterleaveUpper(d32, x, y));
    }
  }
  for (size_t e = 0; e < 4; ++e) {
    const auto x = hn::BitCast(d64, a[2 * e]), y = hn::BitCast(d64, a[2 * e + 1]);
    uint16_t* to = out + 2 * e * kBlock;
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, x, y)), d, to);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, x, y)), d, to + kBlock);
  }
}

#endif

/// keys [begin, end) of a block, rows of `dim`, to [dim][kBlock]. Columns of other keys are garbage or zero.
template <class Element>
HWY_INLINE void transpose_keys(const Element* keys, const Element* zeros, size_t dim, size_t begin, size_t end,
                               Element* HWY_RESTRICT out) {
#if HWY_TARGET == HWY_SCALAR
  for (size_t j = begin; j < end; ++j) {
    for (size_t i = 0; i < dim; ++i) out[i * kBlock + j] = keys[j * dim + i];
  }
#else
  constexpr bool kWide = sizeof(Element) == 4;
  constexpr size_t N = hn::MaxLanes(hn::CappedTag<Element, kWide ? 8 : 16>());
  constexpr size_t kColumns = kWide ? N : 8;
  for (size_t j = begin / N * N; j < end; j += N) {
    const auto transpose = [&](const auto& row) {
      size_t i = 0;
      for (; i + kColumns <= dim; i += kColumns) {
        transpose_square([&](size_t e) { return row(e) + i; }, out + i * kBlock + j);
      }
      for (; i < dim; ++i) {
        for (size_t e = 0; e < N; ++e) out[i * kBlock + j + e] = row(e)[i];
      }
    };
    if (j >= begin && j + N <= end) {
      transpose([first = keys + j * dim, dim](size_t e) { return first + e * dim; });
    } else {
      transpose([&](size_t e) { return j + e >= begin && j + e < end ? keys + (j + e) * dim : zeros; });
    }
  }
#endif
}

/// Rows [begin, end) of `width` elements to rows of `padded` floats. As many of `ahead`, or none of nullptr, are
/// brought into the cache.
template <class Rows>
HWY_INLINE void widen(const typename Rows::Element* rows, size_t width, size_t padded, size_t begin, size_t end,
                      const typename Rows::Element* ahead, float* HWY_RESTRICT out) {
  const DF d;
  constexpr size_t kLine = 64 / sizeof(typename Rows::Element);
  for (size_t j = begin; j < end; ++j) {
    const typename Rows::Element* from = rows + j * width;
    for (size_t at = 0; ahead != nullptr && at < width; at += kLine) fetch(ahead + j * width + at);
    float* to = out + j * padded;
    size_t i = 0;
    for (; i + kLanes <= width; i += kLanes) hn::StoreU(Rows::load(d, from + i), d, to + i);
    for (; i < width; ++i) to[i] = load_one<Rows>(from + i);
    for (; i < padded; ++i) to[i] = 0;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif
