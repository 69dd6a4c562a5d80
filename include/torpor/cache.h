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
///
/// Of a model with recurrent layers it has states, too. A state is never changed: a pass makes another one. The live
/// state is that after length() tokens. Earlier ones are held where keep_state or add_state says so, and the cache can
/// be cut to them alone.
class KvCache : public KvAccess {
 public:
  ~KvCache() override;
  /// An empty cache of the kind `backend` computes with.
  static std::unique_ptr<KvCache> create(const KvLayout& layout, const KvFormat& format, Backend backend,
                                         const StateLayout& state_layout = {});
  /// The cache a snapshot was taken of; its format is the identity's. kKernels: sealed runs are adopted without a copy,
  /// whatever memory they are in, and so are states. kInvalidArgument when the snapshot is inconsistent, kIncompatible
  /// when it has KvSnapshot::state: that is another engine's.
  static std::unique_ptr<KvCache> restore(const KvSnapshot& snapshot, Backend backend);

  /// An independent copy; sealed segments and states are shared, not copied.
  virtual std::unique_ptr<KvCache> clone() const = 0;
  /// Whether the cache could go on from its first `n_tokens` tokens: false when a window left rows behind that would be
  /// needed again, or when there is no state of that position.
  bool can_truncate(int n_tokens) const;
  /// Bytes of memory that `rows` more rows take: new buffers, a copy of an open one that clones share, the next state.
  size_t growth(int rows) const;
  /// Takes that memory. kResourceExhausted when there is none.
  void grow(int rows);
  /// Bytes that truncate(n_tokens) takes: a cut inside a sealed run copies the rows of it that stay.
  virtual size_t cut_cost(int n_tokens) const = 0;
  /// Rows that may be appended at the cost of one, and cut off again at none. They seal no run, and no window moves
  /// over one. 0 where rows are not kept in runs, or a state would have to be taken back.
  virtual int spare_rows() const { return 0; }
  /// Drops every token from `n_tokens` on. kInvalidArgument beyond length(), and where no state is held.
  void truncate(int n_tokens);

  /// The states held, ascending; the live one is the last. None without recurrent layers, or at length 0.
  std::span<const std::shared_ptr<const StateCheckpoint>> states() const noexcept { return states_; }
  /// The live state will be held when the cache goes on.
  void keep_state() { live_kept_ = true; }
  /// Whether it will.
  bool keeps_state() const noexcept { return live_kept_ && !states_.empty(); }
  /// No longer holds the state of `position`; the live one it does until the cache goes on.
  void drop_state(int64_t position);
  /// Lets go of the memory that the next pass would write its state to. That pass takes it again.
  void drop_spare();
  /// Holds a state of an earlier position, which came from elsewhere. If there is one already, that stays.
  /// kInvalidArgument when it is of another size, or of a position past length().
  void add_state(std::shared_ptr<const StateCheckpoint> state);
  /// The greatest m <= n_tokens whose state is held, or 0. Without recurrent layers it is n_tokens itself.
  int resumable(int n_tokens) const;
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
  /// Evaluated bytes of every row, with `identity`. Sealed segments and states are referenced, the tail is copied.
  /// Without `copy_tail` it is referenced too, where rows are kept in runs. The next append copies it, if the snapshot
  /// lives.
  virtual KvSnapshot snapshot(const Identity& identity, bool copy_tail = true) const = 0;
  CacheValidation validate() const;

  /// The ids whose rows are held, one per row once record_tokens has been told of every forward.
  const std::vector<int32_t>& tokens() const noexcept { return tokens_; }
  /// Says which tokens the rows just computed belong to.
  void record_tokens(std::span<const int32_t> ids) { tokens_.insert(tokens_.end(), ids.begin(), ids.end()); }
  const KvFormat& format() const noexcept override { return format_; }
  const KvLayout& layout() const noexcept override { return layout_; }
  int length() const override { return length_; }
  void advance(int n) override;
  const StateLayout& state_layout() const noexcept override { return state_layout_; }
  std::span<const std::byte> state() const override;
  std::span<std::byte> next_state() override;

 protected:
  KvCache(KvLayout layout, const KvFormat& format, StateLayout state_layout, std::vector<int32_t> tokens = {},
          std::vector<std::shared_ptr<const StateCheckpoint>> states = {});
  /// can_truncate, growth and grow as far as rows are concerned. `rows` and `n_tokens` are in range.
  virtual bool can_keep_rows(int n_tokens) const = 0;
  virtual size_t row_growth(int rows) const = 0;
  virtual void grow_rows(int rows) = 0;
  /// Frees rows from `n_tokens` (at most length()) on.
  virtual void drop_rows(int n_tokens) = 0;
  /// Whether the buffers hold what layout and length say.
  virtual CacheValidation validate_buffers() const = 0;

  virtual size_t n_buffers() const = 0;
  virtual HeldBuffer buffer(size_t i) const = 0;
  /// To be called after buffers [first, end) have changed, or how many there are.
  void recount(size_t first = 0, size_t end = SIZE_MAX);
  /// `copy` has this cache's length and states, and is counted where this cache is.
  void share_with(KvCache& copy) const;

  KvLayout layout_;
  KvFormat format_;
  std::vector<int32_t> tokens_;
  int length_ = 0;  // rows held

 private:
  void take_spare();
  /// Lets go of states past `n_tokens`, where one is held, before length_ changes.
  void cut_states(int n_tokens);
  std::vector<const void*> state_buffers() const;
  void recount_states();

  const StateLayout state_layout_;
  std::vector<std::shared_ptr<const StateCheckpoint>> states_;  // the last one is live, unless length_ is 0
  bool live_kept_ = false;
  std::shared_ptr<std::byte> live_buffer_;  // the live state's, if a pass of ours wrote it
  std::shared_ptr<std::byte> spare_;        // what the next pass writes
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
