#pragma once
/// The cache the CPU kernels work on: a list of buffers of kSegmentTokens tokens each, all of one layout, written in
/// place. A full one becomes a SealedRun: it is what a segment file holds, and may be shared by any number of caches and
/// snapshots. Only the last one may be open; one that clones share is copied by whoever writes first.

#include <memory>
#include <vector>

#include "torpor/cache.h"

namespace torpor {

class SegmentedKvCache : public KvCache {
 public:
  SegmentedKvCache(KvLayout layout, const KvFormat& format, StateLayout state_layout, std::vector<int32_t> tokens = {},
                   std::vector<std::shared_ptr<const StateCheckpoint>> states = {})
      : KvCache(std::move(layout), format, std::move(state_layout), std::move(tokens), std::move(states)) {}
  static std::unique_ptr<SegmentedKvCache> restore(const KvSnapshot& snapshot, const KvFormat& format);

  std::span<const KvBuffer> reserve(int n) override;
  std::pair<mx::array, mx::array> update_and_fetch(int layer, const mx::array& k, const mx::array& v) override;

  size_t cut_cost(int n_tokens) const override;
  int spare_rows() const override;
  std::unique_ptr<KvCache> clone() const override;
  std::span<const std::shared_ptr<const SealedRun>> sealed_runs() const override { return sealed_; }
  void replace_run(int i, std::shared_ptr<const SealedRun> run) override;
  void advance(int n) override;
  KvSnapshot snapshot(const Identity& identity, bool copy_tail = true) const override;

 private:
  bool can_keep_rows(int n_tokens) const override;
  size_t row_growth(int rows) const override;
  void grow_rows(int rows) override;
  void drop_rows(int n_tokens) override;
  size_t n_buffers() const override { return runs_.size(); }
  HeldBuffer buffer(size_t i) const override;
  /// Whether a clone holds the open run too.
  bool open_shared() const;
  CacheValidation validate_buffers() const override;
  /// Of a sealed run that no window kept apart sees it may be layout_.together_bytes() instead.
  size_t run_bytes() const { return layout_.offset(layout_.tensors.size(), kSegmentTokens); }
  KvBuffer new_run() const;
  static KvBuffer buffer_of(const std::shared_ptr<const SealedRun>& run);
  /// Bytes of run `i` that can still be attended when `length` tokens are held.
  size_t attended_bytes(size_t i, int length) const;
  /// Copies the first `n` rows of every tensor between a run of `from_tokens` and one of `to_tokens` capacity. `size`:
  /// the bytes of the former, which may lack tensors that are kept apart.
  void copy_rows(const std::byte* from, size_t size, int from_tokens, std::byte* to, int to_tokens, int n) const;

  /// Gives the open run a buffer of our own, of which the first `open` rows are copied from run `i`.
  void own_run(int i, int open);

  std::vector<KvBuffer> runs_;  // of run_bytes() each; may reach past length_ (reserved)
  std::vector<std::shared_ptr<const SealedRun>> sealed_;  // the first length_ / kSegmentTokens of runs_
};

}  // namespace torpor
