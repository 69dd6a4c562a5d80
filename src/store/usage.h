#pragma once
/// What a store has written to the disk.

#include <atomic>
#include <filesystem>
#include <mutex>

#include "base/env.h"

namespace torpor {

/// The counter of bytes that all processes have written since the store was made (docs/format.md, "The counter").
/// Thread-safe.
class WrittenBytes {
 public:
  WrittenBytes(Env& env, std::filesystem::path path) : env_(env), path_(std::move(path)) {}
  ~WrittenBytes() { record(); }

  /// A file that was put into the store.
  void add(const FileStat& stat) { unrecorded_ += int64_t(stat.size); }
  /// Adds what this process has written since the last call. When that can't be done now, the next call makes up for
  /// it.
  void record() noexcept;
  /// What is recorded.
  int64_t total() const;

 private:
  Env& env_;
  const std::filesystem::path path_;
  std::mutex mutex_;
  std::atomic<int64_t> unrecorded_ = 0;
};

}  // namespace torpor
