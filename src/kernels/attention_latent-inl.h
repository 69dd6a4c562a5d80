// Multi-head latent attention: rows of latents that all heads share, once per target. A block of latents serves twice,
// as keys beside the dims that rotate, and as values. Included by attention-inl.h.

#if defined(TORPOR_KERNELS_ATTENTION_LATENT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_ATTENTION_LATENT_INL_H_
#undef TORPOR_KERNELS_ATTENTION_LATENT_INL_H_
#else
#define TORPOR_KERNELS_ATTENTION_LATENT_INL_H_
#endif

#include <type_traits>

#include <hwy/highway.h>

#include "kernels/attention_affine-inl.h"
#include "kernels/attention_hadamard-inl.h"
#include "kernels/attention_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

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

/// One row of `dim` elements, at `position`, to a tensor of the cache.
HWY_INLINE void store_row(const AttentionSpec& spec, int bits, bool rotated, const float* x, size_t dim, int position,
                          std::byte* rows, std::byte* scales, std::byte* biases) {
  const size_t at = size_t(position % kSegmentTokens);
  if (bits != 0) {
    return quantize_row(spec, bits, rotated, x, dim, rows, scales, biases, at * (dim / size_t(spec.kv_group)));
  }
  switch (spec.kv_dtype) {
    case KvDtype::kF32: RowsF32::store(x, dim, reinterpret_cast<float*>(rows) + at * dim); break;
    case KvDtype::kF16: RowsF16::store(x, dim, reinterpret_cast<uint16_t*>(rows) + at * dim); break;
    default: RowsBF16::store(x, dim, reinterpret_cast<uint16_t*>(rows) + at * dim); break;
  }
}

/// Tokens [first, last) of one sequence: queries and the shared row rotate in their last dims, and the row is kept.
HWY_NOINLINE void prepare_latents(const AttentionJob& job, const PrepareTask& task) {
  const AttentionSpec& spec = *job.spec;
  const AttentionSequence& sequence = job.sequences[size_t(task.sequence)];
  const size_t dim = size_t(spec.head_dim), latent = size_t(spec.latent), rest = dim - latent;
  const size_t half = rest / 2, n_heads = size_t(spec.n_heads);
  for (int t = task.first; t < task.last; ++t) {
    float* row = job.qkv + size_t(sequence.row + t) * job.stride;
    const float* cosines = job.rope + (task.rope_row + size_t(t - task.first)) * 2 * half;
    for (size_t h = 0; h <= n_heads; ++h) {
      float* x = row + h * dim;
      rotate_head(x + latent, cosines, cosines + half, half, spec.rope.traditional);
      for (size_t i = 0; h < n_heads && i < dim; ++i) x[i] *= job.q_scale;
      if (spec.rotate_keys) rotate_row(x, latent);
      if (spec.rotate_values) rotate_row(x + latent, rest);
    }
    const float* shared = row + n_heads * dim;
    const int position = sequence.position + t;
    const KvRunView& run = sequence.runs[size_t(position / kSegmentTokens)];
    store_row(spec, spec.kv_bits.keys, spec.rotate_keys, shared, latent, position, run.keys, run.key_scales,
              run.key_biases);
    store_row(spec, spec.kv_bits.values, spec.rotate_values, shared + latent, rest, position, run.values,
              run.value_scales, run.value_biases);
  }
}

/// Rows [begin, end) of `dim` elements of the block at `position`, as floats [kBlock][dim].
template <class Rows>
HWY_INLINE void load_rows(const AttentionSpec& spec, int bits, size_t dim, int position, size_t begin, size_t end,
                          const std::byte* rows, const std::byte* scales, const std::byte* biases,
                          float* HWY_RESTRICT numbers, float* HWY_RESTRICT out) {
  const size_t at = size_t(position % kSegmentTokens);
  if constexpr (std::is_same_v<Rows, RowsAffine>) {
    const size_t group = size_t(spec.kv_group), groups = dim / group;
    float* const offsets = numbers + groups * kBlock;
    load_scales(spec.kv_dtype, scales, at * groups, begin * groups, end * groups, numbers);
    load_scales(spec.kv_dtype, biases, at * groups, begin * groups, end * groups, offsets);
    const float* words = reinterpret_cast<const float*>(rows) + at * (dim * size_t(bits) / 32);
    const auto dequantize = bits == 8 ? dequantize_values<8> : dequantize_values<4>;
    dequantize(words, numbers, offsets, dim, group, begin, end, words, out);
  } else {
    widen<Rows>(reinterpret_cast<const typename Rows::Element*>(rows) + at * dim, dim, dim, begin, end, nullptr, out);
  }
}

/// Rows [begin, end) of the block at `position`: keys [head_dim][kBlock], whose first `latent` dims are the values
/// [kBlock][latent]. `numbers` has room for a block's scales and biases, `rotating` for its other dims.
template <class Rows>
HWY_NOINLINE void load_latents(const AttentionSpec& spec, const KvRunView& run, int position, size_t begin, size_t end,
                               const float* zeros, float* numbers, float* rotating, float* keys, float* values) {
  const size_t latent = size_t(spec.latent), rest = size_t(spec.head_dim) - latent;
  load_rows<Rows>(spec, spec.kv_bits.keys, latent, position, begin, end, run.keys, run.key_scales, run.key_biases,
                  numbers, values);
  load_rows<Rows>(spec, spec.kv_bits.values, rest, position, begin, end, run.values, run.value_scales, run.value_biases,
                  numbers, rotating);
  transpose_keys(values, zeros, latent, begin, end, keys);
  transpose_keys(rotating, zeros, rest, begin, end, keys + latent * kBlock);
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif
