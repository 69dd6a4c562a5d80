// A layer's attention: what a call does, in this order, and where. M rows, H query heads, H_kv kv heads of D dims.
//
//   Attention (MLX)       primitives.cc: qkv [M, (H + 2 H_kv) D] and the runs of the cache, as pointers
//   attention_on          attention.cc: checks the spec, makes tables of angles, cuts the batch into tasks for the pool
//   1. PrepareRows        attention-inl.h: norm, rotation in place; keys and values go to the cache [H_kv, 256, D]
//        rotate_row         attention_hadamard-inl.h: the Hadamard rotation, where the spec asks for it
//        Rows::store        attention_rows-inl.h: rows of f32, f16 or bf16
//        append_affine      attention_affine-inl.h: rows of 8 or 4 bits, with scales and biases
//        prepare_latents    attention_latent-inl.h: in place of all these, where heads share latents
//   2. RunTile            attention-inl.h: rows [rows, D] of one kv head; run_super makes the partial of kSuper keys
//        transpose_keys, widen    attention_rows-inl.h: a block of keys as [D][kBlock], of values as [kBlock][D]
//        dequantize_block         attention_affine-inl.h: the same of rows of 8 or 4 bits
//        add_key_bias             attention_hadamard-inl.h: keys are turned back, and get their bias
//        load_latents             attention_latent-inl.h: a block of latents, as keys and as values
//        attend_block             attention-inl.h: for a block, kMaxRows rows at a time:
//          product, weigh         attention_math-inl.h: scores [rows][kBlock], their softmax, outputs [rows][D]
//          score_affine, output_affine    attention_affine-inl.h: products of few rows, without a dequantized block
//   3. MergeTile          attention-inl.h: adds a tile's partials in order of position, if they were tasks of their own
//        finish             divides by the sum of weights and turns rotated values back: out [M, H D]
//
// Files named -inl.h are compiled once per target. attention-inl.h says why no result depends on the batch.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include <hwy/aligned_allocator.h>
#include <hwy/highway.h>

#include "kernels/cpu_target.h"
#include "torpor/error.h"

#ifndef TORPOR_KERNELS_ATTENTION_COMMON_
#define TORPOR_KERNELS_ATTENTION_COMMON_
namespace torpor::kernels {
namespace {

constexpr int kBlock = 64;      // keys per softmax step
constexpr int kSuper = 512;     // keys per partial
constexpr int kMaxRows = 6;     // rows per product
static_assert(kSegmentTokens % kBlock == 0 && kSuper % kBlock == 0);

/// A token that attends: its row of the input and of the output, and its position.
struct Query {
  int row, position;
};

struct AttentionJob {
  float* qkv;
  float* out;
  const AttentionSpec* spec;
  std::span<const AttentionSequence> sequences;
  const Query* queries;
  float* partials;
  const float* rope;   // [tokens][2][dims / 2]: cosines, sines
  // For a key bias, which every block of keys needs: of each block's first position, and of each position in a block.
  const float* block_angles;   // [blocks][2][dims / 2]: cosines, sines
  const float* angles_within;  // [dims / 2][2][kBlock]: cosines, sines
  size_t groups;       // a tile is of one of them: kv heads; of latents, any share of the query heads
  size_t group;        // query heads in one
  size_t stride;       // floats of a row of qkv
  size_t value_dim;    // of a head of the output
  size_t padded;       // that rounded up to 16
  float q_scale;       // scores come out in log2 units, or divided by the soft cap
  float cap;           // soft cap in log2 units
};

/// Tokens [first, last) of a sequence; `rope_row` is the rope row of `first`.
struct PrepareTask {
  int sequence, first, last;
  size_t rope_row;
};

/// AttentionJob::queries [first, first + count), of one group of heads, over superblocks [super_begin, super_end) of
/// the runs of `sequence`, which all of the queries hold.
struct TileTask {
  int sequence, group, first, count, super_begin, super_end;
  ptrdiff_t partial;  // in AttentionJob::partials: maximum [rows], sum [rows], acc [rows][padded]; -1: write out
};

/// Where a tile finds a superblock's partial of its first row, in AttentionJob::partials.
struct Partial {
  ptrdiff_t maximum = -1, sum = -1, acc = -1;
};

/// The first key that the query at `position` sees.
inline int first_key(const AttentionSpec& spec, int position) {
  return spec.window > 0 ? std::max(0, position - spec.window + 1) : 0;
}

/// The calling thread's scratch memory, aligned, of at least `n` floats.
float* attention_scratch(size_t n) {
  thread_local hwy::AlignedFreeUniquePtr<float[]> memory;
  thread_local size_t size = 0;
  if (n > size) {
    memory.reset();
    size = 0;
    memory = hwy::AllocateAligned<float>(n);
    if (memory == nullptr) throw Error(ErrorCode::kResourceExhausted, "Out of memory for attention.");
    size = n;
  }
  return memory.get();
}

}  // namespace
}  // namespace torpor::kernels
#endif

#include "kernels/attention-inl.h"

#if HWY_ONCE
namespace torpor::kernels {

HWY_EXPORT(PrepareRows);
HWY_EXPORT(RunTile);
HWY_EXPORT(MergeTile);

namespace {

/// Cosines and sines of all tokens of a batch. The layers of a model ask for the same ones in turn, so the last few are
/// kept.
class RopeTables {
 public:
  const float* get(ThreadPool& pool, const RopeSpec& rope, std::span<const AttentionSequence> sequences) {
    std::vector<std::pair<int, int>> spans;  // position, n
    size_t tokens = 0;
    for (const AttentionSequence& sequence : sequences) {
      if (sequence.n <= 0) continue;
      spans.emplace_back(sequence.position, sequence.n);
      tokens += size_t(sequence.n);
    }
    for (Entry& entry : entries_) {
      if (entry.spans == spans && entry.inv_freq == rope.inv_freq && entry.magnitude == rope.magnitude) return entry.table.data();
    }
    Entry& entry = entries_[next_];
    next_ = (next_ + 1) % std::size(entries_);
    entry.spans.clear();
    const size_t half = rope.inv_freq.size();
    entry.table.resize(tokens * 2 * half);
    std::vector<int> positions;
    positions.reserve(tokens);
    for (const auto& [position, n] : spans) {
      for (int t = 0; t < n; ++t) positions.push_back(position + t);
    }
    const auto fill = [&](size_t first, size_t last) {
      for (size_t t = first; t < last; ++t) {
        float* row = entry.table.data() + t * 2 * half;
        for (size_t i = 0; i < half; ++i) {
          const double angle = double(positions[t]) * double(rope.inv_freq[i]);
          row[i] = float(rope.magnitude * std::cos(angle));
          row[half + i] = float(rope.magnitude * std::sin(angle));
        }
      }
    };
    constexpr size_t kChunk = 32;
    if (tokens <= kChunk) {
      fill(0, tokens);
    } else {
      pool.parallel_for((tokens + kChunk - 1) / kChunk,
                        [&](size_t task, int) { fill(task * kChunk, std::min(tokens, (task + 1) * kChunk)); });
    }
    entry.inv_freq = rope.inv_freq;
    entry.magnitude = rope.magnitude;
    entry.spans = std::move(spans);
    return entry.table.data();
  }

 private:
  struct Entry {
    std::vector<float> inv_freq;
    float magnitude = 1;
    std::vector<std::pair<int, int>> spans;
    std::vector<float> table;
  };
  Entry entries_[2];
  size_t next_ = 0;
};

/// AttentionJob::block_angles and angles_within of the last few ropes, for as many blocks as were ever asked for.
class BlockAngles {
 public:
  void get(const RopeSpec& rope, size_t n_blocks, AttentionJob& job) {
    const auto found = std::find_if(std::begin(entries_), std::end(entries_), [&](const Entry& entry) {
      return entry.inv_freq == rope.inv_freq && entry.magnitude == rope.magnitude && !entry.within.empty();
    });
    Entry& entry = found != std::end(entries_) ? *found : entries_[next_];
    const size_t half = rope.inv_freq.size();
    if (found == std::end(entries_)) {
      next_ = (next_ + 1) % std::size(entries_);
      entry = {.inv_freq = rope.inv_freq, .magnitude = rope.magnitude, .within = {}, .blocks = {}};
      entry.within.resize(2 * half * kBlock + 1);
      for (size_t i = 0; i < half; ++i) {
        for (size_t j = 0; j < kBlock; ++j) {
          const double angle = double(j) * double(rope.inv_freq[i]);
          entry.within[2 * i * kBlock + j] = float(std::cos(angle));
          entry.within[(2 * i + 1) * kBlock + j] = float(std::sin(angle));
        }
      }
    }
    for (size_t block = half == 0 ? n_blocks : entry.blocks.size() / (2 * half); block < n_blocks; ++block) {
      entry.blocks.resize((block + 1) * 2 * half);
      float* row = entry.blocks.data() + block * 2 * half;
      for (size_t i = 0; i < half; ++i) {
        const double angle = double(block * kBlock) * double(rope.inv_freq[i]);
        row[i] = float(rope.magnitude * std::cos(angle));
        row[half + i] = float(rope.magnitude * std::sin(angle));
      }
    }
    job.block_angles = entry.blocks.data();
    job.angles_within = entry.within.data();
  }

 private:
  struct Entry {
    std::vector<float> inv_freq;
    float magnitude = 1;
    std::vector<float> within, blocks;
  };
  Entry entries_[2];
  size_t next_ = 0;
};

void check(const AttentionSpec& spec, std::span<const AttentionSequence> sequences) {
  const auto require = [](bool condition, const char* what) {
    if (!condition) throw Error(ErrorCode::kInvalidArgument, std::string("attention: ") + what);
  };
  require(spec.n_kv_heads > 0 && spec.n_heads > 0 && spec.n_heads % spec.n_kv_heads == 0,
          "the query heads must be a multiple of the kv heads");
  require(spec.head_dim > 0, "head_dim must be positive");
  require(spec.rope.dims >= 0 && spec.rope.dims <= spec.head_dim && spec.rope.dims % 2 == 0 &&
              spec.rope.inv_freq.size() == size_t(spec.rope.dims / 2),
          "inv_freq must hold half of the rotated dims");
  require(spec.kv_dtype != KvDtype::kU32, "the dtype of KV, or of its scales and biases, must be f32, f16 or bf16");
  const auto known = [](int bits) { return bits == 8 || bits == 4; };
  require(spec.kv_bits == 0 || (known(spec.kv_bits.keys) && known(spec.kv_bits.values)),
          "quantized KV has 8 or 4 bits");
  require(spec.kv_bits != 0 || (spec.key_bias == nullptr && !spec.rotate_keys && !spec.rotate_values),
          "only quantized KV is rotated, or lacks a bias");
  require(spec.key_bias == nullptr || spec.k_norm == nullptr, "keys that are normalised have no bias");
  if (spec.latent > 0) {
    require(spec.n_kv_heads == 1 && spec.latent < spec.head_dim && spec.rope.dims == spec.head_dim - spec.latent,
            "beside one row of latents there are dims that rotate, and no others");
    require(spec.latent % 16 == 0 && 2 * spec.latent >= spec.head_dim,
            "latents have a multiple of 16 dims, and at least as many as rotate");
    require(spec.q_norm == nullptr && spec.k_norm == nullptr && spec.key_bias == nullptr,
            "latents have no norms or biases");
    require(spec.kv_bits == 0 || spec.kv_group <= 0 || spec.latent % spec.kv_group == 0,
            "the group of quantized KV must divide the latents' dims");
  }
  if (spec.kv_bits != 0) {
    require(spec.kv_group == 32 || spec.kv_group == 64 || spec.kv_group == 128, "quantized KV has groups of 32, 64 or 128");
    if (spec.head_dim % spec.kv_group != 0) {
      throw Error(ErrorCode::kInvalidArgument, "attention: a head of " + std::to_string(spec.head_dim) +
                                                   " dims can't be quantized in groups of " +
                                                   std::to_string(spec.kv_group));
    }
  }
  for (const AttentionSequence& sequence : sequences) {
    require(sequence.row >= 0 && sequence.n >= 0 && sequence.position >= 0, "negative row, count or position");
    require(sequence.n == 0 || sequence.runs.size() * size_t(kSegmentTokens) >= size_t(sequence.position) + size_t(sequence.n),
            "the runs don't cover the sequence");
    if (spec.kv_bits == 0) continue;
    for (const KvRunView& run : sequence.runs) {
      require(run.keys == nullptr || (run.key_scales != nullptr && run.key_biases != nullptr &&
                                      run.value_scales != nullptr && run.value_biases != nullptr),
              "a run of quantized KV lacks its scales or biases");
    }
  }
}

/// All heads read one row of latents, so any share of them may be a tile's: few enough for a core's cache.
int heads_at_once(int n_heads) {
  int share = 16;
  while (n_heads % share != 0) --share;
  return share;
}

/// A superblock whose keys several sequences hold in the same runs, as agents of one prompt do.
struct SharedSuper {
  int super;
  std::vector<int> sequences;  // of together at most a tile's queries
};

/// Among sequences of one tile each, superblocks that all their queries are past. Rows of a tile don't depend on each
/// other, so a superblock is attended once for all who share it, and their bits stay what they are alone.
std::vector<SharedSuper> find_shared(const AttentionSpec& spec, std::span<const AttentionSequence> sequences,
                                     int tile) {
  constexpr size_t kRuns = kSuper / kSegmentTokens;
  std::vector<SharedSuper> shared;
  std::vector<int> few;
  int supers = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i].n <= 0 || sequences[i].n > tile) continue;
    few.push_back(int(i));
    supers = std::max(supers, sequences[i].position / kSuper);
  }
  if (few.size() < 2) return shared;
  const auto attends = [&](const AttentionSequence& s, int super) {
    return super >= first_key(spec, s.position) / kSuper && (super + 1) * kSuper <= s.position;
  };
  const auto same = [&](const AttentionSequence& a, const AttentionSequence& b, int super) {
    const auto runs = [&](const AttentionSequence& s) { return s.runs.subspan(size_t(super) * kRuns, kRuns); };
    return std::ranges::equal(runs(a), runs(b), {}, &KvRunView::keys, &KvRunView::keys);
  };
  std::vector<char> taken;
  for (int super = 0; super < supers; ++super) {
    taken.assign(few.size(), 0);
    for (size_t i = 0; i < few.size(); ++i) {
      const AttentionSequence& first = sequences[size_t(few[i])];
      if (taken[i] != 0 || !attends(first, super)) continue;
      SharedSuper group{super, {few[i]}};
      int queries = first.n;
      for (size_t j = i + 1; j < few.size(); ++j) {
        const AttentionSequence& other = sequences[size_t(few[j])];
        if (taken[j] != 0 || !attends(other, super) || !same(first, other, super) || queries + other.n > tile) continue;
        taken[j] = 1;
        queries += other.n;
        group.sequences.push_back(few[j]);
      }
      if (group.sequences.size() > 1) shared.push_back(std::move(group));
    }
  }
  return shared;
}

}  // namespace

void attention_on(ThreadPool& pool, float* qkv, const AttentionSpec& spec, std::span<const AttentionSequence> sequences,
                  float* out) {
  ensure_cpu_target();
  check(spec, sequences);
  thread_local RopeTables rope_tables;
  thread_local BlockAngles block_angles;
  thread_local std::vector<float> partials;

  AttentionJob job{};
  job.qkv = qkv;
  job.out = out;
  job.spec = &spec;
  job.sequences = sequences;
  job.rope = rope_tables.get(pool, spec.rope, sequences);
  if (spec.key_bias != nullptr) {
    int longest = 0;
    for (const AttentionSequence& sequence : sequences) longest = std::max(longest, sequence.position + sequence.n);
    block_angles.get(spec.rope, size_t(longest + kBlock - 1) / kBlock, job);
  }
  job.group = size_t(spec.latent > 0 ? heads_at_once(spec.n_heads) : spec.n_heads / spec.n_kv_heads);
  job.groups = size_t(spec.n_heads) / job.group;
  job.stride = size_t(spec.n_heads + (spec.latent > 0 ? 1 : 2 * spec.n_kv_heads)) * size_t(spec.head_dim);
  job.value_dim = size_t(spec.latent > 0 ? spec.latent : spec.head_dim);
  job.padded = (job.value_dim + 15) / 16 * 16;
  constexpr double kLog2E = 1.4426950408889634;
  job.cap = float(double(spec.softcap) * kLog2E);
  job.q_scale = float(spec.softcap > 0 ? double(spec.scale) / double(spec.softcap) : double(spec.scale) * kLog2E);

  // 1. Norm, rotate, append. A tile reads rows that other tasks append, so this is a phase of its own.
  constexpr int kPrepareTokens = 16;
  std::vector<PrepareTask> prepare;
  size_t tokens = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    for (int t = 0; t < sequences[i].n; t += kPrepareTokens) {
      prepare.push_back({int(i), t, std::min(sequences[i].n, t + kPrepareTokens), tokens + size_t(t)});
    }
    tokens += size_t(sequences[i].n);
  }
  if (tokens == 0) return;
  const auto prepare_rows = HWY_DYNAMIC_DISPATCH(PrepareRows);
  if (tokens <= 4) {
    for (const PrepareTask& task : prepare) prepare_rows(job, task);
  } else {
    pool.parallel_for(prepare.size(), [&](size_t task, int) { prepare_rows(job, prepare[task]); });
  }

  // 2. Tiles, those with the most keys first. Where there are too few of them, superblocks become tasks too; and those
  // that several sequences share.
  constexpr size_t kTileFloats = 12 * 1024;
  const int tile = int(std::clamp<size_t>(kTileFloats / (size_t(spec.head_dim) * job.group), 4, 64));
  std::vector<Query> queries;
  std::vector<TileTask> tiles;
  for (size_t i = 0; i < sequences.size(); ++i) {
    for (int first = 0; first < sequences[i].n; first += tile) {
      const int count = std::min(tile, sequences[i].n - first);
      const int position = sequences[i].position + first;
      for (int group = 0; group < int(job.groups); ++group) {
        tiles.push_back({int(i), group, int(queries.size()), count, first_key(spec, position) / kSuper,
                         (position + count - 1) / kSuper + 1, -1});
      }
      for (int t = 0; t < count; ++t) queries.push_back({sequences[i].row + first + t, position + t});
    }
  }
  const std::vector<SharedSuper> shared = find_shared(spec, sequences, tile);
  const auto cost = [](const TileTask& t) { return int64_t(t.count) * (t.super_end - t.super_begin); };
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&](const TileTask& a, const TileTask& b) { return cost(a) > cost(b); });
  const auto run_tile = HWY_DYNAMIC_DISPATCH(RunTile);
  if (shared.empty() && (pool.size() == 1 || tiles.size() >= 4 * size_t(pool.size()))) {
    job.queries = queries.data();
    // Tiles of few rows wait for memory, so each fetches the next one's keys and values.
    const bool few = size_t(tiles[0].count) * job.group <= 2 * kMaxRows;
    if (tiles.size() == 1) {
      run_tile(job, tiles[0], tiles[0]);
    } else if (few) {
      pool.parallel_ends(int(tiles.size()),
                         [&](int task, int next) { run_tile(job, tiles[size_t(task)], tiles[size_t(next)]); });
    } else {
      pool.parallel_for(tiles.size(), [&](size_t task, int) { run_tile(job, tiles[task], tiles[task]); });
    }
    return;
  }

  // Each tile's partials lie in order of its superblocks.
  std::vector<size_t> first_partial;
  size_t n_partials = 0;
  std::vector<size_t> tile_of(sequences.size() * job.groups);  // of those that have one
  for (size_t i = 0; i < tiles.size(); ++i) {
    const TileTask& t = tiles[i];
    first_partial.push_back(n_partials);
    n_partials += size_t(t.super_end - t.super_begin);
    tile_of[size_t(t.sequence) * job.groups + size_t(t.group)] = i;
  }
  std::vector<Partial> found(n_partials);
  std::vector<TileTask> tasks;
  size_t floats = 0;
  const auto add_task = [&](TileTask task) {
    task.partial = ptrdiff_t(floats);
    floats += size_t(task.count) * job.group * (job.padded + 2);
    tasks.push_back(task);
  };
  const auto partial_at = [&](const TileTask& task, int query) {
    const size_t rows = size_t(task.count) * job.group, row = size_t(query) * job.group, at = size_t(task.partial);
    return Partial{ptrdiff_t(at + row), ptrdiff_t(at + rows + row), ptrdiff_t(at + 2 * rows + row * job.padded)};
  };
  for (const SharedSuper& s : shared) {
    const int first = int(queries.size());
    for (const int i : s.sequences) {
      for (int t = 0; t < sequences[size_t(i)].n; ++t) {
        queries.push_back({sequences[size_t(i)].row + t, sequences[size_t(i)].position + t});
      }
    }
    for (int group = 0; group < int(job.groups); ++group) {
      add_task({s.sequences[0], group, first, int(queries.size()) - first, s.super, s.super + 1, -1});
      int query = 0;
      for (const int i : s.sequences) {
        const size_t of = tile_of[size_t(i) * job.groups + size_t(group)];
        found[first_partial[of] + size_t(s.super - tiles[of].super_begin)] = partial_at(tasks.back(), query);
        query += sequences[size_t(i)].n;
      }
    }
  }
  std::vector<size_t> to_merge;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const TileTask& t = tiles[i];
    if (t.super_end - t.super_begin == 1 && found[first_partial[i]].acc < 0) {
      tasks.push_back(t);
      continue;
    }
    to_merge.push_back(i);
    for (int super = t.super_begin; super < t.super_end; ++super) {
      Partial& partial = found[first_partial[i] + size_t(super - t.super_begin)];
      if (partial.acc >= 0) continue;
      add_task({t.sequence, t.group, t.first, t.count, super, super + 1, -1});
      partial = partial_at(tasks.back(), 0);
    }
  }
  if (partials.size() < floats) partials.resize(floats);
  job.queries = queries.data();
  job.partials = partials.data();
  pool.parallel_ends(int(tasks.size()), [&](int task, int next) { run_tile(job, tasks[size_t(task)], tasks[size_t(next)]); });
  const auto merge_tile = HWY_DYNAMIC_DISPATCH(MergeTile);
  const auto merge = [&](size_t i) { merge_tile(job, tiles[to_merge[i]], found.data() + first_partial[to_merge[i]]); };
  if (to_merge.size() <= 4) {
    for (size_t i = 0; i < to_merge.size(); ++i) merge(i);
  } else {
    pool.parallel_for(to_merge.size(), [&](size_t i, int) { merge(i); });
  }
}

void attention(float* qkv, const AttentionSpec& spec, std::span<const AttentionSequence> sequences, float* out) {
  attention_on(ThreadPool::shared(), qkv, spec, sequences, out);
}

}  // namespace torpor::kernels
#endif  // HWY_ONCE
