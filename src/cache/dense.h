#pragma once
/// The cache MLX's own attention works on: one array `[1, H_kv, S, D]` per tensor of the layout. It grows in steps of
/// kSegmentTokens, and is updated in place by donation, as mlx-lm's KVCache does. It is cut into runs when a snapshot
/// is taken and put together when one is restored. Rows that a window has left behind are let go once a segment file
/// has them.

#include <memory>
#include <vector>

#include "torpor/cache.h"

namespace torpor {

class DenseKvCache : public KvCache {
 public:
  DenseKvCache(KvLayout layout, const KvFormat& format, StateLayout state_layout, std::vector<int32_t> tokens = {},
               std::vector<std::shared_ptr<const StateCheckpoint>> states = {})
      : KvCache(std::move(layout), format, std::move(state_layout), std::move(tokens), std::move(states)) {}
  static std::unique_ptr<DenseKvCache> restore(const KvSnapshot& snapshot, const KvFormat& format);

  std::span<const KvBuffer> reserve(int n) override;
  std::pair<mx::array, mx::array> update_and_fetch(int layer, const mx::array& k, const mx::array& v) override;
  void abandon() override;

  size_t cut_cost(int) const override { return 0; }  // rows past the length are overwritten
  std::unique_ptr<KvCache> clone() const override;
  void replace_run(int i, std::shared_ptr<const SealedRun> run) override;
  KvSnapshot snapshot(const Identity& identity, bool copy_tail = true) const override;

 private:
  bool can_keep_rows(int n_tokens) const override;
  size_t row_growth(int rows) const override;
  void grow_rows(int rows) override;
  void drop_rows(int n_tokens) override;
  size_t n_buffers() const override { return tensors_.size(); }
  HeldBuffer buffer(size_t i) const override;
  /// Empty tensors, where there are none yet.
  void make_tensors();
  void add_tensor(mx::array tensor, int first);
  /// Rows that tensor `t` must be able to hold when there are `rows` more: whole segments.
  int capacity_for(size_t t, int rows) const;
  void grow_tensor(size_t t, int rows);
  CacheValidation validate_buffers() const override;
  /// Appends to the tensor, and if it is quantized to those of its scales and biases; gives back the rows held.
  mx::array append(size_t tensor, const mx::array& rows);
  mx::array append_part(size_t tensor, const mx::array& rows);
  /// The first row that tensor `t` must hold itself: those before it are in `sealed_` and behind its window.
  int first_needed(size_t t) const;

  std::vector<mx::array> tensors_;  // one per layout tensor, [1, H_kv, capacity, D]; empty before the first row
  std::vector<std::shared_ptr<const char>> storage_;  // one per tensor, shared with the clones that share its array
  std::vector<int> first_;          // per tensor the position of its first row, a multiple of kSegmentTokens
  std::vector<std::shared_ptr<const SealedRun>> sealed_;  // runs that are mapped or read in part; else nullptr: the arrays have all
};

}  // namespace torpor
