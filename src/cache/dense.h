#pragma once
/// The cache MLX's own attention works on: per layer one keys and one values array `[1, H_kv, S, D]`, grown in steps of
/// kSegmentTokens and updated in place by donation, as mlx-lm's KVCache does. It is cut into runs when a snapshot is
/// taken and put together when one is restored.

#include <memory>
#include <vector>

#include "torpor/cache.h"

namespace torpor {

class DenseKvCache : public KvCache {
 public:
  explicit DenseKvCache(KvLayout layout, std::vector<int32_t> tokens = {})
      : KvCache(std::move(layout), std::move(tokens)) {}
  static std::unique_ptr<DenseKvCache> restore(const KvSnapshot& snapshot);

  std::span<const KvBuffer> reserve(int n) override;
  std::pair<mx::array, mx::array> update_and_fetch(int layer, const mx::array& k, const mx::array& v) override;

  std::unique_ptr<KvCache> clone() const override;
  std::vector<HeldBuffer> buffers() const override;
  KvSnapshot snapshot(const Identity& identity) const override;

 private:
  void drop_rows(int n_tokens) override;
  CacheValidation validate_buffers() const override;
  mx::array append(size_t tensor, const mx::array& rows);

  std::vector<mx::array> tensors_;  // one per layout tensor, [1, H_kv, capacity, D]; empty before the first row
};

}  // namespace torpor
