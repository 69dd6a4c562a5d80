#pragma once
/// What this process knows of segments: the state of their files, and the runs in memory that hold their rows. So what
/// it has saved, loaded or checked need not be read again. Thread-safe.

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>

#include "base/env.h"
#include "base/mutex.h"
#include "torpor/kv_snapshot.h"

namespace torpor {

/// Files that this process has seen flushed to the disk, name included. Thread-safe.
class DurableFiles {
 public:
  void add(const std::string& name, const FileStat& stat);
  bool contains(const std::string& name, const FileStat& stat) const;

 private:
  mutable Mutex mutex_;
  std::unordered_map<std::string, FileStat> files_ TORPOR_GUARDED_BY(mutex_);
};

class KnownSegments {
 public:
  struct File {
    FileStat stat;        ///< when it was looked at; another one now = look again
    std::string content;  ///< content_digest of its header
    std::string last;     ///< its last tensor's checksum
    bool whole = false;   ///< every row was checked, or written by us
  };

  void add_file(const std::string& name, const File& file);
  std::optional<File> file(const std::string& name) const;
  /// The segment is damaged: its file is to be looked at again, and nobody new shares the rows in memory.
  void forget(const std::string& name);

  /// The rows of its SealedRun::segment, for others to share as long as someone holds the run.
  void add_run(const std::shared_ptr<const SealedRun>& run);
  /// The rows of segment `name`, if someone holds them; else nullptr.
  std::shared_ptr<const SealedRun> run(const std::string& name) const;
  /// Names of such runs. Those that nobody holds any more are removed when the number has doubled.
  size_t n_runs() const;

 private:
  mutable Mutex mutex_;
  std::unordered_map<std::string, File> files_ TORPOR_GUARDED_BY(mutex_);
  std::unordered_map<std::string, std::weak_ptr<const SealedRun>> runs_ TORPOR_GUARDED_BY(mutex_);
  /// Entries of `runs_` at which those that nobody holds any more are removed.
  size_t next_sweep_ TORPOR_GUARDED_BY(mutex_) = 1024;
};

}  // namespace torpor
