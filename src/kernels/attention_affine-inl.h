// KV rows as MLX stores quantized matrices, once per target: groups of `kv_group` elements along head_dim, each element
// 8 or 4 bits in little-endian u32 words, with a scale and a bias per group. Included by attention-inl.h.
//
// Quantizing does what `quantize()` in MLX's mlx/backend/cpu/quantized.cpp does, in f32 and in its order of operations:
// the words are those of mx::quantize over the f32 row, scales and biases are its own, cast to the spec's dtype. (The
// words come from the scale before the cast, as in MLX.) A NaN becomes the bias; MLX leaves it undefined. Rotated rows
// of 4 bits are quantized by a rule of our own, and read as all others are.

#if defined(TORPOR_KERNELS_ATTENTION_AFFINE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_ATTENTION_AFFINE_INL_H_
#undef TORPOR_KERNELS_ATTENTION_AFFINE_INL_H_
#else
#define TORPOR_KERNELS_ATTENTION_AFFINE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include <hwy/highway.h>

#include "kernels/attention_hadamard-inl.h"
#include "kernels/attention_math-inl.h"
#include "kernels/attention_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Stands for packed rows; an element is a word, moved about as a float.
struct RowsAffine {
  using Element = float;
};

/// Where scales and biases of one kv head's row are.
HWY_INLINE size_t first_group(const AttentionSpec& spec, size_t head, int position) {
  return (head * kSegmentTokens + size_t(position % kSegmentTokens)) * size_t(spec.head_dim / spec.kv_group);
}

// ---- quantizing

HWY_INLINE void store_scale(KvDtype dtype, float value, std::byte* to, size_t at) {
  switch (dtype) {
    case KvDtype::kF32: RowsF32::store(&value, 1, reinterpret_cast<float*>(to) + at); break;
    case KvDtype::kF16: RowsF16::store(&value, 1, reinterpret_cast<uint16_t*>(to) + at); break;
    default: RowsBF16::store(&value, 1, reinterpret_cast<uint16_t*>(to) + at); break;
  }
}

/// The least and the greatest of `n` elements, a multiple of 32.
HWY_INLINE std::pair<float, float> range_of(const float* x, size_t n) {
  const DF d;
  VF low = hn::Set(d, std::numeric_limits<float>::infinity()), high = hn::Neg(low);
  for (size_t i = 0; i < n; i += kLanes) {
    const VF v = hn::LoadU(d, x + i);
    low = hn::Min(v, low);
    high = hn::Max(v, high);
  }
  return {hn::GetLane(hn::MinOfLanes(d, low)), hn::GetLane(hn::MaxOfLanes(d, high))};
}

/// `n` levels of 4 bits to `n / 2` bytes.
HWY_INLINE void pack_nibbles(const uint8_t* levels, size_t n, uint8_t* out) {
  for (size_t i = 0; i < n / 2; ++i) out[i] = uint8_t(levels[2 * i] | levels[2 * i + 1] << 4);
}

/// `n` elements, a multiple of 32, to `n * bits / 8` bytes.
HWY_INLINE void quantize_group(const float* x, size_t n, int bits, uint8_t* out, float& scale_out, float& bias_out) {
  const DF d;
  const auto [minimum, maximum] = range_of(x, n);
  // MLX's rule: the edge of larger magnitude is met exactly, and zero is a level.
  const float levels = float((1 << bits) - 1);
  const bool negative = std::abs(minimum) > std::abs(maximum);
  float scale = std::max((maximum - minimum) / levels, 1e-7f);
  if (!negative) scale = -scale;
  const float edge = negative ? minimum : maximum;
  const float zero_level = std::rint(edge / scale);
  float bias = 0;
  if (zero_level != 0) {
    scale = edge / zero_level;
    bias = edge;
  }
  // Clamped first, so that adding 1.5 * 2^23 rounds to the nearest integer, ties to even, on every target.
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const VF magic = hn::Set(d, 12582912.0f);
  uint8_t levels_of[128];
  uint8_t* to = bits == 8 ? out : levels_of;
  for (size_t i = 0; i < n; i += kLanes) {
    const VF q = hn::Div(hn::Sub(hn::LoadU(d, x + i), hn::Set(d, bias)), hn::Set(d, scale));
    const VF clamped = hn::IfThenElseZero(hn::Ge(q, hn::Zero(d)), hn::Min(q, hn::Set(d, levels)));
    const VF rounded = hn::Sub(hn::Add(clamped, magic), magic);
    hn::StoreU(hn::DemoteTo(d8, hn::ConvertTo(di, rounded)), d8, to + i);
  }
  if (bits == 4) pack_nibbles(levels_of, n, out);
  scale_out = scale;
  bias_out = bias;
}

float rounded_to(KvDtype dtype, float value) {
  std::byte stored[4];
  store_scale(dtype, value, stored, 0);
  const auto* bits = reinterpret_cast<const uint16_t*>(stored);
  return dtype == KvDtype::kF32 ? value : dtype == KvDtype::kF16 ? load_one<RowsF16>(bits) : load_one<RowsBF16>(bits);
}

constexpr float kRotatedLevels = 15;  // beside the lowest

/// The levels of `n` elements, which are rounded to the nearest; gives back the sum of squares of what that costs. The
/// sum is of 16 lanes in order, on every target.
HWY_INLINE float nearest_levels(const float* x, size_t n, float scale, float bias, uint8_t* out) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const VF magic = hn::Set(d, 12582912.0f), by = hn::Set(d, scale), from = hn::Set(d, bias);
  const VF inverse = hn::Set(d, 1.0f / scale);
  float errors[kSumLanes] = {};
  for (size_t i = 0; i < n; i += kLanes) {
    const VF v = hn::LoadU(d, x + i), q = hn::Mul(hn::Sub(v, from), inverse);
    const VF clamped = hn::IfThenElseZero(hn::Ge(q, hn::Zero(d)), hn::Min(q, hn::Set(d, kRotatedLevels)));
    const VF level = hn::Sub(hn::Add(clamped, magic), magic);
    hn::StoreU(hn::DemoteTo(d8, hn::ConvertTo(di, level)), d8, out + i);
    const VF error = hn::Sub(hn::Add(hn::Mul(level, by), from), v);
    float* const lanes = errors + i % kSumLanes;
    hn::StoreU(hn::Add(hn::LoadU(d, lanes), hn::Mul(error, error)), d, lanes);
  }
  float sum = 0;
  for (const float error : errors) sum += error;
  return sum;
}

/// The same for 4 bits of rotated rows: of several ranges about the elements' middle, each with its scale and bias as
/// they are stored, that whose error is least. MLX's rule meets one edge and zero, which is worth nothing to rotated
/// elements.
HWY_NOINLINE void quantize_rotated_group(KvDtype dtype, const float* x, size_t n, uint8_t* out, float& scale_out,
                                         float& bias_out) {
  const auto [minimum, maximum] = range_of(x, n);
  const float middle = 0.5f * minimum + 0.5f * maximum, reach = 0.5f * maximum - 0.5f * minimum;
  uint8_t best[128], levels[128];
  float least = std::numeric_limits<float>::infinity();
  for (int part = 16; part >= 12; --part) {
    const float half = reach * (float(part) / 16);
    const float scale = std::max(rounded_to(dtype, 2 * half / kRotatedLevels), 1e-7f);
    const float bias = rounded_to(dtype, middle - half);
    const float error = nearest_levels(x, n, scale, bias, levels);
    if (part != 16 && !(error < least)) continue;
    least = error;
    scale_out = scale;
    bias_out = bias;
    std::memcpy(best, levels, n);
  }
  pack_nibbles(best, n, out);
}

/// One head's row, whose groups begin at `at`.
HWY_INLINE void quantize_row(const AttentionSpec& spec, int bits, bool rotated, const float* x, size_t dim,
                             std::byte* words, std::byte* scales, std::byte* biases, size_t at) {
  const size_t group = size_t(spec.kv_group), bytes = group * size_t(bits) / 8;
  for (size_t g = 0; g < dim / group; ++g) {
    float scale, bias;
    uint8_t* const to = reinterpret_cast<uint8_t*>(words) + (at + g) * bytes;
    if (rotated && bits == 4) {
      quantize_rotated_group(spec.kv_dtype, x + g * group, group, to, scale, bias);
    } else {
      quantize_group(x + g * group, group, bits, to, scale, bias);
    }
    store_scale(spec.kv_dtype, scale, scales, at + g);
    store_scale(spec.kv_dtype, bias, biases, at + g);
  }
}

HWY_NOINLINE void append_affine(const AttentionJob& job, const AttentionSequence& sequence, int position, const float* k,
                                const float* v) {
  const AttentionSpec& spec = *job.spec;
  const size_t dim = size_t(spec.head_dim);
  const KvRunView& run = sequence.runs[size_t(position / kSegmentTokens)];
  for (size_t h = 0; h < size_t(spec.n_kv_heads); ++h) {
    const size_t at = first_group(spec, h, position);
    quantize_row(spec, spec.kv_bits.keys, spec.rotate_keys, k + h * dim, dim, run.keys, run.key_scales, run.key_biases,
                 at);
    quantize_row(spec, spec.kv_bits.values, spec.rotate_values, v + h * dim, dim, run.values, run.value_scales,
                 run.value_biases, at);
  }
}

// ---- dequantizing: an element is scale * level + bias in f32

/// Scales or biases [begin, end) from `at` on, to floats.
HWY_INLINE void load_scales(KvDtype dtype, const std::byte* from, size_t at, size_t begin, size_t end, float* out) {
  from += (at + begin) * kv_dtype_size(dtype);
  const size_t n = end - begin;
  switch (dtype) {
    case KvDtype::kF32: widen<RowsF32>(reinterpret_cast<const float*>(from), n, n, 0, 1, nullptr, out + begin); break;
    case KvDtype::kF16: widen<RowsF16>(reinterpret_cast<const uint16_t*>(from), n, n, 0, 1, nullptr, out + begin); break;
    default: widen<RowsBF16>(reinterpret_cast<const uint16_t*>(from), n, n, 0, 1, nullptr, out + begin); break;
  }
}

/// [rows][groups] to [groups][kBlock].
HWY_INLINE void transpose_scales(const float* from, size_t groups, size_t begin, size_t end, float* HWY_RESTRICT out) {
  for (size_t j = begin; j < end; ++j) {
    for (size_t g = 0; g < groups; ++g) out[g * kBlock + j] = from[j * groups + g];
  }
}

/// Columns [begin, end) of transposed words [dim * kBits / 32][kBlock] to [dim][kBlock], by scales and biases
/// [dim / group][kBlock]. With kRotated each kFirstRotated elements are turned back. As many words of `ahead` are
/// brought
/// into the cache.
template <int kBits, bool kRotated>
HWY_INLINE void dequantize_keys(const float* words, const float* scales, const float* biases, size_t dim, size_t group,
                                size_t begin, size_t end, const float* ahead, float* HWY_RESTRICT out) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::RebindToUnsigned<DF> du;
  constexpr size_t kPerWord = 32 / kBits;
  const auto mask = hn::Set(du, (1u << kBits) - 1);
  for (size_t i = 0; i < dim; i += kFirstRotated) {
    const size_t g = i / group * kBlock;
    for (size_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
      const VF scale = hn::LoadU(d, scales + g + j), bias = hn::LoadU(d, biases + g + j);
      VF v[kFirstRotated];
      for (size_t w = 0; w < kFirstRotated; w += kPerWord) {
        const size_t at = (i + w) / kPerWord * kBlock + j;
        fetch(ahead + at);
        auto word = hn::BitCast(du, hn::LoadU(d, words + at));
        for (size_t e = 0; e < kPerWord; ++e) {
          const VF level = hn::ConvertTo(d, hn::BitCast(di, hn::And(word, mask)));
          v[w + e] = hn::MulAdd(scale, level, bias);
          word = hn::ShiftRight<kBits>(word);
        }
      }
      if constexpr (kRotated) butterfly(v);
      for (size_t e = 0; e < kFirstRotated; ++e) hn::StoreU(v[e], d, out + (i + e) * kBlock + j);
    }
  }
}

/// `n` elements of 4 bits, a multiple of 32, to bytes.
HWY_INLINE void spread_nibbles(const uint8_t* from, size_t n, uint8_t* HWY_RESTRICT to) {
#if HWY_TARGET == HWY_SCALAR
  for (size_t i = 0; i < n; ++i) to[i] = uint8_t(from[i / 2] >> (i % 2 * 4) & 15);
#else
  const hn::CappedTag<uint8_t, 16> d;
  const auto mask = hn::Set(d, uint8_t{15});
  for (size_t i = 0; i < n; i += 32) {
    const auto both = hn::LoadU(d, from + i / 2);
    const auto even = hn::And(both, mask), odd = hn::ShiftRight<4>(both);
    hn::StoreU(hn::InterleaveLower(d, even, odd), d, to + i);
    hn::StoreU(hn::InterleaveUpper(d, even, odd), d, to + i + 16);
  }
#endif
}

/// Rows [begin, end) of words to rows of `dim` floats, by scales and biases [kBlock][dim / group]. As many words of
/// `ahead` are brought into the cache.
template <int kBits>
HWY_INLINE void dequantize_values(const float* words, const float* scales, const float* biases, size_t dim, size_t group,
                                  size_t begin, size_t end, const float* ahead, float* HWY_RESTRICT out) {
  const DF d;
  const hn::Rebind<int32_t, DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const size_t groups = dim / group, bytes = group * kBits / 8;
  uint8_t spread[128];
  for (size_t at = begin * groups; at < end * groups; ++at) {
    const uint8_t* levels = reinterpret_cast<const uint8_t*>(words) + at * bytes;
    for (size_t i = 0; i < bytes; i += 64) fetch(reinterpret_cast<const uint8_t*>(ahead) + at * bytes + i);
    if constexpr (kBits == 4) {
      spread_nibbles(levels, group, spread);
      levels = spread;
    }
    const VF scale = hn::Set(d, scales[at]), bias = hn::Set(d, biases[at]);
    for (size_t i = 0; i < group; i += kLanes) {
      const VF level = hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d8, levels + i)));
      hn::StoreU(hn::MulAdd(scale, level, bias), d, out + at * group + i);
    }
  }
}

/// Rows [begin, end) of values of 4 bits to bytes, as dequantize_values reads them.
HWY_INLINE void spread_values(const uint8_t* from, size_t dim, size_t begin, size_t end, const uint8_t* ahead,
                              uint8_t* HWY_RESTRICT to) {
  for (size_t i = begin * dim; i < end * dim; i += 128) fetch(ahead + i / 2);
  spread_nibbles(from + begin * dim / 2, (end - begin) * dim, to + begin * dim);
}

/// Brings the scales and biases of the block at `position` into the cache.
HWY_INLINE void fetch_scales(const AttentionSpec& spec, const AttentionSequence& sequence, size_t head, int position) {
  const KvRunView& run = sequence.runs[size_t(position / kSegmentTokens)];
  const size_t size = kv_dtype_size(spec.kv_dtype), at = first_group(spec, head, position) * size;
  const size_t bytes = size_t(spec.head_dim / spec.kv_group) * kBlock * size;
  for (const std::byte* part : {run.key_scales, run.key_biases, run.value_scales, run.value_biases}) {
    for (size_t i = 0; i < bytes; i += 64) fetch(part + at + i);
  }
}

/// A block's scales and biases in f32; of keys [dim / group][kBlock], of values [kBlock][dim / group].
struct Affine {
  const float* scales;
  const float* biases;
};

/// Of rows [begin, end) of the block of keys at `position`; and its words, transposed. `to` has room for four tables.
template <int kBits>
HWY_INLINE Affine load_keys(const AttentionSpec& spec, const AttentionSequence& sequence, size_t head, int position,
                            const float* keys, const float* zeros, size_t begin, size_t end, float* HWY_RESTRICT words,
                            float* HWY_RESTRICT to) {
  const size_t groups = size_t(spec.head_dim / spec.kv_group), all = groups * kBlock;
  const KvRunView& run = sequence.runs[size_t(position / kSegmentTokens)];
  const size_t at = first_group(spec, head, position);
  load_scales(spec.kv_dtype, run.key_scales, at, begin * groups, end * groups, to);
  load_scales(spec.kv_dtype, run.key_biases, at, begin * groups, end * groups, to + all);
  transpose_keys(keys, zeros, size_t(spec.head_dim) * kBits / 32, begin, end, words);
  if (groups == 1) return {to, to + all};
  transpose_scales(to, groups, begin, end, to + 2 * all);
  transpose_scales(to + all, groups, begin, end, to + 3 * all);
  return {to + 2 * all, to + 3 * all};
}

/// Of values, beside the keys': the first two tables of `to`, or, where keys of one group are there, the last two.
HWY_INLINE Affine load_values(const AttentionSpec& spec, const AttentionSequence& sequence, size_t head, int position,
                              size_t begin, size_t end, float* HWY_RESTRICT to) {
  const size_t groups = size_t(spec.head_dim / spec.kv_group), all = groups * kBlock;
  const KvRunView& run = sequence.runs[size_t(position / kSegmentTokens)];
  const size_t at = first_group(spec, head, position);
  if (groups == 1) to += 2 * all;
  load_scales(spec.kv_dtype, run.value_scales, at, begin * groups, end * groups, to);
  load_scales(spec.kv_dtype, run.value_biases, at, begin * groups, end * groups, to + all);
  return {to, to + all};
}

/// Rows [begin, end) of the block of kBlock rows at `position`, keys with their bias: keys to [dim][kBlock], values to
/// [kBlock][dim]. Columns of other keys are garbage or zero. `words` and `scales` are scratch. `ahead` is brought into
/// the cache meanwhile.
template <int kKeyBits, int kValueBits>
HWY_NOINLINE void dequantize_block(const AttentionJob& job, const AttentionSequence& sequence, size_t head,
                                   int position, const Block<float>& here, const Block<float>& ahead,
                                   const float* zeros, size_t begin, size_t end, float* HWY_RESTRICT words,
                                   float* HWY_RESTRICT scales, float* HWY_RESTRICT keys, float* HWY_RESTRICT values) {
  const AttentionSpec& spec = *job.spec;
  const size_t dim = size_t(spec.head_dim), group = size_t(spec.kv_group);
  const Affine k = load_keys<kKeyBits>(spec, sequence, head, position, here.keys, zeros, begin, end, words, scales);
  if (spec.key_bias != nullptr && spec.rotate_keys) {
    dequantize_keys<kKeyBits, true>(words, k.scales, k.biases, dim, group, begin, end, ahead.keys, keys);
  } else {
    dequantize_keys<kKeyBits, false>(words, k.scales, k.biases, dim, group, begin, end, ahead.keys, keys);
  }
  if (spec.key_bias != nullptr) add_key_bias(job, head, position, begin, end, keys);
  const Affine v = load_values(spec, sequence, head, position, begin, end, scales);
  dequantize_values<kValueBits>(here.values, v.scales, v.biases, dim, group, begin, end, ahead.values, values);
}

// ---- products of few rows, which would read a dequantized block but once: elements are dequantized in registers. Each
// is the element that dequantize_block makes, and the chains are product's.

#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
constexpr int kAffineVectors[kMaxRows + 1] = {0, 4, 2, 2, 1, 1, 1};  // 16 registers
#else
constexpr int kAffineVectors[kMaxRows + 1] = {0, 4, 4, 4, 2, 2, 2};  // 32
#endif

template <int MR, int NV, int kBits>
HWY_INLINE void score_micro(const float* HWY_RESTRICT q, const float* HWY_RESTRICT words, const Affine& affine,
                            size_t dim, size_t group, const float* ahead, float* HWY_RESTRICT scores) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const hn::RebindToUnsigned<DF> du;
  constexpr size_t kPerWord = 32 / kBits;
  const auto mask = hn::Set(du, (1u << kBits) - 1);
  VF acc[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int n = 0; n < NV; ++n) acc[r][n] = hn::Zero(d);
  }
  for (size_t i0 = 0; i0 < dim; i0 += group) {
    VF scale[NV], bias[NV];
    for (int n = 0; n < NV; ++n) {
      scale[n] = hn::LoadU(d, affine.scales + i0 / group * kBlock + size_t(n) * kLanes);
      bias[n] = hn::LoadU(d, affine.biases + i0 / group * kBlock + size_t(n) * kLanes);
    }
    for (size_t i = i0; i < i0 + group; i += kPerWord) {
      hn::Vec<decltype(du)> word[NV];
      for (int n = 0; n < NV; ++n) {
        const size_t at = i / kPerWord * kBlock + size_t(n) * kLanes;
        fetch(ahead + at);
        word[n] = hn::BitCast(du, hn::LoadU(d, words + at));
      }
      for (size_t e = 0; e < kPerWord; ++e) {
        VF factor[MR];
        for (int r = 0; r < MR; ++r) factor[r] = hn::Set(d, q[size_t(r) * dim + i + e]);
        for (int n = 0; n < NV; ++n) {
          const VF level = hn::ConvertTo(d, hn::BitCast(di, hn::And(word[n], mask)));
          const VF key = hn::MulAdd(scale[n], level, bias[n]);
          word[n] = hn::ShiftRight<kBits>(word[n]);
          for (int r = 0; r < MR; ++r) acc[r][n] = hn::MulAdd(factor[r], key, acc[r][n]);
        }
      }
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int n = 0; n < NV; ++n) hn::StoreU(acc[r][n], d, scores + size_t(r) * kBlock + size_t(n) * kLanes);
  }
}

template <int MR, int NV, int kBits>
HWY_INLINE void score_columns(const float* q, const float* words, const Affine& affine, size_t dim, size_t group,
                              const float* ahead, float* scores, size_t column, size_t end) {
  for (; column + NV * kLanes <= end; column += NV * kLanes) {
    score_micro<MR, NV, kBits>(q, words + column, {affine.scales + column, affine.biases + column}, dim, group,
                               ahead + column, scores + column);
  }
  if constexpr (NV > 1) {
    if (column < end) score_columns<MR, NV / 2, kBits>(q, words, affine, dim, group, ahead, scores, column, end);
  }
}

/// scores [rows][kBlock] in columns [column, end), multiples of 16: `rows` queries times keys in transposed words.
template <int kBits>
HWY_NOINLINE void score_affine(size_t rows, const float* q, const float* words, const Affine& affine, size_t dim,
                               size_t group, const float* ahead, float* scores, size_t column, size_t end) {
  with_rows(rows, [&](auto n) HWY_ATTR {
    constexpr int MR = decltype(n)::value;
    score_columns<MR, kAffineVectors[MR], kBits>(q, words, affine, dim, group, ahead, scores, column, end);
  });
}

template <int MR, int NV>
HWY_INLINE void output_micro(const float* HWY_RESTRICT weights, const uint8_t* HWY_RESTRICT levels,
                             const Affine& affine, size_t dim, size_t group, size_t first_dim, size_t n_keys,
                             const float* factors, const uint8_t* ahead, float* HWY_RESTRICT out, size_t padded) {
  const DF d;
  const hn::Rebind<int32_t, DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const size_t groups = dim / group;
  VF acc[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int n = 0; n < NV; ++n) {
      const VF so_far = hn::LoadU(d, out + size_t(r) * padded + first_dim + size_t(n) * kLanes);
      acc[r][n] = hn::Mul(so_far, hn::Set(d, factors[r]));
    }
  }
  for (size_t j = 0; j < n_keys; ++j) {
    fetch(ahead + j * dim + first_dim);
    VF weight[MR];
    for (int r = 0; r < MR; ++r) weight[r] = hn::Set(d, weights[size_t(r) * kBlock + j]);
    for (int n = 0; n < NV; ++n) {
      const size_t i = first_dim + size_t(n) * kLanes, g = j * groups + i / group;
      const VF level = hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d8, levels + j * dim + i)));
      const VF value = hn::MulAdd(hn::Set(d, affine.scales[g]), level, hn::Set(d, affine.biases[g]));
      for (int r = 0; r < MR; ++r) acc[r][n] = hn::MulAdd(weight[r], value, acc[r][n]);
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int n = 0; n < NV; ++n) hn::StoreU(acc[r][n], d, out + size_t(r) * padded + first_dim + size_t(n) * kLanes);
  }
}

/// out [rows][dim], times the rows' factors, plus weights [rows][kBlock] times `n_keys` values, whose levels are bytes.
HWY_NOINLINE void output_affine(size_t rows, const float* weights, const uint8_t* levels, const Affine& affine,
                                size_t dim, size_t group, size_t n_keys, const float* factors, const uint8_t* ahead,
                                float* out) {
  with_rows(rows, [&](auto n) HWY_ATTR {
    constexpr int MR = decltype(n)::value, NV = kAffineVectors[MR];
    size_t i = 0;
    for (; i + NV * kLanes <= dim; i += NV * kLanes) {
      output_micro<MR, NV>(weights, levels, affine, dim, group, i, n_keys, factors, ahead, out, dim);
    }
    for (; i < dim; i += kLanes) {
      output_micro<MR, 1>(weights, levels, affine, dim, group, i, n_keys, factors, ahead, out, dim);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif
