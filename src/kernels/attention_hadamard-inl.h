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

/// `kStages` stages of H over 2^kStages vectors, which are `stride` apart.
template <int kStages>
HWY_INLINE void butterfly(float* x, size_t stride) {
  const DF d;
  constexpr size_t kN = size_t(1) << kStages;
  VF v[kN];
  for (size_t i = 0; i < kN; ++i) v[i] = hn::LoadU(d, x + i * stride);
  for (size_t h = 1; h < kN; h *= 2) {
    for (size_t i = 0; i < kN; ++i) {
      if ((i & h) != 0) continue;
      const VF a = v[i], b = v[i + h];
      v[i] = hn::Add(a, b);
      v[i + h] = hn::Sub(a, b);
    }
  }
  for (size_t i = 0; i < kN; ++i) hn::StoreU(v[i], d, x + i * stride);
}

template <int kStages>
HWY_INLINE void butterflies(float* x, size_t dim, size_t h) {
  for (size_t begin = 0; begin < dim; begin += h << kStages) {
    for (size_t i = begin; i < begin + h; ++i) butterfly<kStages>(x + i * kBlock, h * kBlock);
  }
}

/// The columns [begin, end) of keys [dim][kBlock] times H, but for the factor, which is given back.
HWY_INLINE float rotate_columns(float* keys, size_t dim, size_t begin, size_t end) {
  const size_t size = hadamard_size(dim);
  for (size_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
    size_t h = 1;
    for (; h * 8 <= size; h *= 8) butterflies<3>(keys + j, dim, h);
    if (h * 4 == size) butterflies<2>(keys + j, dim, h);
    if (h * 2 == size) butterflies<1>(keys + j, dim, h);
  }
  return 1.0f / std::sqrt(float(size));
}

/// Columns [begin, end) of the block of keys at `position`, [dim][kBlock], as they are attended: turned back, with the
/// bias at each position. The angle of a position is that of its block's first, and of as far as it is in the block.
HWY_NOINLINE void add_key_bias(const AttentionJob& job, size_t head, int position, size_t begin, size_t end,
                               float* HWY_RESTRICT keys) {
  const AttentionSpec& spec = *job.spec;
  const DF d;
  const size_t dim = size_t(spec.head_dim), half = size_t(spec.rope.dims) / 2;
  const VF factor = hn::Set(d, spec.rotate_keys ? rotate_columns(keys, dim, begin, end) : 1.0f);
  const float* bias = spec.key_bias + head * dim;
  const float* cosines = job.block_angles + size_t(position / int(kBlock)) * 2 * half;
  const float* sines = cosines + half;
  const size_t first = begin / kLanes * kLanes;
  for (size_t i = 0; i < half; ++i) {
    const size_t low = spec.rope.traditional ? 2 * i : i, high = spec.rope.traditional ? 2 * i + 1 : i + half;
    const VF x = hn::Set(d, bias[low] * cosines[i] - bias[high] * sines[i]);
    const VF y = hn::Set(d, bias[high] * cosines[i] + bias[low] * sines[i]);
    const float* within = job.angles_within + 2 * i * kBlock;
    float *const a = keys + low * kBlock, *const b = keys + high * kBlock;
    for (size_t j = first; j < end; j += kLanes) {
      const VF c = hn::LoadU(d, within + j), s = hn::LoadU(d, within + kBlock + j);
      const VF bias_a = hn::NegMulAdd(y, s, hn::Mul(x, c)), bias_b = hn::MulAdd(x, s, hn::Mul(y, c));
      hn::StoreU(hn::MulAdd(hn::LoadU(d, a + j), factor, bias_a), d, a + j);
      hn::StoreU(hn::MulAdd(hn::LoadU(d, b + j), factor, bias_b), d, b + j);
    }
  }
  for (size_t i = 2 * half; i < dim; ++i) {
    float* const a = keys + i * kBlock;
    for (size_t j = first; j < end; j += kLanes) {
      hn::StoreU(hn::MulAdd(hn::LoadU(d, a + j), factor, hn::Set(d, bias[i])), d, a + j);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif
