/// Env over the operating system: each raw operation is a system call or a few.

#include "base/env.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <string>
#include <vector>
#include <utility>

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
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

namespace torpor {
namespace {

int or_errno(int result) { return result < 0 ? -errno : result; }

FileStat convert(const struct stat& from) {
#ifdef __APPLE__
  const timespec &modified = from.st_mtimespec, &changed = from.st_ctimespec;
#else
  const timespec &modified = from.st_mtim, &changed = from.st_ctim;
#endif
  const auto nanoseconds = [](const timespec& time) { return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec; };
  return {.size = uint64_t(from.st_size),
          .mtime_ns = nanoseconds(modified),
          .ctime_ns = nanoseconds(changed),
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
