// What makes quantized rows more exact, once per target: rotation by a Hadamard matrix, and keys without their
// projection's bias. Included by attention-inl.h.
//
// H is symmetric and its own inverse. Queries that are rotated as the keys are give the same scores, and outputs are
// turned back once per row. A bias has another value at every position, so keys that lack one are turned back
// themselves, a block at a time, before it is added.

#if defined(TORPOR_KERNELS_ATTENTION_HADAMARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_ATTENTION_HADAMARD_INL_H_
#undef TORPOR_KERNELS_ATTENTION_HADAMARD_INL_H_
#else
#define TORPOR_KERNELS_ATTENTION_HADAMARD_INL_H_
#endif

#include <cmath>

#include <hwy/highway.h>

#include "kernels/attention_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// The matrix's size: the greatest power of two that divides `dim`.
HWY_INLINE size_t hadamard_size(size_t dim) { return dim & (~dim + 1); }

/// One head's row, in place.
HWY_NOINLINE void rotate_row(float* x, size_t dim) {
  const DF d;
  const size_t size = hadamard_size(dim);
  for (size_t h = 1; h < size; h *= 2) {
    for (size_t begin = 0; begin < dim; begin += 2 * h) {
      size_t i = begin;
      for (; i + kLanes <= begin + h; i += kLanes) {
        const VF a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + h);
        hn::StoreU(hn::Add(a, b), d, x + i);
        hn::StoreU(hn::Sub(a, b), d, x + i + h);
      }
      for (; i < begin + h; ++i) {
        const float a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
    }
  }
  const float factor = 1.0f / std::sqrt(float(size));
  for (size_t i = 0; i < dim; ++i) x[i] *= factor;
}

/// H's first stages over kN vectors.
template <size_t kN>
HWY_INLINE void butterfly(VF (&v)[kN]) {
  for (size_t h = 1; h < kN; h *= 2) {
    for (size_t i = 0; i < kN; ++i) {
      if ((i & h) != 0) continue;
      const VF a = v[i], b = v[i + h];
      v[i] = hn::Add(a, b);
      v[i + h] = hn::Sub(a, b);
    }
  }
}

/// Elements of a key that are turned back while they are dequantized: three of H's stages.
constexpr size_t kFirstRotated = 8;

/// How a block of keys is attended: turned back, with the bias at each position. The angle of a position is that of its
/// block's first, and of as far as it is in the block.
struct KeyBias {
  const float *bias, *cosines, *sines, *within;
  VF factor;
  size_t half;
  bool traditional;

  KeyBias(const AttentionJob& job, size_t head, int position) {
    const AttentionSpec& spec = *job.spec;
    half = size_t(spec.rope.dims) / 2;
    bias = spec.key_bias + head * size_t(spec.head_dim);
    cosines = job.block_angles + size_t(position / int(kBlock)) * 2 * half;
    sines = cosines + half;
    within = job.angles_within;
    traditional = spec.rope.traditional;
    factor = hn::Set(DF(), spec.rotate_keys ? 1.0f / std::sqrt(float(hadamard_size(size_t(spec.head_dim)))) : 1.0f);
  }

  size_t low(size_t i) const { return traditional ? 2 * i : i; }
  size_t high(size_t i) const { return traditional ? 2 * i + 1 : i + half; }

  /// The bias of pair `i` at the block's first position.
  struct Pair {
    float x, y;
  };
  Pair at_first(size_t i) const {
    const float a = bias[low(i)], b = bias[high(i)];
    return {a * cosines[i] - b * sines[i], b * cosines[i] + a * sines[i]};
  }
  /// Adds it to the pair's elements `a` and `b` in columns [j, j + kLanes).
  HWY_INLINE void add(const Pair& pair, size_t i, size_t j, VF& a, VF& b) const {
    const DF d;
    const VF c = hn::LoadU(d, within + 2 * i * kBlock + j), s = hn::LoadU(d, within + (2 * i + 1) * kBlock + j);
    const VF x = hn::Set(d, pair.x), y = hn::Set(d, pair.y);
    a = hn::MulAdd(a, factor, hn::NegMulAdd(y, s, hn::Mul(x, c)));
    b = hn::MulAdd(b, factor, hn::MulAdd(x, s, hn::Mul(y, c)));
  }
};

/// `kStages` stages of H over columns [begin, end) of keys [dim][kBlock]: those that join elements h, 2h, ... apart.
/// With
/// kLast these are all of a key's last, and the bias is added while they are in registers.
template <int kStages, bool kLast>
HWY_INLINE void rotate_stages(size_t dim, size_t h, size_t begin, size_t end, const KeyBias& bias, float* keys) {
  const DF d;
  constexpr size_t kN = size_t(1) << kStages;
  for (size_t first = 0; first < dim; first += h * kN) {
    for (size_t i = first; i < first + h; ++i) {
      KeyBias::Pair pairs[kN / 2];
      if constexpr (kLast) {
        for (size_t n = 0; n < kN / 2; ++n) pairs[n] = bias.at_first(i + n * h);
      }
      float* const x = keys + i * kBlock;
      for (size_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
        VF v[kN];
        for (size_t n = 0; n < kN; ++n) v[n] = hn::LoadU(d, x + n * h * kBlock + j);
        butterfly(v);
        if constexpr (kLast) {
          for (size_t n = 0; n < kN / 2; ++n) bias.add(pairs[n], i + n * h, j, v[n], v[n + kN / 2]);
        }
        for (size_t n = 0; n < kN; ++n) hn::StoreU(v[n], d, x + n * h * kBlock + j);
      }
    }
  }
}

template <int kStages>
HWY_INLINE void rotate_last(size_t dim, size_t h, size_t begin, size_t end, const KeyBias& bias, bool add, float* keys) {
  if (add) return rotate_stages<kStages, true>(dim, h, begin, end, bias, keys);
  rotate_stages<kStages, false>(dim, h, begin, end, bias, keys);
}

/// Columns [begin, end) of the block of keys at `position`, [dim][kBlock], as they are attended. Of rotated keys each
/// kFirstRotated elements are turned back already.
HWY_NOINLINE void add_key_bias(const AttentionJob& job, size_t head, int position, size_t begin, size_t end,
                               float* HWY_RESTRICT keys) {
  const AttentionSpec& spec = *job.spec;
  const DF d;
  const size_t dim = size_t(spec.head_dim), size = hadamard_size(dim);
  const KeyBias bias(job, head, position);
  const size_t half = bias.half;
  if (spec.rotate_keys) {
    // Elements of a pair meet in the last stage where they are half a key apart.
    const bool add = size == dim && 2 * half == dim && !bias.traditional;
    size_t h = kFirstRotated;
    for (; h * 8 < size; h *= 8) rotate_stages<3, false>(dim, h, begin, end, bias, keys);
    if (h * 8 == size) rotate_last<3>(dim, h, begin, end, bias, add, keys);
    if (h * 4 == size) rotate_last<2>(dim, h, begin, end, bias, add, keys);
    if (h * 2 == size) rotate_last<1>(dim, h, begin, end, bias, add, keys);
    if (add) return;
  }
  const size_t first = begin / kLanes * kLanes;
  for (size_t i = 0; i < half; ++i) {
    const KeyBias::Pair pair = bias.at_first(i);
    float *const a = keys + bias.low(i) * kBlock, *const b = keys + bias.high(i) * kBlock;
    for (size_t j = first; j < end; j += kLanes) {
      VF va = hn::LoadU(d, a + j), vb = hn::LoadU(d, b + j);
      bias.add(pair, i, j, va, vb);
      hn::StoreU(va, d, a + j);
      hn::StoreU(vb, d, b + j);
    }
  }
  for (size_t i = 2 * half; i < dim; ++i) {
    float* const a = keys + i * kBlock;
    for (size_t j = first; j < end; j += kLanes) {
      hn::StoreU(hn::MulAdd(hn::LoadU(d, a + j), bias.factor, hn::Set(d, bias.bias[i])), d, a + j);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif
