#pragma once
/// How files leave the store that nobody needs, beside saves that may come to need them (docs/format.md, "Removing").

#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/env.h"
#include "store/store_locks.h"

namespace torpor {

/// A file that may go, as it was when it was looked at.
struct Removable {
  std::filesystem::path path;
  FileStat stat;
  std::string segment;  ///< by which name a save claims it: a segment's, or part_claim; empty: nobody does
};

/// One at a time in a store. What is looked at while it lasts stays true until it removes. A save that began earlier
/// has ended by then; one that begins meanwhile claims what it needs.
class Sweep {
 public:
  /// nullopt when another one, or the saves under way, take longer than `timeout`.
  static std::optional<Sweep> begin(Env& env, StoreLocks& locks, std::function<std::vector<std::filesystem::path>()> temporary_files,
                                    std::chrono::milliseconds timeout);
  Sweep(Sweep&& other) noexcept;
  ~Sweep();

  /// Temporary files that nobody will put in place any more.
  const std::vector<std::filesystem::path>& temporary_files() const { return temporary_files_; }

  /// Unlinks the files in order, but for those that a save has claimed or that changed, until `bytes` are freed. The
  /// store's lock is held for at most 64 unlinks at a time. kBusy when it can't be had.
  struct Removed {
    int64_t files = 0, bytes = 0;
  };
  Removed remove(const std::vector<Removable>& files, int64_t bytes = INT64_MAX);

 private:
  Sweep(Env& env, StoreLocks& locks, FileLock lock) : env_(&env), locks_(&locks), lock_(std::move(lock)) {}
  void read_claims();
  /// Whether no symbolic link has taken the place of a directory on the way to the file.
  bool is_own(const std::filesystem::path& path) const;

  Env* env_;
  StoreLocks* locks_;
  std::optional<FileLock> lock_;
  std::vector<std::filesystem::path> temporary_files_;
  std::unordered_set<std::string> claims_;
  uint64_t claims_read_ = 0;  ///< bytes
};

}  // namespace torpor
