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
#include <type_traits>
#include <utility>

#include <hwy/highway.h>

#include "kernels/attention_affine-inl.h"
#include "kernels/attention_hadamard-inl.h"
#include "kernels/attention_latent-inl.h"
#include "kernels/attention_math-inl.h"
#include "kernels/attention_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// ---- preparing rows: norm, rotation, append

HWY_INLINE void normalise_head(float* x, size_t n, const float* weight, float eps) {
  const DF d;
  VF sums[kSumParts];
  for (VF& sum : sums) sum = hn::Zero(d);
  size_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (size_t p = 0; p < kSumParts; ++p) {
      const VF v = hn::LoadU(d, x + i + p * kLanes);
      sums[p] = hn::MulAdd(v, v, sums[p]);
    }
  }
  HWY_ALIGN float lanes[kSumLanes];
  for (size_t p = 0; p < kSumParts; ++p) hn::Store(sums[p], d, lanes + p * kLanes);
  float total = sum_of_lanes(lanes);
  for (size_t j = i; j < n; ++j) total += x[j] * x[j];
  const float factor = 1.0f / std::sqrt(total / float(n) + eps);
  for (size_t j = 0; j < n; ++j) x[j] = x[j] * factor * weight[j];
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
  if (spec.latent > 0) return prepare_latents(job, task);
  const AttentionSequence& sequence = job.sequences[size_t(task.sequence)];
  const size_t dim = size_t(spec.head_dim), n_heads = size_t(spec.n_heads), n_kv = size_t(spec.n_kv_heads);
  const size_t half = size_t(spec.rope.dims) / 2;
  const bool rotate_queries = spec.rotate_keys && spec.key_bias == nullptr;
  for (int t = task.first; t < task.last; ++t) {
    float* row = job.qkv + size_t(sequence.row + t) * job.stride;
    const float* cosines = job.rope + (size_t(task.rope_row) + size_t(t - task.first)) * 2 * half;
    for (size_t h = 0; h < n_heads + n_kv; ++h) {
      float* x = row + h * dim;
      if (h >= n_heads && spec.key_bias != nullptr) {
        for (size_t i = 0; i < dim; ++i) x[i] -= spec.key_bias[(h - n_heads) * dim + i];
      }
      const float* norm = h < n_heads ? spec.q_norm : spec.k_norm;
      if (norm != nullptr) normalise_head(x, dim, norm, spec.norm_eps);
      if (half != 0) rotate_head(x, cosines, cosines + half, half, spec.rope.traditional);
      if (h < n_heads) {
        for (size_t i = 0; i < dim; ++i) x[i] *= job.q_scale;
      }
      if (h < n_heads ? rotate_queries : spec.rotate_keys) rotate_row(x, dim);
    }
    const float* k = row + n_heads * dim;
    float* const v = row + (n_heads + n_kv) * dim;
    for (size_t h = 0; spec.rotate_values && h < n_kv; ++h) rotate_row(v + h * dim, dim);
    const int position = sequence.position + t;
    if (spec.kv_bits != 0) {
      append_affine(job, sequence, position, k, v);
      continue;
    }
    switch (spec.kv_dtype) {
      case KvDtype::kF32: append_row<RowsF32>(job, sequence, position, k, v); break;
      case KvDtype::kF16: append_row<RowsF16>(job, sequence, position, k, v); break;
      default: append_row<RowsBF16>(job, sequence, position, k, v); break;
    }
  }
}

// ---- tiles

/// A worker's memory for one tile.
struct Scratch {
  float *q, *acc, *total_acc, *maximum, *sum, *total_maximum, *total_sum, *scores, *factors, *keys, *narrow_keys, *values, *zeros,
      *scales;
  Scratch(size_t rows, const AttentionSpec& spec, size_t padded) {
    const size_t dim = size_t(spec.head_dim);
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
      sum = take(rows * kSumLanes);
      total_maximum = take(rows);
      total_sum = take(rows);
      scores = take(kMaxRows * kBlock);
      factors = take(kMaxRows);
      keys = take(dim * kBlock);
      narrow_keys = take(dim * kBlock / 2);
      values = take(padded * kBlock);
      zeros = take(dim);
      scales = take(spec.kv_bits == 0 ? 0 : 4 * size_t(spec.head_dim / spec.kv_group) * kBlock);
      if (pass == 0) base = attention_scratch(used);
    }
    std::memset(zeros, 0, dim * sizeof(float));
  }
};

/// Products with a block of keys [dim][kBlock] and of values [kBlock][padded], of the cache's type or f32.
template <class Rows>
struct FloatProducts {
  size_t dim, padded;
  Block<typename Rows::Element> here, ahead;

  /// Scores of `n` queries in columns [column, column + columns) of out [n][kBlock].
  HWY_INLINE void scores(size_t n, const float* q, size_t column, size_t columns, float* out) const {
    product<false, Rows>(n, q, dim, here.keys + column, kBlock, dim, nullptr, out + column, kBlock, columns,
                         ahead.keys);
  }
  /// out [n][padded], times the factors, plus weights [n][kBlock] of keys [first, last) times their values.
  HWY_INLINE void outputs(size_t n, const float* weights, size_t first, size_t last, const float* factors,
                          float* out) const {
    product<true, Rows>(n, weights + first, kBlock, here.values + first * padded, padded, last - first, factors, out,
                        padded, padded, ahead.values);
  }
};

/// The same with packed rows: transposed words of keys, and levels of values in bytes.
template <int kKeyBits>
struct AffineProducts {
  size_t dim, group;
  const float* words;
  Affine keys;
  const uint8_t* levels;
  Affine values;
  const float* words_ahead;
  const uint8_t* levels_ahead;

  HWY_INLINE void scores(size_t n, const float* q, size_t column, size_t columns, float* out) const {
    score_affine<kKeyBits>(n, q, words, keys, dim, group, words_ahead, out, column, column + columns);
  }
  HWY_INLINE void outputs(size_t n, const float* weights, size_t first, size_t last, const float* factors,
                          float* out) const {
    const size_t groups = dim / group;
    output_affine(n, weights + first, levels + first * dim,
                  {values.scales + first * groups, values.biases + first * groups}, dim, group, last - first, factors,
                  levels_ahead + first * dim, out);
  }
};

/// Scores, weights and outputs of all rows of a tile for the block of keys at `block`.
template <class Products>
HWY_INLINE void attend_block(const AttentionJob& job, const TileTask& task, int block, const Products& products,
                             const Scratch& s) {
  const AttentionSpec& spec = *job.spec;
  const size_t dim = size_t(spec.head_dim), padded = job.padded, group = job.group;
  const size_t rows = size_t(task.count) * group;
  // As few products as there can be, of about as many rows each.
  const size_t products_of_block = (rows + kMaxRows - 1) / kMaxRows;
  const size_t per_product = (rows + products_of_block - 1) / products_of_block;
  for (size_t r0 = 0; r0 < rows; r0 += per_product) {
    const size_t n = std::min(rows - r0, per_product);
    size_t row_begin[kMaxRows], row_end[kMaxRows];
    size_t low = kBlock, high = 0;
    bool same = true;
    for (size_t r = 0; r < n; ++r) {
      const int p = job.queries[size_t(task.first) + (r0 + r) / group].position;
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
    products.scores(n, s.q + r0 * dim, column, columns, s.scores);
    if (spec.softcap > 0) {
      for (size_t r = 0; r < n; ++r) cap_scores(s.scores + r * kBlock + column, columns, job.cap);
    }
    for (size_t r = 0; r < n; ++r) {
      if (row_begin[r] >= row_end[r]) continue;
      s.factors[r] = weigh(s.scores + r * kBlock, row_begin[r], row_end[r], s.maximum[r0 + r],
                           s.sum + (r0 + r) * kSumLanes);
    }
    if (same) {
      products.outputs(n, s.scores, low, high, s.factors, s.acc + r0 * padded);
      continue;
    }
    for (size_t r = 0; r < n; ++r) {
      if (row_begin[r] >= row_end[r]) continue;
      products.outputs(1, s.scores + r * kBlock, row_begin[r], row_end[r], s.factors + r, s.acc + (r0 + r) * padded);
    }
  }
}

/// The same for few rows of a packed block, of which any sees only keys [begin, end).
template <int kKeyBits>
HWY_NOINLINE void attend_packed(const AttentionJob& job, const TileTask& task, int block, const Block<float>& here,
                                const Block<float>& ahead, const float* zeros, size_t begin, size_t end,
                                const Scratch& s) {
  const AttentionSpec& spec = *job.spec;
  const AttentionSequence& sequence = job.sequences[size_t(task.sequence)];
  const size_t dim = size_t(spec.head_dim), head = size_t(task.group);
  const Affine keys =
      load_keys<kKeyBits>(spec, sequence, head, block, here.keys, zeros, begin, end, s.narrow_keys, s.scales);
  const Affine values = load_values(spec, sequence, head, block, begin, end, s.scales);
  const uint8_t* levels = reinterpret_cast<const uint8_t*>(here.values);
  const uint8_t* then = reinterpret_cast<const uint8_t*>(ahead.values);
  if (spec.kv_bits.values == 4) {
    uint8_t* const spread = reinterpret_cast<uint8_t*>(s.values);
    spread_values(levels, dim, begin, end, then, spread);
    levels = then = spread;
  }
  const AffineProducts<kKeyBits> products{dim,    size_t(spec.kv_group), s.narrow_keys, keys,
                                          levels, values,                ahead.keys,    then};
  attend_block(job, task, block, products, s);
}

/// The positions of a tile's queries: the least, and the greatest.
HWY_INLINE std::pair<int, int> positions(const AttentionJob& job, const TileTask& task) {
  const Query* first = job.queries + task.first;
  const auto [low, high] = std::minmax_element(first, first + task.count,
                                               [](const Query& a, const Query& b) { return a.position < b.position; });
  return {low->position, high->position};
}

/// The first block that a tile visits of a superblock.
HWY_INLINE int first_block(const AttentionJob& job, const TileTask& task, int super) {
  const int position = positions(job, task).first;
  return std::max(super * kSuper, first_key(*job.spec, position) / int(kBlock) * int(kBlock));
}

/// Leaves the partial of superblock `super` in maximum, sum (sum[row]) and acc. `next` is worked on then.
template <class Rows>
void run_super(const AttentionJob& job, const TileTask& task, int super, const TileTask& next, const Scratch& s) {
  using Element = typename Rows::Element;
  const AttentionSpec& spec = *job.spec;
  const AttentionSequence& sequence = job.sequences[size_t(task.sequence)];
  const size_t dim = size_t(spec.head_dim), padded = job.padded;
  const size_t rows = size_t(task.count) * job.group;
  const auto [position, last] = positions(job, task);

  std::fill(s.maximum, s.maximum + rows, -std::numeric_limits<float>::infinity());
  std::memset(s.sum, 0, rows * kSumLanes * sizeof(float));
  std::memset(s.acc, 0, rows * padded * sizeof(float));

  constexpr bool kAffine = std::is_same_v<Rows, RowsAffine>;
  const size_t key_width = kAffine ? size_t(spec.head_dim * spec.kv_bits.keys / 32) : dim;
  const size_t value_width = kAffine ? size_t(spec.head_dim * spec.kv_bits.values / 32) : dim;
  const auto block_of = [&](const TileTask& of, int block) {
    const KvRunView& run = job.sequences[size_t(of.sequence)].runs[size_t(block / kSegmentTokens)];
    const size_t at = size_t(of.group) * kSegmentTokens + size_t(block % kSegmentTokens);
    return Block<Element>{reinterpret_cast<const Element*>(run.keys) + at * key_width,
                          reinterpret_cast<const Element*>(run.values) + at * value_width};
  };
  const int to = std::min((super + 1) * kSuper, last + 1);
  for (int block = first_block(job, task, super); block < to; block += kBlock) {
    // The part of the block that any row sees; positions past it may hold anything.
    const size_t begin = size_t(std::max(0, first_key(spec, position) - block));
    const size_t end = size_t(std::min(int(kBlock), last + 1 - block));
    const FloatProducts<RowsWidened> widened{dim, padded, {s.keys, s.values}, {s.keys, s.values}};
    if (spec.latent > 0) {
      const KvRunView& run = sequence.runs[size_t(block / kSegmentTokens)];
      load_latents<Rows>(spec, run, block, begin, end, s.zeros, s.scales, s.narrow_keys, s.keys, s.values);
      attend_block(job, task, block, widened, s);
      continue;
    }
    const bool more = block + kBlock < to || super + 1 < task.super_end;
    const TileTask& then = more ? task : next;
    const int then_block = more ? block + kBlock : first_block(job, next, next.super_begin);
    const Block<Element> here = block_of(task, block), ahead = block_of(then, then_block);
    const Element* zeros = reinterpret_cast<const Element*>(s.zeros);
    // So few rows that dequantizing or widening while multiplying is cheaper than a block of floats.
    const bool few = rows <= (kAffine ? 1 : 2) * kMaxRows;
    if constexpr (kAffine) {
      fetch_scales(spec, job.sequences[size_t(then.sequence)], size_t(then.group), then_block);
      if (few && spec.key_bias == nullptr) {
        const auto attend = spec.kv_bits.keys == 8 ? attend_packed<8> : attend_packed<4>;
        attend(job, task, block, here, ahead, zeros, begin, end, s);
        continue;
      }
      const auto eight = spec.kv_bits.values == 8 ? dequantize_block<8, 8> : dequantize_block<8, 4>;
      const auto four = spec.kv_bits.values == 8 ? dequantize_block<4, 8> : dequantize_block<4, 4>;
      const auto dequantize = spec.kv_bits.keys == 8 ? eight : four;
      dequantize(job, sequence, size_t(task.group), block, here, ahead, zeros, begin, end, s.narrow_keys, s.scales,
                 s.keys, s.values);
      attend_block(job, task, block, widened, s);
    } else if constexpr (Rows::kIsFloat) {
      transpose_keys(here.keys, zeros, dim, begin, end, s.keys);
      if (dim != padded) widen<Rows>(here.values, dim, padded, begin, end, ahead.values, s.values);
      const float* values = dim == padded ? here.values : s.values;
      attend_block(job, task, block, FloatProducts<Rows>{dim, padded, {s.keys, values}, ahead}, s);
    } else {
      Element* narrow_keys = reinterpret_cast<Element*>(s.narrow_keys);
      transpose_keys(here.keys, zeros, dim, begin, end, narrow_keys);
      if (few && dim == padded) {
        const FloatProducts<Rows> products{dim, padded, {narrow_keys, here.values}, ahead};
        attend_block(job, task, block, products, s);
      } else {
        widen<Rows>(narrow_keys, kBlock, kBlock, 0, dim, ahead.keys, s.keys);
        widen<Rows>(here.values, dim, padded, begin, end, ahead.values, s.values);
        attend_block(job, task, block, widened, s);
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) s.sum[r] = sum_of_lanes(s.sum + r * kSumLanes);
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
  const size_t dim = job.value_dim, padded = job.padded, group = job.group;
  for (size_t r = 0; r < size_t(task.count) * group; ++r) {
    const size_t head = size_t(task.group) * group + r % group;
    const size_t row = size_t(job.queries[size_t(task.first) + r / group].row);
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
    if (spec.latent > 0 ? spec.rotate_keys : spec.rotate_values) rotate_row(out, dim);
  }
}

template <class Rows>
void run_tile(const AttentionJob& job, const TileTask& task, const TileTask& next) {
  const AttentionSpec& spec = *job.spec;
  const size_t dim = size_t(spec.head_dim), padded = job.padded, group = job.group;
  const size_t rows = size_t(task.count) * group;
  const Scratch s(rows, spec, padded);
  for (size_t t = 0; t < size_t(task.count); ++t) {
    std::memcpy(s.q + t * group * dim,
                job.qkv + size_t(job.queries[size_t(task.first) + t].row) * job.stride +
                    size_t(task.group) * group * dim,
                group * dim * sizeof(float));
  }
  if (task.partial >= 0) {
    run_super<Rows>(job, task, task.super_begin, next, s);
    float* const partial = job.partials + task.partial;
    std::memcpy(partial, s.maximum, rows * sizeof(float));
    std::memcpy(partial + rows, s.sum, rows * sizeof(float));
    std::memcpy(partial + 2 * rows, s.acc, rows * padded * sizeof(float));
    return;
  }
  start_total(s, rows, padded);
  for (int super = task.super_begin; super < task.super_end; ++super) {
    run_super<Rows>(job, task, super, next, s);
    merge(s, rows, padded, s.maximum, s.sum, s.acc);
  }
  finish(job, task, s);
}

/// `next` is the task that the calling thread takes then.
void RunTile(const AttentionJob& job, const TileTask& task, const TileTask& next) {
  if (job.spec->kv_bits != 0) return run_tile<RowsAffine>(job, task, next);
  switch (job.spec->kv_dtype) {
    case KvDtype::kF32: run_tile<RowsF32>(job, task, next); break;
    case KvDtype::kF16: run_tile<RowsF16>(job, task, next); break;
    default: run_tile<RowsBF16>(job, task, next); break;
  }
}

/// `task` spans all superblocks of the tile, whose partials are ready.
void MergeTile(const AttentionJob& job, const TileTask& task, const Partial* found) {
  const size_t padded = job.padded, rows = size_t(task.count) * job.group;
  const Scratch s(rows, *job.spec, padded);
  start_total(s, rows, padded);
  for (int super = task.super_begin; super < task.super_end; ++super) {
    const Partial& at = found[super - task.super_begin];
    merge(s, rows, padded, job.partials + at.maximum, job.partials + at.sum, job.partials + at.acc);
  }
  finish(job, task, s);
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#endif
