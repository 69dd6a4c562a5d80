// The part of attention that is compiled once per target. Included by attention.cc through foreach_target.h.
//
// A score is one chain of multiply-adds over the head's dims, an output element one chain over its row's keys in order;
// both are the same however many rows a tile has, which is what makes the result independent of the batch:
//   * keys come in blocks of kBlock at absolute positions; a row that sees none of a block leaves its state alone;
//   * masked keys of a block weigh exactly 0 and their values are not touched;
//   * kSuper keys make a partial (max, sum, output); partials are merged in order of position.

#if defined(TORPOR_KERNELS_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_ATTENTION_INL_H_
#undef TORPOR_KERNELS_ATTENTION_INL_H_
#else
#define TORPOR_KERNELS_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, kMaxLanes>;
using VF = hn::Vec<DF>;
constexpr size_t kLanes = hn::MaxLanes(DF());

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
#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)) || HWY_TARGET == HWY_NEON
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

// ---- preparing rows: norm, rotation, append

HWY_INLINE void normalise_head(float* x, size_t n, const float* weight, float eps) {
  const DF d;
  VF sum = hn::Zero(d);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF v = hn::LoadU(d, x + i);
    sum = hn::MulAdd(v, v, sum);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (size_t j = i; j < n; ++j) total += x[j] * x[j];
  const float factor = 1.0f / std::sqrt(total / float(n) + eps);
  for (size_t j = 0; j < n; ++j) x[j] = x[j] * factor * weight[j];
}

HWY_INLINE void rotate_head(float* x, const float* cosines, const float* sines, size_t half, bool traditional) {
  if (traditional) {
    for (size_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosines[i] - b * sines[i];
      x[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
    return;
  }
  const DF d;
  size_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const VF a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + half + i);
    const VF c = hn::LoadU(d, cosines + i), s = hn::LoadU(d, sines + i);
    hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), d, x + i);
    hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), d, x + half + i);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosines[i] - b * sines[i];
    x[half + i] = b * cosines[i] + a * sines[i];
  }
}

template <class Rows>
HWY_INLINE void append_row(const AttentionJob& job, const AttentionSequence& sequence, int position, const float* k,
                           const float* v) {
  using Element = typename Rows::Element;
  const size_t dim = size_t(job.spec->head_dim);
  const KvRunView& run = sequence.runs[size_t(position / kSegmentTokens)];
  Element* keys = reinterpret_cast<Element*>(run.keys);
  Element* values = reinterpret_cast<Element*>(run.values);
  for (size_t h = 0; h < size_t(job.spec->n_kv_heads); ++h) {
    const size_t at = (h * kSegmentTokens + size_t(position % kSegmentTokens)) * dim;
    Rows::store(k + h * dim, dim, keys + at);
    Rows::store(v + h * dim, dim, values + at);
  }
}

/// Tokens [first, last) of one sequence.
void PrepareRows(const AttentionJob& job, const PrepareTask& task) {
  const AttentionSpec& spec = *job.spec;
  const AttentionSequence& sequence = job.sequences[size_t(task.sequence)];
  const size_t dim = size_t(spec.head_dim), n_heads = size_t(spec.n_heads), n_kv = size_t(spec.n_kv_heads);
  const size_t half = size_t(spec.rope.dims) / 2;
  for (int t = task.first; t < task.last; ++t) {
    float* row = job.qkv + size_t(sequence.row + t) * (n_heads + 2 * n_kv) * dim;
    const float* cosines = job.rope + (size_t(task.rope_row) + size_t(t - task.first)) * 2 * half;
    for (size_t h = 0; h < n_heads + n_kv; ++h) {
      float* x = row + h * dim;
      const float* norm = h < n_heads ? spec.q_norm : spec.k_norm;
      if (norm != nullptr) normalise_head(x, dim, norm, spec.norm_eps);
      if (half != 0) rotate_head(x, cosines, cosines + half, half, spec.rope.traditional);
      if (h < n_heads) {
        for (size_t i = 0; i < dim; ++i) x[i] *= job.q_scale;
      }
    }
    const float* k = row + n_heads * dim;
    const float* v = k + n_kv * dim;
    const int position = sequence.position + t;
    switch (spec.kv_dtype) {
      case KvDtype::kF32: append_row<RowsF32>(job, sequence, position, k, v); break;
      case KvDtype::kF16: append_row<RowsF16>(job, sequence, position, k, v); break;
      default: append_row<RowsBF16>(job, sequence, position, k, v); break;
    }
  }
}

// ---- products: C = A B, or C = diag(scale) C + A B, one chain over k per element; B of a cache's type, or f32

template <int MR, int NV, bool kScaleC, class Rows, class Element = typename Rows::Element>
HWY_INLINE void micro(const float* HWY_RESTRICT a, size_t lda, const Element* HWY_RESTRICT b, size_t ldb, size_t k,
                      const float* HWY_RESTRICT scale, float* HWY_RESTRICT c, size_t ldc) {
  const DF d;
  VF acc[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int n = 0; n < NV; ++n) {
      if constexpr (kScaleC) {
        acc[r][n] = hn::Mul(hn::LoadU(d, c + size_t(r) * ldc + size_t(n) * kLanes), hn::Set(d, scale[r]));
      } else {
        acc[r][n] = hn::Zero(d);
      }
    }
  }
  for (size_t i = 0; i < k; ++i) {
    if constexpr (MR <= NV) {
      VF av[MR];
      for (int r = 0; r < MR; ++r) av[r] = hn::Set(d, a[size_t(r) * lda + i]);
      for (int n = 0; n < NV; ++n) {
        const VF bv = Rows::load(d, b + i * ldb + size_t(n) * kLanes);
        for (int r = 0; r < MR; ++r) acc[r][n] = hn::MulAdd(av[r], bv, acc[r][n]);
      }
    } else {
      VF bv[NV];
      for (int n = 0; n < NV; ++n) bv[n] = Rows::load(d, b + i * ldb + size_t(n) * kLanes);
      for (int r = 0; r < MR; ++r) {
        const VF av = hn::Set(d, a[size_t(r) * lda + i]);
        for (int n = 0; n < NV; ++n) acc[r][n] = hn::MulAdd(av, bv[n], acc[r][n]);
      }
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int n = 0; n < NV; ++n) hn::StoreU(acc[r][n], d, c + size_t(r) * ldc + size_t(n) * kLanes);
  }
}

template <int MR, int NV, bool kScaleC, class Rows, class Element = typename Rows::Element>
HWY_INLINE void product_columns(const float* a, size_t lda, const Element* b, size_t ldb, size_t k, const float* scale,
                                float* c, size_t ldc, size_t columns) {
  size_t n = 0;
  for (; n + NV * kLanes <= columns; n += NV * kLanes) {
    micro<MR, NV, kScaleC, Rows>(a, lda, b + n, ldb, k, scale, c + n, ldc);
  }
  if constexpr (NV > 1) {
    if (n < columns) product_columns<MR, NV / 2, kScaleC, Rows>(a, lda, b + n, ldb, k, scale, c + n, ldc, columns - n);
  }
}

#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
constexpr int kVectors[kMaxRows + 1] = {0, 8, 4, 4, 2, 2, 2};  // 16 registers
#else
constexpr int kVectors[kMaxRows + 1] = {0, 8, 8, 4, 4, 4, 4};  // 32
#endif

/// rows <= kMaxRows; columns a multiple of 16.
template <bool kScaleC, class Rows, class Element = typename Rows::Element>
HWY_NOINLINE void product(size_t rows, const float* a, size_t lda, const Element* b, size_t ldb, size_t k,
                          const float* scale, float* c, size_t ldc, size_t columns) {
  switch (rows) {
    case 1: product_columns<1, kVectors[1], kScaleC, Rows>(a, lda, b, ldb, k, scale, c, ldc, columns); break;
    case 2: product_columns<2, kVectors[2], kScaleC, Rows>(a, lda, b, ldb, k, scale, c, ldc, columns); break;
    case 3: product_columns<3, kVectors[3], kScaleC, Rows>(a, lda, b, ldb, k, scale, c, ldc, columns); break;
    case 4: product_columns<4, kVectors[4], kScaleC, Rows>(a, lda, b, ldb, k, scale, c, ldc, columns); break;
    case 5: product_columns<5, kVectors[5], kScaleC, Rows>(a, lda, b, ldb, k, scale, c, ldc, columns); break;
    default: product_columns<6, kVectors[6], kScaleC, Rows>(a, lda, b, ldb, k, scale, c, ldc, columns); break;
  }
}

// ---- softmax, in powers of two: the queries carry the factor log2(e)

/// 2^x for x <= 64, within 2e-7 relative; exactly 0 below -126.5 (so for -inf), exactly 1 at 0.
HWY_INLINE VF exp2(DF d, VF x) {
  const hn::RebindToSigned<DF> di;
  x = hn::Max(x, hn::Set(d, -127.0f));
  const VF magic = hn::Set(d, 12582912.0f);  // 1.5 * 2^23: the sum's low bits are x rounded to an integer
  const VF shifted = hn::Add(x, magic);
  const VF r = hn::Sub(x, hn::Sub(shifted, magic));
  VF p = hn::Set(d, 0.001326472731307149f);
  p = hn::MulAdd(p, r, hn::Set(d, 0.009671512991189957f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.05550733581185341f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.24022242426872253f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.6931470036506653f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  const auto scale = hn::ShiftLeft<23>(hn::Add(hn::BitCast(di, shifted), hn::Set(di, 127)));
  return hn::Mul(p, hn::BitCast(d, scale));
}

HWY_INLINE float exp2_one(float x) {
  const DF d;
  return hn::GetLane(exp2(d, hn::Set(d, x)));
}

/// scores become cap * tanh(scores); they come in divided by the cap.
HWY_NOINLINE void cap_scores(float* scores, size_t n, float cap) {
  const DF d;
  const VF one = hn::Set(d, 1.0f), two = hn::Set(d, 2.0f);
  for (size_t i = 0; i < n; i += kLanes) {
    const VF x = hn::LoadU(d, scores + i);
    const VF a = hn::Min(hn::Mul(hn::Abs(x), hn::Set(d, 2.8853900817779268f)), hn::Set(d, 64.0f));
    const VF t = hn::Sub(one, hn::Div(two, hn::Add(exp2(d, a), one)));
    hn::StoreU(hn::Mul(hn::CopySign(t, x), hn::Set(d, cap)), d, scores + i);
  }
}

/// Turns one row's scores [kBlock], of which [begin, end) count, into weights, and updates its maximum and its sum (one
/// per lane). Returns the factor that the row's output so far must be multiplied by.
HWY_INLINE float weigh(float* HWY_RESTRICT scores, size_t begin, size_t end, float& maximum,
                       float* HWY_RESTRICT sum) {
  const DF d;
  if (begin != 0) std::fill(scores, scores + begin, -std::numeric_limits<float>::infinity());
  if (end != kBlock) std::fill(scores + end, scores + kBlock, -std::numeric_limits<float>::infinity());
  VF top0 = hn::LoadU(d, scores), top1 = hn::LoadU(d, scores + kLanes);
  for (size_t i = 2 * kLanes; i < kBlock; i += 2 * kLanes) {
    top0 = hn::Max(top0, hn::LoadU(d, scores + i));
    top1 = hn::Max(top1, hn::LoadU(d, scores + i + kLanes));
  }
  const float top = std::max(maximum, hn::GetLane(hn::MaxOfLanes(d, hn::Max(top0, top1))));
  const float factor = top == maximum ? 1.0f : exp2_one(maximum - top);
  maximum = top;
  const VF offset = hn::Set(d, top);
  VF total = hn::Mul(hn::LoadU(d, sum), hn::Set(d, factor));
  for (size_t i = 0; i < kBlock; i += kLanes) {
    const VF p = exp2(d, hn::Sub(hn::LoadU(d, scores + i), offset));
    hn::StoreU(p, d, scores + i);
    total = hn::Add(total, p);
  }
  hn::StoreU(total, d, sum);
  return factor;
}

// ---- blocks of keys and values as f32

/// Brings a block that is needed soon into the cache, piece by piece while another is transposed.
template <class Element>
struct Ahead {
  const Element* keys;
  const Element* values;
  HWY_INLINE void fetch(size_t from, size_t n) const {
    for (size_t i = from; i < from + n; i += 64 / sizeof(Element)) {
      hwy::Prefetch(keys + i);
      hwy::Prefetch(values + i);
    }
  }
};

/// keys [begin, end) of a block, rows of `dim`, to [dim][kBlock]. Columns of other keys are garbage or zero.
HWY_INLINE void transpose_keys(const float* keys, const float* zeros, size_t dim, size_t begin, size_t end,
                               const Ahead<float>& ahead, float* HWY_RESTRICT out) {
#if HWY_TARGET == HWY_SCALAR
  for (size_t j = begin; j < end; ++j) {
    for (size_t i = 0; i < dim; ++i) out[i * kBlock + j] = keys[j * dim + i];
  }
#else
  const hn::CappedTag<float, 8> d;
  const hn::Repartition<double, decltype(d)> d64;
  constexpr size_t N = hn::MaxLanes(d);
  static_assert(N == 4 || N == 8);
  for (size_t j = begin / N * N; j < end; j += N) {
    const float* row[N];
    for (size_t e = 0; e < N; ++e) row[e] = j + e >= begin && j + e < end ? keys + (j + e) * dim : zeros;
    size_t i = 0;
    for (; i + N <= dim; i += N) {
      ahead.fetch(j * dim + i * N, N * N);
      hn::Vec<decltype(d)> in[N];
      for (size_t e = 0; e < N; ++e) in[e] = hn::LoadU(d, row[e] + i);
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
        float* to = out + (i + 4 * part) * kBlock + j;
        hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, t0, t1)), d, to);
        hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, t0, t1)), d, to + kBlock);
        hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, t2, t3)), d, to + 2 * kBlock);
        hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, t2, t3)), d, to + 3 * kBlock);
      }
    }
    for (; i < dim; ++i) {
      for (size_t e = 0; e < N; ++e) out[i * kBlock + j + e] = row[e][i];
    }
  }
#endif
}

/// The same for elements of 16 bits: 8 by 8 in each 128-bit block.
HWY_INLINE void transpose_keys(const uint16_t* keys, const uint16_t* zeros, size_t dim, size_t begin, size_t end,
                               const Ahead<uint16_t>& ahead, uint16_t* HWY_RESTRICT out) {
#if HWY_TARGET == HWY_SCALAR
  for (size_t j = begin; j < end; ++j) {
    for (size_t i = 0; i < dim; ++i) out[i * kBlock + j] = keys[j * dim + i];
  }
#else
  const hn::CappedTag<uint16_t, 16> d;
  using V = hn::Vec<decltype(d)>;
  const hn::Repartition<uint32_t, decltype(d)> d32;
  const hn::Repartition<uint64_t, decltype(d)> d64;
  constexpr size_t N = hn::MaxLanes(d);
  static_assert(N == 8 || N == 16);
  for (size_t j = begin / N * N; j < end; j += N) {
    const uint16_t* row[N];
    for (size_t e = 0; e < N; ++e) row[e] = j + e >= begin && j + e < end ? keys + (j + e) * dim : zeros;
    size_t i = 0;
    for (; i + 8 <= dim; i += 8) {
      ahead.fetch(j * dim + i * N, N * 8);
      V a[8], b[8];
      for (size_t e = 0; e < 8; ++e) {
        if constexpr (N == 8) {
          a[e] = hn::LoadU(d, row[e] + i);
        } else {
          const hn::Half<decltype(d)> half;
          a[e] = hn::Combine(d, hn::LoadU(half, row[e + 8] + i), hn::LoadU(half, row[e] + i));
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
          a[2 * e + part] =
              hn::BitCast(d, e % 2 == 0 ? hn::InterleaveLower(d32, x, y) : hn::InterleaveUpper(d32, x, y));
        }
      }
      for (size_t e = 0; e < 4; ++e) {
        const auto x = hn::BitCast(d64, a[2 * e]), y = hn::BitCast(d64, a[2 * e + 1]);
        uint16_t* to = out + (i + 2 * e) * kBlock + j;
        hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, x, y)), d, to);
        hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, x, y)), d, to + kBlock);
      }
    }
    for (; i < dim; ++i) {
      for (size_t e = 0; e < N; ++e) out[i * kBlock + j + e] = row[e][i];
    }
  }
#endif
}

/// Rows [begin, end) of `width` elements to rows of `padded` floats.
template <class Rows>
HWY_INLINE void widen(const typename Rows::Element* rows, size_t width, size_t padded, size_t begin, size_t end,
                      float* HWY_RESTRICT out) {
  const DF d;
  for (size_t j = begin; j < end; ++j) {
    const typename Rows::Element* from = rows + j * width;
    float* to = out + j * padded;
    size_t i = 0;
    for (; i + kLanes <= width; i += kLanes) hn::StoreU(Rows::load(d, from + i), d, to + i);
    for (; i < width; ++i) to[i] = load_one<Rows>(from + i);
    for (; i < padded; ++i) to[i] = 0;
  }
}

// ---- tiles

/// A worker's memory for one tile.
struct Scratch {
  float *q, *acc, *total_acc, *maximum, *sum, *total_maximum, *total_sum, *scores, *factors, *keys, *narrow_keys, *values, *zeros;
  Scratch(size_t rows, size_t dim, size_t padded) {
    size_t used = 0;
    float* base = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      used = 0;
      const auto take = [&](size_t n) {
        float* at = base == nullptr ? nullptr : base + used;
        used += (n + 15) / 16 * 16;
        return at;
      };
      q = take(rows * dim);
      acc = take(rows * padded);
      total_acc = take(rows * padded);
      maximum = take(rows);
      sum = take(rows * kMaxLanes);
      total_maximum = take(rows);
      total_sum = take(rows);
      scores = take(kMaxRows * kBlock);
      factors = take(kMaxRows);
      keys = take(dim * kBlock);
      narrow_keys = take(dim * kBlock / 2);
      values = take(padded * kBlock);
      zeros = take(dim);
      if (pass == 0) base = attention_scratch(used);
    }
    std::memset(zeros, 0, dim * sizeof(float));
  }
};

/// The keys that the query at `position` sees.
HWY_INLINE int first_key(const AttentionSpec& spec, int position) {
  return spec.window > 0 ? std::max(0, position - spec.window + 1) : 0;
}

/// Scores, weights and outputs of all rows of a tile for one block, whose keys are `keys` [dim][kBlock] and values `values`
/// [kBlock][padded].
template <class Rows>
HWY_INLINE void attend_block(const AttentionJob& job, const TileTask& task, int position, int block,
                             const typename Rows::Element* keys, const typename Rows::Element* values,
                             const Scratch& s) {
  const AttentionSpec& spec = *job.spec;
  const size_t dim = size_t(spec.head_dim), padded = job.padded, group = job.group;
  const size_t rows = size_t(task.count) * group;
  for (size_t r0 = 0; r0 < rows; r0 += kMaxRows) {
    const size_t n = std::min(rows - r0, size_t(kMaxRows));
    size_t row_begin[kMaxRows], row_end[kMaxRows];
    size_t low = kBlock, high = 0;
    bool same = true;
    for (size_t r = 0; r < n; ++r) {
      const int p = position + int((r0 + r) / group);
      row_begin[r] = size_t(std::clamp(first_key(spec, p) - block, 0, int(kBlock)));
      row_end[r] = size_t(std::clamp(p + 1 - block, 0, int(kBlock)));
      same = same && row_begin[r] == row_begin[0] && row_end[r] == row_end[0];
      if (row_begin[r] < row_end[r]) {
        low = std::min(low, row_begin[r]);
        high = std::max(high, row_end[r]);
      }
    }
    if (low >= high) continue;
    const size_t column = low / 16 * 16, columns = (high + 15) / 16 * 16 - column;
    product<false, Rows>(n, s.q + r0 * dim, dim, keys + column, kBlock, dim, nullptr, s.scores + column, kBlock, columns);
    if (spec.softcap > 0) {
      for (size_t r = 0; r < n; ++r) cap_scores(s.scores + r * kBlock + column, columns, job.cap);
    }
    for (size_t r = 0; r < n; ++r) {
      if (row_begin[r] >= row_end[r]) continue;
      s.factors[r] = weigh(s.scores + r * kBlock, row_begin[r], row_end[r], s.maximum[r0 + r],
                           s.sum + (r0 + r) * kMaxLanes);
    }
    if (same) {
      product<true, Rows>(n, s.scores + low, kBlock, values + low * padded, padded, high - low, s.factors,
                          s.acc + r0 * padded, padded, padded);
      continue;
    }
    for (size_t r = 0; r < n; ++r) {
      if (row_begin[r] >= row_end[r]) continue;
      product<true, Rows>(1, s.scores + r * kBlock + row_begin[r], kBlock, values + row_begin[r] * padded, padded,
                          row_end[r] - row_begin[r], s.factors + r, s.acc + (r0 + r) * padded, padded, padded);
    }
  }
}

/// Leaves the partial of superblock `super` in maximum, sum (sum[row]) and acc.
template <class Rows>
void run_super(const AttentionJob& job, const TileTask& task, int super, const Scratch& s) {
  using Element = typename Rows::Element;
  const AttentionSpec& spec = *job.spec;
  const AttentionSequence& sequence = job.sequences[size_t(task.sequence)];
  const size_t dim = size_t(spec.head_dim), padded = job.padded;
  const size_t rows = size_t(task.count) * job.group;
  const int position = sequence.position + task.first;
  const int last = position + task.count - 1;

  std::fill(s.maximum, s.maximum + rows, -std::numeric_limits<float>::infinity());
  std::memset(s.sum, 0, rows * kMaxLanes * sizeof(float));
  std::memset(s.acc, 0, rows * padded * sizeof(float));

  const auto block_of = [&](int block) {
    const KvRunView& run = sequence.runs[size_t(block / kSegmentTokens)];
    const size_t at = (size_t(task.kv_head) * kSegmentTokens + size_t(block % kSegmentTokens)) * dim;
    return Ahead<Element>{reinterpret_cast<const Element*>(run.keys) + at,
                          reinterpret_cast<const Element*>(run.values) + at};
  };
  const int from = std::max(super * kSuper, first_key(spec, position) / kBlock * kBlock);
  const int to = std::min((super + 1) * kSuper, last + 1);
  for (int block = from; block < to; block += kBlock) {
    // The part of the block that any row sees; positions past it may hold anything.
    const size_t begin = size_t(std::max(0, first_key(spec, position) - block));
    const size_t end = size_t(std::min(int(kBlock), last + 1 - block));
    const Ahead<Element> here = block_of(block), ahead = block_of(block + kBlock <= last ? block + kBlock : block);
    const Element* zeros = reinterpret_cast<const Element*>(s.zeros);
    if constexpr (Rows::kIsFloat) {
      transpose_keys(here.keys, zeros, dim, begin, end, ahead, s.keys);
      if (dim != padded) widen<Rows>(here.values, dim, padded, begin, end, s.values);
      attend_block<Rows>(job, task, position, block, s.keys, dim == padded ? here.values : s.values, s);
    } else {
      Element* narrow_keys = reinterpret_cast<Element*>(s.narrow_keys);
      transpose_keys(here.keys, zeros, dim, begin, end, ahead, narrow_keys);
      if (rows <= 2 * kMaxRows && dim == padded) {  // so few rows that widening while multiplying is cheaper
        attend_block<Rows>(job, task, position, block, narrow_keys, here.values, s);
      } else {
        widen<Rows>(narrow_keys, kBlock, kBlock, 0, dim, s.keys);
        widen<Rows>(here.values, dim, padded, begin, end, s.values);
        attend_block<RowsF32>(job, task, position, block, s.keys, s.values, s);
      }
    }
  }
  const DF d;
  for (size_t r = 0; r < rows; ++r) s.sum[r] = hn::GetLane(hn::SumOfLanes(d, hn::LoadU(d, s.sum + r * kMaxLanes)));
}

void start_total(const Scratch& s, size_t rows, size_t padded) {
  std::fill(s.total_maximum, s.total_maximum + rows, -std::numeric_limits<float>::infinity());
  std::fill(s.total_sum, s.total_sum + rows, 0.0f);
  std::memset(s.total_acc, 0, rows * padded * sizeof(float));
}

HWY_NOINLINE void merge(const Scratch& s, size_t rows, size_t padded, const float* maximum, const float* sum,
                        const float* acc) {
  const DF d;
  for (size_t r = 0; r < rows; ++r) {
    if (maximum[r] == -std::numeric_limits<float>::infinity()) continue;
    const float top = std::max(s.total_maximum[r], maximum[r]);
    const float old_factor = exp2_one(s.total_maximum[r] - top), new_factor = exp2_one(maximum[r] - top);
    s.total_maximum[r] = top;
    s.total_sum[r] = s.total_sum[r] * old_factor + sum[r] * new_factor;
    const VF a = hn::Set(d, old_factor), b = hn::Set(d, new_factor);
    float* total = s.total_acc + r * padded;
    for (size_t i = 0; i < padded; i += kLanes) {
      hn::StoreU(hn::MulAdd(hn::LoadU(d, acc + r * padded + i), b, hn::Mul(hn::LoadU(d, total + i), a)), d, total + i);
    }
  }
}

HWY_NOINLINE void finish(const AttentionJob& job, const TileTask& task, const Scratch& s) {
  const AttentionSpec& spec = *job.spec;
  const DF d;
  const size_t dim = size_t(spec.head_dim), padded = job.padded, group = job.group;
  for (size_t r = 0; r < size_t(task.count) * group; ++r) {
    const size_t head = size_t(task.kv_head) * group + r % group;
    const size_t row = size_t(job.sequences[size_t(task.sequence)].row + task.first) + r / group;
    float factor = 1.0f, sum = s.total_sum[r];
    if (spec.sinks != nullptr) {
      const float sink = spec.sinks[head] * 1.4426950408889634f;
      const float top = std::max(s.total_maximum[r], sink);
      factor = exp2_one(s.total_maximum[r] - top);
      sum = sum * factor + exp2_one(sink - top);
    }
    const float scale = factor / sum;
    const float* acc = s.total_acc + r * padded;
    float* out = job.out + (row * size_t(spec.n_heads) + head) * dim;
    size_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, acc + i), hn::Set(d, scale)), d, out + i);
    for (; i < dim; ++i) out[i] = acc[i] * scale;
  }
}

template <class Rows>
void run_tile(const AttentionJob& job, const TileTask& task) {
  const AttentionSpec& spec = *job.spec;
  const AttentionSequence& sequence = job.sequences[size_t(task.sequence)];
  const size_t dim = size_t(spec.head_dim), padded = job.padded, group = job.group;
  const size_t rows = size_t(task.count) * group;
  const Scratch s(rows, dim, padded);
  const size_t stride = size_t(spec.n_heads + 2 * spec.n_kv_heads) * dim;
  for (size_t t = 0; t < size_t(task.count); ++t) {
    std::memcpy(s.q + t * group * dim,
                job.qkv + (size_t(sequence.row + task.first) + t) * stride + size_t(task.kv_head) * group * dim,
                group * dim * sizeof(float));
  }
  if (task.partials == nullptr) start_total(s, rows, padded);
  float* partial = task.partials;
  for (int super = task.super_begin; super < task.super_end; ++super) {
    run_super<Rows>(job, task, super, s);
    if (task.partials == nullptr) {
      merge(s, rows, padded, s.maximum, s.sum, s.acc);
      continue;
    }
    std::memcpy(partial, s.maximum, rows * sizeof(float));
    std::memcpy(partial + rows, s.sum, rows * sizeof(float));
    std::memcpy(partial + 2 * rows, s.acc, rows * padded * sizeof(float));
    partial += rows * (padded + 2);
  }
  if (task.partials == nullptr) finish(job, task, s);
}

void RunTile(const AttentionJob& job, const TileTask& task) {
  switch (job.spec->kv_dtype) {
    case KvDtype::kF32: run_tile<RowsF32>(job, task); break;
    case KvDtype::kF16: run_tile<RowsF16>(job, task); break;
    default: run_tile<RowsBF16>(job, task); break;
  }
}

/// `task` spans all superblocks of the tile, whose partials are ready.
void MergeTile(const AttentionJob& job, const TileTask& task) {
  const size_t padded = job.padded, rows = size_t(task.count) * job.group;
  const Scratch s(rows, size_t(job.spec->head_dim), padded);
  start_total(s, rows, padded);
  const float* partial = task.partials;
  for (int super = task.super_begin; super < task.super_end; ++super) {
    merge(s, rows, padded, partial, partial + rows, partial + 2 * rows);
    partial += rows * (padded + 2);
  }
  finish(job, task, s);
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif
