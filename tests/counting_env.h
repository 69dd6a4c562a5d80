#pragma once
/// An Env that does what the operating system does and counts what it was asked for.

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/env.h"

namespace torpor::testing {

class CountingEnv : public Env {
 public:
  std::atomic<int> opens = 0, stats = 0, maps = 0, syncs = 0, lists = 0, changes = 0;
  std::atomic<int64_t> bytes_read = 0, bytes_written = 0;
  bool can_map = true, in_memory = true, can_read = true, remote = false;
  std::optional<uint64_t> free_space;  ///< instead of the file system's
  std::vector<std::string> opened() const {
    const std::lock_guard lock(mutex_);
    return opened_;
  }
  /// How often a segment's file was opened.
  int opened_segments() const {
    const auto paths = opened();
    return int(std::count_if(paths.begin(), paths.end(), [](const auto& path) { return path.find("/segments/") != std::string::npos; }));
  }
  void reset() {
    opens = stats = maps = syncs = lists = changes = 0;
    bytes_read = bytes_written = 0;
    const std::lock_guard lock(mutex_);
    opened_.clear();
  }

  int raw_open(const char* path, OpenMode mode) override {
    ++opens;
    if (mode == OpenMode::kCreateNew) ++changes;
    {
      const std::lock_guard lock(mutex_);
      opened_.push_back(path);
    }
    return base_.raw_open(path, mode);
  }
  int raw_close(int fd) override { return base_.raw_close(fd); }
  int64_t raw_read(int fd, void* bytes, size_t size, uint64_t offset) override {
    const int64_t got = can_read ? base_.raw_read(fd, bytes, size, offset) : -EIO;
    if (got > 0) bytes_read += got;
    return got;
  }
  int64_t raw_write(int fd, const void* bytes, size_t size) override {
    const int64_t put = base_.raw_write(fd, bytes, size);
    if (put > 0) bytes_written += put;
    return put;
  }
  std::shared_ptr<const std::byte> raw_map(int fd, uint64_t size) override {
    ++maps;
    return can_map ? base_.raw_map(fd, size) : nullptr;
  }
  bool raw_is_remote(int) override { return remote; }
  bool raw_in_memory(std::span<const std::byte>) override { return in_memory; }
  int raw_sync(int fd) override { return ++syncs, base_.raw_sync(fd); }
  int raw_stat_fd(int fd, FileStat& out) override { return ++stats, base_.raw_stat_fd(fd, out); }
  int raw_stat(const char* path, FileStat& out) override { return ++stats, base_.raw_stat(path, out); }
  int raw_stat_link(const char* path, FileStat& out) override { return ++stats, base_.raw_stat_link(path, out); }
  int raw_rename(const char* from, const char* to) override { return ++changes, base_.raw_rename(from, to); }
  int raw_link(const char* from, const char* to) override { return ++changes, base_.raw_link(from, to); }
  int raw_rename_new(const char* from, const char* to) override { return ++changes, base_.raw_rename_new(from, to); }
  int raw_remove(const char* path) override { return ++changes, base_.raw_remove(path); }
  int raw_make_directory(const char* path) override { return base_.raw_make_directory(path); }
  int raw_sync_directory(const char* path) override { return ++syncs, base_.raw_sync_directory(path); }
  int raw_list(const char* path, std::vector<std::string>& names) override { return ++lists, base_.raw_list(path, names); }
  int raw_free_space(const char* path, uint64_t& bytes) override {
    if (!free_space) return base_.raw_free_space(path, bytes);
    bytes = *free_space;
    return 0;
  }
  int raw_lock(int fd, LockMode mode) override { return base_.raw_lock(fd, mode); }
  int raw_unlock(int fd) override { return base_.raw_unlock(fd); }

 private:
  Env& base_ = Env::posix();
  mutable std::mutex mutex_;
  std::vector<std::string> opened_;
};

}  // namespace torpor::testing
