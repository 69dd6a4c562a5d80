#pragma once
/// What every operation holds while it adds files to the store.

#include <string>
#include <vector>

#include "store/store_impl.h"

namespace torpor {

/// The store's lock: shared, so that `gc` waits; exclusive where there are limits to keep, so that nobody takes the room
/// that was made. Its end is when the counter of bytes is written.
class Writing {
 public:
  explicit Writing(Store::Impl& store)
      : store_(store),
        limits_(store.disk_limits()),
        lock_(store.lock_store(limited() ? LockMode::kExclusive : LockMode::kShared)) {}
  ~Writing() { store_.record_written(); }

  /// Evicts segments that no agent names and `keep` does not have, oldest leaf first, until `needed` bytes more break no
  /// limit. kResourceExhausted beginning with `what` when that is not enough, and then nothing was evicted.
  void make_room(const std::string& what, int64_t needed, const std::vector<std::string>& keep);

 private:
  bool limited() const { return limits_.budget > 0 || limits_.min_free > 0; }
  /// Bytes by which the tighter limit would be broken, and how to say so.
  std::pair<int64_t, std::string> excess(int64_t needed);

  Store::Impl& store_;
  const DiskLimits limits_;
  const FileLock lock_;
};

}  // namespace torpor
