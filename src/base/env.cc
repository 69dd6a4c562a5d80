#include "base/env.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <system_error>
#include <random>
#include <thread>
#include <utility>

#include <sys/random.h>
#include <unistd.h>

#include "torpor/error.h"

namespace torpor {
namespace {

template <typename Call>
auto retry_interrupted(Call call) {
  auto result = call();
  while (result == -EINTR) result = call();
  return result;
}

const char* advice_for(int error_number) {
  switch (error_number) {
    case ENOSPC:
    case EDQUOT: return "the disk is full; free some space and try again";
    case EROFS: return "the file system is read-only; choose a store on one that can be written";
    case EACCES:
    case EPERM: return "check who owns it and its permissions";
    case EMFILE:
    case ENFILE: return "too many files are open; raise the limit (ulimit -n)";
    case EIO: return "the disk reports an error; check it before trying again";
    case ELOOP: return "a symbolic link is in the way there; remove it";
    case ENAMETOOLONG: return "choose a shorter path";
    case ENXIO:
    case ENOTDIR:
    case EISDIR: return "something else is in the way there; move it aside";
    default: return "check the disk and try again";
  }
}

}  // namespace

void throw_io_error(std::string_view what, const std::filesystem::path& path, int error_number) {
  throw Error(ErrorCode::kIo, "Could not " + std::string(what) + " '" + path.string() +
                                  "' (" + std::generic_category().message(error_number) + "): " +
                                  advice_for(error_number) + ".")
      .with_path(path.string())
      .with_field("errno", "", std::to_string(error_number));
}

// ---- File

File::File(File&& other) noexcept : env_(other.env_), fd_(other.fd_), path_(std::move(other.path_)) { other.fd_ = -1; }

File& File::operator=(File&& other) noexcept {
  release();
  env_ = other.env_;
  fd_ = std::exchange(other.fd_, -1);
  path_ = std::move(other.path_);
  return *this;
}

File::~File() { release(); }

void File::release() noexcept {
  if (fd_ >= 0) env_->raw_close(std::exchange(fd_, -1));
}

void File::close() {
  // The descriptor is gone even when close is interrupted, so there is no retry.
  const int result = env_->raw_close(std::exchange(fd_, -1));
  if (result < 0 && result != -EINTR) throw_io_error("finish writing", path_, -result);
}

FileStat File::stat() const {
  FileStat stat;
  const int result = retry_interrupted([&] { return env_->raw_stat_fd(fd_, stat); });
  if (result < 0) throw_io_error("inspect", path_, -result);
  return stat;
}

namespace {

/// What is left of `pieces` when `n` bytes of them are done.
template <typename Piece>
std::span<Piece> after(std::span<Piece> pieces, int64_t n) {
  for (; n > 0 && size_t(n) >= pieces.front().size(); pieces = pieces.subspan(1)) n -= int64_t(pieces.front().size());
  if (n > 0) pieces.front() = pieces.front().subspan(size_t(n));
  return pieces;
}

}  // namespace

void File::read_pieces_at(std::vector<std::span<std::byte>> pieces, uint64_t offset) const {
  std::erase_if(pieces, [](const auto& piece) { return piece.empty(); });
  for (std::span<std::span<std::byte>> rest = pieces; !rest.empty();) {
    const int64_t got = retry_interrupted([&] { return env_->raw_read_pieces(fd_, rest, offset); });
    if (got < 0) throw_io_error("read", path_, int(-got));
    if (got == 0) {
      size_t missing = 0;
      for (const auto& piece : rest) missing += piece.size();
      throw Error(ErrorCode::kCorruption, "'" + path_.string() + "' ends at byte " + std::to_string(offset) + ", " +
                                              std::to_string(missing) +
                                              " bytes early: it was cut short; restore it from a copy.");
    }
    rest = after(rest, got);
    offset += uint64_t(got);
  }
}

std::shared_ptr<const std::byte> File::map(uint64_t size, MapFrom from) const {
  if (from == MapFrom::kLocal && env_->raw_is_remote(fd_)) return nullptr;
  return env_->raw_map(fd_, size);
}

void File::write_all(std::vector<std::span<const std::byte>> pieces) {
  std::erase_if(pieces, [](const auto& piece) { return piece.empty(); });
  for (std::span<std::span<const std::byte>> rest = pieces; !rest.empty();) {
    const int64_t put = retry_interrupted([&] { return env_->raw_write_pieces(fd_, rest); });
    if (put < 0) throw_io_error("write", path_, int(-put));
    // POSIX lets a write accept nothing without saying why only for zero bytes; taken as a full disk, not retried forever.
    if (put == 0) throw_io_error("write", path_, ENOSPC);
    rest = after(rest, put);
  }
}

void File::expect_size(uint64_t size) noexcept { env_->raw_preallocate(fd_, size); }

void File::sync() const {
  const int result = retry_interrupted([&] { return env_->raw_sync(fd_); });
  if (result < 0) throw_io_error("flush to disk", path_, -result);
}

// ---- FileLock

FileLock::FileLock(Env& env, File file) : env_(&env), file_(std::move(file)), process_(::getpid()) {}

FileLock& FileLock::operator=(FileLock&& other) noexcept {
  release();
  env_ = other.env_;
  file_ = std::move(other.file_);
  process_ = other.process_;
  return *this;
}

bool FileLock::is_held() const noexcept { return file_.fd() >= 0 && process_ == ::getpid(); }

void FileLock::release() noexcept {
  // Closing is not enough: a lock lasts until each forked copy of its descriptor is closed.
  if (is_held()) env_->raw_unlock(file_.fd());
}

// ---- Env

File Env::open(const std::filesystem::path& path, OpenMode mode) {
  const int fd = retry_interrupted([&] { return raw_open(path.c_str(), mode); });
  if (fd == -ENOENT && mode == OpenMode::kRead) {
    throw Error(ErrorCode::kNotFound, "There is no file '" + path.string() + "'.");
  }
  if (fd < 0) throw_io_error(mode == OpenMode::kRead ? "open" : "create", path, -fd);
  return File(*this, fd, path);
}

std::optional<FileStat> Env::stat(const std::filesystem::path& path) {
  FileStat stat;
  const int result = retry_interrupted([&] { return raw_stat(path.c_str(), stat); });
  if (result == -ENOENT || result == -ENOTDIR) return std::nullopt;
  if (result < 0) throw_io_error("inspect", path, -result);
  return stat;
}

std::optional<FileStat> Env::stat_link(const std::filesystem::path& path) {
  FileStat stat;
  const int result = retry_interrupted([&] { return raw_stat_link(path.c_str(), stat); });
  if (result == -ENOENT || result == -ENOTDIR) return std::nullopt;
  if (result < 0) throw_io_error("inspect", path, -result);
  return stat;
}

void Env::rename(const std::filesystem::path& from, const std::filesystem::path& to) {
  const int result = retry_interrupted([&] { return raw_rename(from.c_str(), to.c_str()); });
  if (result < 0) throw_io_error("put in place", to, -result);
}

bool Env::put_new(const std::filesystem::path& from, const std::filesystem::path& to) {
  int result = raw_link(from.c_str(), to.c_str());
  if (result == -EEXIST || result == -EINTR) {
    // A link that was interrupted, or whose answer a network lost, may have been made all the same.
    const auto source = stat(from), target = stat(to);
    if (source && target && source->is_same_file(*target)) {
      result = 0;
    } else if (target) {
      return false;
    } else {
      result = retry_interrupted([&] { return raw_link(from.c_str(), to.c_str()); });
      if (result == -EEXIST) return false;
    }
  }
  if (result >= 0) {
    remove(from);
    return true;
  }
  if (result == -EPERM || result == -ENOTSUP || result == -EOPNOTSUPP || result == -ENOSYS || result == -EMLINK) {
    // A file system without links.
    result = retry_interrupted([&] { return raw_rename_new(from.c_str(), to.c_str()); });
    if (result == -EEXIST) return false;
  }
  if (result < 0) throw_io_error("put in place", to, -result);
  return true;
}

bool Env::link(const std::filesystem::path& from, const std::filesystem::path& to) {
  const int result = retry_interrupted([&] { return raw_link(from.c_str(), to.c_str()); });
  if (result >= 0) return true;
  if (result == -EPERM || result == -ENOTSUP || result == -EOPNOTSUPP || result == -ENOSYS || result == -EMLINK)
    return false;
  throw_io_error("link", from, -result);
}

bool Env::remove(const std::filesystem::path& path) {
  const int result = retry_interrupted([&] { return raw_remove(path.c_str()); });
  if (result == -ENOENT) return false;
  if (result < 0) throw_io_error("remove", path, -result);
  return true;
}

bool Env::make_directory(const std::filesystem::path& path) {
  const int result = retry_interrupted([&] { return raw_make_directory(path.c_str()); });
  if (result == -EEXIST) {
    const auto there = stat_link(path);
    if (there && !there->is_directory) throw_io_error("create the directory", path, there->is_link ? ELOOP : ENOTDIR);
    return false;
  }
  if (result < 0) throw_io_error("create the directory", path, -result);
  return true;
}

void Env::sync_directory(const std::filesystem::path& path) {
  const int result = retry_interrupted([&] { return raw_sync_directory(path.c_str()); });
  if (result < 0) throw_io_error("flush to disk", path, -result);
}

std::vector<std::string> Env::list(const std::filesystem::path& path) {
  std::vector<std::string> names;
  const int result = retry_interrupted([&] {
    names.clear();
    return raw_list(path.c_str(), names);
  });
  if (result == -ENOENT) return {};
  if (result < 0) throw_io_error("list", path, -result);
  std::sort(names.begin(), names.end());
  return names;
}

uint64_t Env::free_space(const std::filesystem::path& path) {
  uint64_t bytes = 0;
  const int result = retry_interrupted([&] { return raw_free_space(path.c_str(), bytes); });
  if (result < 0) throw_io_error("ask for the free space of", path, -result);
  return bytes;
}

std::string Env::read_file(const std::filesystem::path& path, uint64_t max_bytes) {
  const File file = open(path, OpenMode::kRead);
  const uint64_t size = file.stat().size;
  if (size > max_bytes) {
    throw Error(ErrorCode::kResourceExhausted, "'" + path.string() + "' has " + std::to_string(size) +
                                                   " bytes, more than the " + std::to_string(max_bytes) +
                                                   " that are read at once.");
  }
  std::string text(size_t(size), '\0');
  file.read_at(std::as_writable_bytes(std::span(text.data(), text.size())), 0);
  return text;
}

std::optional<FileLock> Env::lock(const std::filesystem::path& path, LockMode mode, std::chrono::milliseconds timeout,
                                  OpenMode open_mode) {
  constexpr int kMaxGhosts = 1000;
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  std::chrono::microseconds pause(200);
  for (int ghosts = 0;;) {
    File file = open(path, open_mode);
    const int result = retry_interrupted([&] { return raw_lock(file.fd(), mode); });
    if (result >= 0) {
      FileLock lock(*this, std::move(file));
      // Whoever held it before may have removed the file: then this lock guards nothing, and we begin again.
      const auto on_disk = stat(path);
      if (on_disk && on_disk->inode == lock.file().stat().inode) return lock;
      if (++ghosts == kMaxGhosts) {
        throw Error(ErrorCode::kIo, "The lock '" + path.string() +
                                        "' can't be had: its file system gives an open file another "
                                        "inode number than its name; choose a store on another file system.");
      }
      if (ghosts > 10) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      continue;
    }
    if (result == -ENOLCK || result == -ENOSYS || result == -ENOTSUP || result == -EOPNOTSUPP) {
      throw Error(ErrorCode::kIo, "The file system of '" + path.string() + "' keeps no locks (" +
                                      std::generic_category().message(-result) +
                                      "), so a store there can be read, but not written "
                                      "to; choose one on a local disk.");
    }
    if (result != -EWOULDBLOCK && result != -EAGAIN) throw_io_error("lock", path, -result);
    if (std::chrono::steady_clock::now() >= deadline) return std::nullopt;
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, std::chrono::microseconds(5000));
  }
}

std::string Env::random_id() {
  char digits[33];
  std::snprintf(digits, sizeof digits, "%016" PRIx64 "%016" PRIx64, random_bits(), random_bits());
  return digits;
}

uint64_t random_bits() {
  // std::random_device asks the CPU, and under a hypervisor that takes a hundred times as long.
  uint64_t bits = 0;
  if (::getentropy(&bits, sizeof bits) == 0) return bits;
  std::random_device random;
  return (uint64_t(random()) << 32) | random();
}

std::chrono::system_clock::time_point Env::now() { return std::chrono::system_clock::now(); }

}  // namespace torpor
