#pragma once
/// KV caches as values: taken out of a generation, inspected, saved, given back, copied, cut.
///
/// A KvCache belongs to the engine thread (it holds MLX arrays); the snapshot it gives is plain bytes that any thread
/// may read.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "torpor/kv_snapshot.h"
#include "torpor/model.h"

namespace torpor {

class KvLedger;

/// What validate_cache_structure found. Converts to true when the cache is sound.
struct CacheValidation {
  bool ok = true;
  std::string reason;  ///< one sentence; empty when ok
  explicit operator bool() const noexcept { return ok; }
};

/// The KV cache of one conversation, all layers, with the tokens it belongs to.
///
/// It takes memory when rows are appended, unless `grow` took it before. Whoever keeps several caches in bounded memory
/// calls `growth` for all of them, makes room, and then `grow`: computing the rows then takes none.
class KvCache : public KvAccess {
 public:
  ~KvCache() override;
  /// An empty cache of the kind `backend` computes with.
  static std::unique_ptr<KvCache> create(const KvLayout& layout, const KvFormat& format, Backend backend);
  /// The cache a snapshot was taken of; its format is the identity's. kKernels: sealed runs are adopted without a copy,
  /// whatever memory they are in. kInvalidArgument when the snapshot is inconsistent, kIncompatible when it has state:
  /// all that is cached here is rows.
  static std::unique_ptr<KvCache> restore(const KvSnapshot& snapshot, Backend backend);

  /// An independent copy; sealed segments are shared, not copied.
  virtual std::unique_ptr<KvCache> clone() const = 0;
  /// Whether the cache could go on from its first `n_tokens` tokens: false when a window left rows behind that would be
  /// needed again.
  virtual bool can_truncate(int n_tokens) const { return n_tokens <= length_; }
  /// Bytes of memory that `rows` more rows take: new buffers, and a copy of an open one that clones share.
  virtual size_t growth(int rows) const = 0;
  /// Takes that memory. kResourceExhausted when there is none.
  virtual void grow(int rows) = 0;
  /// Bytes that truncate(n_tokens) takes: a cut inside a sealed run copies the rows of it that stay.
  virtual size_t cut_cost(int n_tokens) const = 0;
  /// Rows that may be appended at the cost of one, and cut off again at none. They seal no run, and no window moves
  /// over one. 0 where rows are not kept in runs.
  virtual int spare_rows() const { return 0; }
  /// Drops every token from `n_tokens` on. kInvalidArgument beyond length().
  void truncate(int n_tokens);
  /// Bytes of the buffers held, shared ones included; of a mapped run only what a window can still see.
  size_t nbytes() const;
  /// The same one by one, so that who counts several caches can count a shared one once.
  struct HeldBuffer {
    const void* data;
    size_t bytes;
    bool mapped;  ///< pages of a segment file, not MLX's memory
  };
  std::vector<HeldBuffer> buffers() const;
  /// From now on its buffers, and those of its clones, are counted there, each once.
  void count_in(std::shared_ptr<KvLedger> ledger);
  /// The sealed runs whose bytes are attended where they are; none where rows are copied into arrays (kMlx).
  virtual std::span<const std::shared_ptr<const SealedRun>> sealed_runs() const { return {}; }
  /// Run `i` (sealed) from now on is `run`, the same rows mapped from their segment file. Memory then need not hold
  /// rows that windows have left behind.
  virtual void replace_run(int i, std::shared_ptr<const SealedRun> run) = 0;
  /// Evaluated bytes of every row, with `identity`. Sealed segments are referenced, the tail is copied. Without
  /// `copy_tail` it is referenced too, where rows are kept in runs. The next append copies it, if the snapshot lives.
  virtual KvSnapshot snapshot(const Identity& identity, bool copy_tail = true) const = 0;
  CacheValidation validate() const;

  /// The ids whose rows are held, one per row once record_tokens has been told of every forward.
  const std::vector<int32_t>& tokens() const noexcept { return tokens_; }
  /// Says which tokens the rows just computed belong to.
  void record_tokens(std::span<const int32_t> ids) { tokens_.insert(tokens_.end(), ids.begin(), ids.end()); }
  const KvFormat& format() const noexcept override { return format_; }
  const KvLayout& layout() const noexcept override { return layout_; }
  int length() const override { return length_; }
  void advance(int n) override { length_ += n; }

 protected:
  explicit KvCache(KvLayout layout, const KvFormat& format, std::vector<int32_t> tokens = {});
  /// Frees rows from `n_tokens` (at most length()) on.
  virtual void drop_rows(int n_tokens) = 0;
  /// Whether the buffers hold what layout and length say.
  virtual CacheValidation validate_buffers() const = 0;

  virtual size_t n_buffers() const = 0;
  virtual HeldBuffer buffer(size_t i) const = 0;
  /// To be called after buffers [first, end) have changed, or how many there are.
  void recount(size_t first = 0, size_t end = SIZE_MAX);
  /// `copy` is counted where this cache is.
  void count_like(KvCache& copy) const { copy.count_in(ledger_); }

  KvLayout layout_;
  KvFormat format_;
  std::vector<int32_t> tokens_;
  int length_ = 0;  // rows held

 private:
  std::shared_ptr<KvLedger> ledger_;
  struct Shares;
  std::unique_ptr<Shares> shares_;
};

/// Tokens held.
int get_cache_size(const KvCache& cache);
/// Bytes of the real buffers.
size_t get_cache_memory(const KvCache& cache);
/// False with a reason when layer count, shapes, dtype or lengths disagree with each other or with `expected`.
CacheValidation validate_cache_structure(const KvCache& cache, const KvLayout* expected = nullptr);

/// A BufferAllocator over MLX's allocator: what it holds is counted by MLX's own memory accounting. Any thread.
std::shared_ptr<std::byte> mlx_buffer(size_t size);

}  // namespace torpor
