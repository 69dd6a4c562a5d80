#include "base/env.h"

#include <algorithm>
#include <atomic>
#include <array>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <system_error>
#include <random>
#include <thread>
#include <utility>

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#ifdef __linux__
#include <sys/statfs.h>
#include <sys/syscall.h>
#else
#include <sys/mount.h>
#endif
#include <sys/uio.h>
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
  if (result == -EPERM || result == -ENOTSUP || result == -EOPNOTSUPP || result == -ENOSYS || result == -EMLINK) return false;
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
        throw Error(ErrorCode::kIo, "The lock '" + path.string() + "' can't be had: its file system gives an open file another "
                                    "inode number than its name; choose a store on another file system.");
      }
      if (ghosts > 10) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      continue;
    }
    if (result == -ENOLCK || result == -ENOSYS || result == -ENOTSUP || result == -EOPNOTSUPP) {
      throw Error(ErrorCode::kIo, "The file system of '" + path.string() + "' keeps no locks (" +
                                      std::generic_category().message(-result) + "), so a store there can be read, but not written "
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

// ---- The operating system

namespace {

int or_errno(int result) { return result < 0 ? -errno : result; }

FileStat convert(const struct stat& from) {
#ifdef __APPLE__
  const timespec& time = from.st_mtimespec;
#else
  const timespec& time = from.st_mtim;
#endif
  return {.size = uint64_t(from.st_size),
          .mtime_ns = int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec,
          .inode = uint64_t(from.st_ino),
          .is_directory = S_ISDIR(from.st_mode),
          .is_file = S_ISREG(from.st_mode),
          .is_link = S_ISLNK(from.st_mode),
          .device = uint64_t(from.st_dev),
          .owner = uint32_t(from.st_uid),
          .permissions = uint32_t(from.st_mode & 07777)};
}

/// Opens nothing but regular files. A pipe is not waited for: nobody may ever write to it.
int open_regular(const char* path, int flags) {
  const int fd = ::open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0600);
  if (fd < 0) return -errno;
  struct stat stat;
  int error_number = ::fstat(fd, &stat) < 0 ? errno : 0;
  if (error_number == 0 && !S_ISREG(stat.st_mode)) error_number = S_ISDIR(stat.st_mode) ? EISDIR : ENXIO;
  if (error_number == 0) return fd;
  ::close(fd);
  return -error_number;
}

int sync_descriptor(int fd) {
#ifdef F_FULLFSYNC
  // On macOS fsync leaves the bytes in the drive's cache. Not every file system knows the stronger call.
  if (::fcntl(fd, F_FULLFSYNC) == 0) return 0;
#endif
  return or_errno(::fsync(fd));
}

class PosixEnv final : public Env {
 public:
  int raw_open(const char* path, OpenMode mode) override {
    switch (mode) {
      case OpenMode::kRead: return open_regular(path, O_RDONLY);
      case OpenMode::kCreateNew: return or_errno(::open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
      case OpenMode::kLockFile: return open_regular(path, O_RDWR | O_CREAT | O_NOFOLLOW);
      case OpenMode::kAppendLocked: return open_regular(path, O_RDWR | O_CREAT | O_APPEND | O_NOFOLLOW);
    }
    return -EINVAL;
  }
  int raw_close(int fd) override { return or_errno(::close(fd)); }
  int64_t raw_read(int fd, void* bytes, size_t size, uint64_t offset) override {
    const ssize_t got = ::pread(fd, bytes, std::min(size, kMaxTransfer), off_t(offset));
    return got < 0 ? -errno : got;
  }
  int64_t raw_write(int fd, const void* bytes, size_t size) override {
    const ssize_t put = ::write(fd, bytes, std::min(size, kMaxTransfer));
    return put < 0 ? -errno : put;
  }
  int64_t raw_read_pieces(int fd, std::span<const std::span<std::byte>> pieces, uint64_t offset) override {
    const Vectors vectors(pieces);
    if (vectors.count == 0) return raw_read(fd, pieces.front().data(), pieces.front().size(), offset);
    const ssize_t got = ::preadv(fd, vectors.array.data(), vectors.count, off_t(offset));
    return got < 0 ? -errno : got;
  }
  int64_t raw_write_pieces(int fd, std::span<const std::span<const std::byte>> pieces) override {
    const Vectors vectors(pieces);
    if (vectors.count == 0) return raw_write(fd, pieces.front().data(), pieces.front().size());
    const ssize_t put = ::writev(fd, vectors.array.data(), vectors.count);
    return put < 0 ? -errno : put;
  }
  std::shared_ptr<const std::byte> raw_map(int fd, uint64_t size) override {
    if (size == 0) return nullptr;
    if (++mappings_ > kMaxMappings) {
      --mappings_;
      return nullptr;
    }
    int flags = MAP_SHARED;
#ifdef MAP_POPULATE
    // All pages of a small file at once cost less than a fault for every few of them.
    if (size < (uint64_t(1) << 20)) flags |= MAP_POPULATE;
#endif
    void* memory = ::mmap(nullptr, size_t(size), PROT_READ, flags, fd, 0);
    if (memory == MAP_FAILED) {
      --mappings_;
      return nullptr;
    }
    return {static_cast<const std::byte*>(memory), [size](const std::byte* p) {
              ::munmap(const_cast<std::byte*>(p), size_t(size));
              --mappings_;
            }};
  }
  bool raw_is_remote(int fd) override {
    struct statfs stat;
    if (::fstatfs(fd, &stat) < 0) return false;
#ifdef __linux__
    return std::find(std::begin(kRemote), std::end(kRemote), uint32_t(stat.f_type)) != std::end(kRemote);
#else
    return (stat.f_flags & MNT_LOCAL) == 0;
#endif
  }
  bool raw_in_memory(std::span<const std::byte> bytes) override {
    const auto page = uintptr_t(::sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(bytes.data()) / page * page;
    const size_t size = reinterpret_cast<uintptr_t>(bytes.data()) + bytes.size() - begin;
#ifdef __APPLE__
    std::vector<char> pages((size + page - 1) / page);
#else
    std::vector<unsigned char> pages((size + page - 1) / page);
#endif
    if (::mincore(reinterpret_cast<void*>(begin), size, pages.data()) < 0) return true;
    return std::all_of(pages.begin(), pages.end(), [](auto state) { return (state & 1) != 0; });
  }
  void raw_preallocate([[maybe_unused]] int fd, [[maybe_unused]] uint64_t size) noexcept override {
#ifdef __linux__
    [[maybe_unused]] const int ignored = ::fallocate(fd, 0, 0, off_t(size));
#endif
  }
  int raw_sync(int fd) override { return sync_descriptor(fd); }
  int raw_stat_fd(int fd, FileStat& out) override {
    struct stat stat;
    if (::fstat(fd, &stat) < 0) return -errno;
    out = convert(stat);
    return 0;
  }
  int raw_stat(const char* path, FileStat& out) override {
    struct stat stat;
    if (::stat(path, &stat) < 0) return -errno;
    out = convert(stat);
    return 0;
  }
  int raw_stat_link(const char* path, FileStat& out) override {
    struct stat stat;
    if (::lstat(path, &stat) < 0) return -errno;
    out = convert(stat);
    return 0;
  }
  int raw_rename(const char* from, const char* to) override { return or_errno(::rename(from, to)); }
  int raw_link(const char* from, const char* to) override { return or_errno(::link(from, to)); }
  int raw_rename_new(const char* from, const char* to) override {
#if defined(__APPLE__)
    return or_errno(::renamex_np(from, to, RENAME_EXCL));
#elif defined(SYS_renameat2)
    constexpr unsigned kNoReplace = 1;  // RENAME_NOREPLACE, which older C libraries do not name
    return or_errno(int(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, kNoReplace)));
#else
    return -ENOSYS;
#endif
  }
  int raw_remove(const char* path) override { return or_errno(::unlink(path)); }
  int raw_make_directory(const char* path) override { return or_errno(::mkdir(path, 0700)); }
  int raw_sync_directory(const char* path) override {
    const int fd = ::open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return -errno;
    int result = sync_descriptor(fd);
    // Some network file systems do not sync directories; there the rename is as durable as it gets.
    if (result == -EINVAL || result == -ENOTSUP) result = 0;
    ::close(fd);
    return result;
  }
  int raw_list(const char* path, std::vector<std::string>& names) override {
    DIR* directory = ::opendir(path);
    if (directory == nullptr) return -errno;
    errno = 0;
    while (const dirent* entry = ::readdir(directory)) {
      const std::string_view name = entry->d_name;
      if (name != "." && name != "..") names.emplace_back(name);
      errno = 0;
    }
    const int error_number = errno;
    ::closedir(directory);
    return -error_number;
  }
  int raw_free_space(const char* path, uint64_t& bytes) override {
    struct statvfs stat;
    if (::statvfs(path, &stat) < 0) return -errno;
    bytes = uint64_t(stat.f_bavail) * stat.f_frsize;
    return 0;
  }
  int raw_lock(int fd, LockMode mode) override {
    return or_errno(::flock(fd, (mode == LockMode::kShared ? LOCK_SH : LOCK_EX) | LOCK_NB));
  }
  int raw_unlock(int fd) override { return or_errno(::flock(fd, LOCK_UN)); }

 private:
  static inline std::atomic<int> mappings_ = 0;  // static: a mapping may outlive the Env that made it

#ifdef __linux__
  /// statfs(2)'s names for them.
  static constexpr uint32_t kRemote[] = {
      0x00006969,  // NFS
      0x0000517B, 0xFE534D42, 0xFF534D42,  // SMB, SMB2, CIFS
      0x65735546,  // FUSE
      0x01021997,  // 9p
      0x5346414F, 0x6B414653,  // AFS, in the kernel's and OpenAFS's way
      0x00C36400,  // Ceph
      0x73757245,  // Coda
      0x0000564C,  // NCP
      0x0BD00BD0,  // Lustre
      0x47504653,  // GPFS
      0x19830326,  // BeeGFS
      0x20030528,  // OrangeFS
      0x786F4256, 0xBACBACBC,  // folders of a VirtualBox or VMware host
  };
#endif

  // macOS refuses transfers of 2 GiB and more; Linux shortens them.
  static constexpr size_t kMaxTransfer = size_t(1) << 30;
  static constexpr size_t kMaxPieces = 1024;  // IOV_MAX of both

  /// As many of the pieces as one call takes; none when the first alone is too large.
  struct Vectors {
    template <typename Pieces>
    explicit Vectors(Pieces pieces) {
      for (size_t size = 0; size_t(count) < std::min(pieces.size(), kMaxPieces); ++count) {
        const auto& piece = pieces[size_t(count)];
        if ((size += piece.size()) > kMaxTransfer) break;
        array[size_t(count)] = {const_cast<std::byte*>(piece.data()), piece.size()};
      }
    }
    std::array<iovec, kMaxPieces> array;
    int count = 0;
  };
};

}  // namespace

Env& Env::posix() {
  static PosixEnv env;
  return env;
}

}  // namespace torpor
