// Attention's arithmetic: products of a few rows with a block of keys or values, and the softmax. Included by attention-inl.h,
// once per target.

#if defined(TORPOR_KERNELS_ATTENTION_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_ATTENTION_MATH_INL_H_
#undef TORPOR_KERNELS_ATTENTION_MATH_INL_H_
#else
#define TORPOR_KERNELS_ATTENTION_MATH_INL_H_
#endif

#include <algorithm>
#include <limits>
#include <type_traits>

#include <hwy/highway.h>

#include "kernels/attention_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ---- products: C = A B, or C = diag(scale) C + A B, one chain over k per element; B of a cache's type, or f32
//
// `ahead` is needed soon. It is brought into the cache as fast as B is read, so that memory is read all the time and not
// in bursts. (Not where B is a worker's own memory.)

template <int MR, int NV, bool kScaleC, class Rows, class Element = typename Rows::Element>
HWY_INLINE void micro(const float* HWY_RESTRICT a, size_t lda, const Element* HWY_RESTRICT b, size_t ldb, size_t k,
                      const float* HWY_RESTRICT scale, float* HWY_RESTRICT c, size_t ldc, const Element* ahead) {
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
  constexpr size_t kStep = NV * kLanes, kLine = 64 / sizeof(Element);
  for (size_t i = 0; i < k; ++i) {
    if constexpr (!std::is_same_v<Rows, RowsWidened>) {
      for (size_t at = 0; at < kStep; at += kLine) fetch(ahead + i * kStep + at);
    }
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
                                float* c, size_t ldc, size_t columns, const Element* ahead) {
  size_t n = 0;
  for (; n + NV * kLanes <= columns; n += NV * kLanes) {
    micro<MR, NV, kScaleC, Rows>(a, lda, b + n, ldb, k, scale, c + n, ldc, ahead + n * k);
  }
  if constexpr (NV > 1) {
    if (n < columns) {
      product_columns<MR, NV / 2, kScaleC, Rows>(a, lda, b + n, ldb, k, scale, c + n, ldc, columns - n, ahead + n * k);
    }
  }
}

#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
constexpr int kVectors[kMaxRows + 1] = {0, 8, 4, 4, 2, 2, 2};  // 16 registers
#else
constexpr int kVectors[kMaxRows + 1] = {0, 8, 8, 4, 4, 4, 4};  // 32
#endif

/// Calls `body` with a constant `rows`, 1 to kMaxRows.
template <class Body>
HWY_INLINE void with_rows(size_t rows, const Body& body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 5: return body(std::integral_constant<int, 5>());
    default: return body(std::integral_constant<int, 6>());
  }
}

/// rows <= kMaxRows; columns a multiple of 16.
template <bool kScaleC, class Rows, class Element = typename Rows::Element>
HWY_NOINLINE void product(size_t rows, const float* a, size_t lda, const Element* b, size_t ldb, size_t k,
                          const float* scale, float* c, size_t ldc, size_t columns, const Element* ahead) {
  with_rows(rows, [&](auto n) HWY_ATTR {
    constexpr int MR = decltype(n)::value;
    product_columns<MR, kVectors[MR], kScaleC, Rows>(a, lda, b, ldb, k, scale, c, ldc, columns, ahead);
  });
}

// ---- softmax, in powers of two: the queries carry the factor log2(e)

// Poison must stay visible: NaN stays NaN. x86's Max and Min return the second operand for NaN. Those of NEON, and those
// that compute one number at a time, return the other one.

HWY_INLINE VF at_least(DF d, float bound, VF x) {
#if !HWY_ARCH_X86 || HWY_TARGET >= HWY_EMU128
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, bound)), hn::Set(d, bound), x);
#else
  return hn::Max(hn::Set(d, bound), x);
#endif
}

HWY_INLINE VF at_most(DF d, float bound, VF x) {
#if !HWY_ARCH_X86 || HWY_TARGET >= HWY_EMU128
  return hn::IfThenElse(hn::Gt(x, hn::Set(d, bound)), hn::Set(d, bound), x);
#else
  return hn::Min(hn::Set(d, bound), x);
#endif
}

/// 2^x for x <= 64, within 2e-7 relative; exactly 0 below -126.5 (so for -inf), exactly 1 at 0, NaN for NaN.
HWY_INLINE VF exp2(DF d, VF x) {
  const hn::RebindToSigned<DF> di;
  x = at_least(d, -127.0f, x);
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
    const VF a = at_most(d, 64.0f, hn::Mul(hn::Abs(x), hn::Set(d, 2.8853900817779268f)));
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
  VF totals[kSumParts];
  for (size_t p = 0; p < kSumParts; ++p) totals[p] = hn::Mul(hn::LoadU(d, sum + p * kLanes), hn::Set(d, factor));
  for (size_t i = 0; i < kBlock; i += kSumLanes) {
    for (size_t p = 0; p < kSumParts; ++p) {
      float* const at = scores + i + p * kLanes;
      const VF weight = exp2(d, hn::Sub(hn::LoadU(d, at), offset));
      hn::StoreU(weight, d, at);
      totals[p] = hn::Add(totals[p], weight);
    }
  }
  for (size_t p = 0; p < kSumParts; ++p) hn::StoreU(totals[p], d, sum + p * kLanes);
  return factor;
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif
