#pragma once
/// An Env that fails on purpose: the k-th call or change to the disk refused, transfers cut short, calls interrupted, and
/// the power cut with whatever was not fsynced taken back.

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "base/env.h"

namespace torpor::testing {

/// Which of the unflushed changes a power cut takes back. A file system may keep any of them; these are the extremes.
enum class Lost {
  kNothing,         ///< kill -9
  kData,            ///< names as they were, files without the bytes that were not fsynced
  kAll,             ///< and every rename, creation and removal whose directory was not fsynced
  kSegmentNames,    ///< bytes, and the names in every directory but the store's root
  kRootNames,       ///< bytes, and the names in the store's root
};

/// What `fail_at` counts.
enum class Calls {
  kChanges,  ///< calls that alter the disk
  kAll,      ///< those that look at it too
};

class FaultEnv : public Env {
 public:
  /// Files that must survive a change to their name are kept (as links) in `attic`, on the same file system.
  FaultEnv(std::filesystem::path root, std::filesystem::path attic)
      : base_(Env::posix()), root_(std::move(root)), attic_(std::move(attic)) {
    std::filesystem::create_directories(attic_);
  }

  /// The k-th call from now (1 = the next one) fails with `error_number`; with `for_good` so does all that follows.
  void fail_at(int k, int error_number, bool for_good = false, Calls calls = Calls::kChanges) {
    const std::lock_guard lock(mutex_);
    countdown_ = k;
    error_number_ = error_number;
    for_good_ = for_good;
    counted_ = calls;
    dead_ = triggered_ = false;
  }
  bool triggered() const { return triggered_; }
  /// Reads and writes move a few bytes at a time, and every second call is interrupted.
  void stutter(bool on) { stutter_ = on; }

  /// As a file system without hard links.
  void no_links() { can_link_ = false; }

  /// What the disk holds after the power comes back. Only after everything that used this Env is gone.
  void lose(Lost what) {
    const std::lock_guard lock(mutex_);
    if (what == Lost::kNothing) return;
    for (const auto& path : dirty_) {
      std::error_code ignored;
      if (std::filesystem::exists(path, ignored)) std::filesystem::resize_file(path, 0, ignored);
    }
    for (auto change = journal_.rbegin(); change != journal_.rend(); ++change) {
      const bool in_root = change->directory == root_;
      if (what == Lost::kData || (what == Lost::kSegmentNames && in_root) || (what == Lost::kRootNames && !in_root)) continue;
      take_back(*change);
    }
  }

  int raw_open(const char* path, OpenMode mode) override {
    if (mode != OpenMode::kRead) {
      if (const int error = next_change()) return error;
    } else if (const int error = next_look()) {
      return error;
    }
    if (interrupted()) return -EINTR;
    const bool existed = std::filesystem::exists(path);
    const int fd = base_.raw_open(path, mode);
    const std::lock_guard lock(mutex_);
    if (fd >= 0) paths_[fd] = path;
    if (fd >= 0 && mode == OpenMode::kCreateNew && !existed) {
      dirty_.insert(path);
      journal_.push_back({Change::kCreated, std::filesystem::path(path).parent_path(), path, {}, {}});
    }
    return fd;
  }
  int raw_close(int fd) override {
    {
      const std::lock_guard lock(mutex_);
      paths_.erase(fd);
    }
    return base_.raw_close(fd);
  }
  int64_t raw_read(int fd, void* bytes, size_t size, uint64_t offset) override {
    if (const int error = next_look()) return error;
    if (interrupted()) return -EINTR;
    return base_.raw_read(fd, bytes, stutter_ ? std::min<size_t>(size, 97) : size, offset);
  }
  int64_t raw_write(int fd, const void* bytes, size_t size) override {
    if (interrupted()) return -EINTR;
    if (const int error = next_change()) {
      // A disk fills in the middle of a write.
      if (!dead_ && size > 1 && error != -EINTR) base_.raw_write(fd, bytes, size / 2);
      return error;
    }
    {
      const std::lock_guard lock(mutex_);
      dirty_.insert(paths_[fd]);
    }
    return base_.raw_write(fd, bytes, stutter_ ? std::min<size_t>(size, 89) : size);
  }
  std::shared_ptr<const std::byte> raw_map(int fd, uint64_t size) override {
    return next_look() != 0 ? nullptr : base_.raw_map(fd, size);
  }
  int raw_sync(int fd) override {
    if (const int error = next_change()) return error;
    const std::lock_guard lock(mutex_);
    dirty_.erase(paths_[fd]);
    return 0;
  }
  int raw_stat_fd(int fd, FileStat& out) override {
    if (const int error = next_look()) return error;
    return base_.raw_stat_fd(fd, out);
  }
  int raw_stat(const char* path, FileStat& out) override {
    if (const int error = next_look()) return error;
    return base_.raw_stat(path, out);
  }
  int raw_stat_link(const char* path, FileStat& out) override {
    if (const int error = next_look()) return error;
    return base_.raw_stat_link(path, out);
  }
  int raw_rename(const char* from, const char* to) override {
    if (const int error = next_change()) return error;
    const std::lock_guard lock(mutex_);
    journal_.push_back({Change::kRenamed, std::filesystem::path(to).parent_path(), to, from, keep(to)});
    const int result = base_.raw_rename(from, to);
    dirty_.erase(to);
    if (dirty_.erase(from) > 0) dirty_.insert(to);
    for (auto& [fd, path] : paths_) {
      if (path == from) path = to;
    }
    return result;
  }
  int raw_link(const char* from, const char* to) override {
    if (const int error = next_change()) return error;
    if (!can_link_) return -EPERM;
    const std::lock_guard lock(mutex_);
    const int result = base_.raw_link(from, to);
    if (result < 0) return result;
    journal_.push_back({Change::kCreated, std::filesystem::path(to).parent_path(), to, {}, {}});
    if (dirty_.contains(from)) dirty_.insert(to);
    return result;
  }
  int raw_rename_new(const char* from, const char* to) override {
    // Nobody else works on the files of one FaultEnv when this is asked for.
    return std::filesystem::exists(to) ? -EEXIST : raw_rename(from, to);
  }
  int raw_remove(const char* path) override {
    if (const int error = next_change()) return error;
    const std::lock_guard lock(mutex_);
    journal_.push_back({Change::kRemoved, std::filesystem::path(path).parent_path(), path, {}, keep(path)});
    return base_.raw_remove(path);
  }
  int raw_make_directory(const char* path) override {
    if (const int error = next_change()) return error;
    const int result = base_.raw_make_directory(path);
    const std::lock_guard lock(mutex_);
    if (result == 0) journal_.push_back({Change::kMadeDirectory, std::filesystem::path(path).parent_path(), path, {}, {}});
    return result;
  }
  int raw_sync_directory(const char* path) override {
    if (const int error = next_change()) return error;
    const std::lock_guard lock(mutex_);
    std::erase_if(journal_, [&](const Change& change) { return change.directory == path; });
    return 0;
  }
  int raw_list(const char* path, std::vector<std::string>& names) override {
    if (const int error = next_look()) return error;
    return base_.raw_list(path, names);
  }
  int raw_free_space(const char* path, uint64_t& bytes) override {
    if (const int error = next_look()) return error;
    return base_.raw_free_space(path, bytes);
  }
  int raw_lock(int fd, LockMode mode) override {
    if (const int error = next_look()) return error;
    return base_.raw_lock(fd, mode);
  }
  int raw_unlock(int fd) override { return base_.raw_unlock(fd); }

 private:
  struct Change {
    enum Kind { kCreated, kRenamed, kRemoved, kMadeDirectory } kind;
    std::filesystem::path directory, path, from, kept;
  };

  int next_look() { return next(Calls::kAll); }
  int next_change() { return next(Calls::kChanges); }
  int next(Calls kind) {
    const std::lock_guard lock(mutex_);
    if (dead_) return -error_number_;
    if (kind == Calls::kAll && counted_ == Calls::kChanges) return 0;
    if (countdown_ > 0 && --countdown_ == 0) {
      triggered_ = true;
      dead_ = for_good_;
      return -error_number_;
    }
    return 0;
  }
  bool interrupted() { return stutter_ && calls_++ % 2 == 0; }

  std::filesystem::path keep(const std::filesystem::path& path) {
    if (!std::filesystem::exists(path)) return {};
    auto kept = attic_ / std::to_string(kept_++);
    std::filesystem::remove(kept);  // of an earlier FaultEnv
    std::filesystem::create_hard_link(path, kept);
    return kept;
  }

  void take_back(const Change& change) {
    std::error_code ignored;
    switch (change.kind) {
      case Change::kCreated: std::filesystem::remove(change.path, ignored); break;
      case Change::kMadeDirectory: std::filesystem::remove_all(change.path, ignored); break;
      case Change::kRenamed: std::filesystem::rename(change.path, change.from, ignored); [[fallthrough]];
      case Change::kRemoved:
        if (!change.kept.empty()) std::filesystem::rename(change.kept, change.path, ignored);
        break;
    }
  }

  Env& base_;
  const std::filesystem::path root_, attic_;
  mutable std::mutex mutex_;
  int countdown_ = 0, error_number_ = EIO, kept_ = 0;
  bool for_good_ = false, can_link_ = true;
  Calls counted_ = Calls::kChanges;
  std::atomic<bool> dead_ = false, triggered_ = false, stutter_ = false;
  std::atomic<int> calls_ = 0;
  std::map<int, std::string> paths_;
  std::set<std::string> dirty_;  ///< files with bytes that were not fsynced
  std::vector<Change> journal_;  ///< names not fsynced, oldest first
};

}  // namespace torpor::testing
