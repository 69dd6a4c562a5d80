#pragma once
/// What this process knows of segments, so that what it has saved, loaded or checked need not be read again: the state of
/// their files, and where in memory their rows are. Thread-safe.

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "base/env.h"
#include "store/torpor_file.h"
#include "torpor/kv_snapshot.h"

namespace torpor {

class KnownSegments {
 public:
  struct File {
    FileStat stat;        ///< when it was looked at; another one now = look again
    std::string content;  ///< content_digest of its header
    std::string last;     ///< its last tensor's checksum
    bool whole = false;   ///< every row was checked, or written by us
  };

  /// Rows of segment `name` in memory. A memory keeps what it was filled with, whatever becomes of the file.
  struct Rows {
    std::string name, variant, content;
    KvRun run;
    TensorMask checked;  ///< those whose bytes are there and were checked
  };

  void add_file(const std::string& name, const File& file);
  std::optional<File> file(const std::string& name) const;

  void add_rows(const Rows& rows);
  /// What the run's memory is known to hold.
  std::optional<Rows> rows_in(const KvRun& run) const;
  /// Rows of the segment that someone still holds.
  std::optional<Rows> rows_of(const std::string& name) const;

  /// The file and its name have been flushed to the disk.
  void set_durable(const std::string& name, const FileStat& stat);
  bool is_durable(const std::string& name, const FileStat& stat) const;

 private:
  struct HeldRows {
    Rows rows;  ///< its `run.owner` is empty
    std::weak_ptr<const void> owner;
  };
  std::optional<Rows> lock(const HeldRows& held) const;
  void forget_expired();

  mutable std::mutex mutex_;
  std::unordered_map<std::string, File> files_;
  std::unordered_map<std::string, FileStat> durable_;
  std::unordered_map<const std::byte*, HeldRows> rows_;
  std::unordered_map<std::string, const std::byte*> rows_of_;
  size_t next_sweep_ = 1024;
};

}  // namespace torpor
