#pragma once
/// What every operation holds while it adds files to the store.

#include <string>
#include <vector>

#include "store/store_impl.h"

namespace torpor {

/// Keeps what an operation is about to name from being removed, and the room that it was given. Its end is when the counter of
/// bytes is written. Steps: look at what is there; `make_room`; `claim`, and when that fails begin again; write; commit.
class Writing {
 public:
  explicit Writing(Store::Impl& store) : store_(store), limits_(disk_limits(store)) {}
  ~Writing() { store_.written.record(); }

  /// With limits: gives the operation room for `needed` bytes more. Evicts for it segments and states that no agent names
  /// and `keep` does not have, oldest leaf first; then the reclaimer is asked. kResourceExhausted beginning with `what`
  /// when that is not enough. kBusy.
  void make_room(const std::string& what, int64_t needed, const std::vector<std::string>& keep);

  /// True: segments and states that were found are as they were, and until this object is gone nobody removes a file of
  /// `names`.
  bool claim(const std::vector<std::string>& names, const std::vector<StoredFile>& segments,
             const std::vector<StoredFile>& states = {});

 private:
  bool limited() const { return limits_.budget > 0 || limits_.min_free > 0; }
  /// Bytes by which the tighter limit would be broken, and how to say so. Without `reserved` nobody else has been given room.
  std::pair<int64_t, std::string> excess(int64_t needed, bool reserved);
  /// make_room without the reclaimer: an error has evicted nothing.
  void take_room(const std::string& what, int64_t needed, const std::vector<std::string>& keep);
  void evict(const std::string& what, int64_t needed, const std::vector<std::string>& keep);

  Store::Impl& store_;
  const DiskLimits limits_;
  std::optional<FileLock> saving_;
  std::optional<Reservation> reservation_;
};

}  // namespace torpor
