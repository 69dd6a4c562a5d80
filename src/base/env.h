#pragma once
/// Everything the store asks of the operating system: files, directories, fsync, locks and the clock.
///
/// Two layers. The *raw* operations are virtual. Each does one system call, may be interrupted or fall short, and
/// reports -errno. A test replaces them to inject faults. The operations above them are written once, here. They retry
/// EINTR and finish short reads and writes. Of errno they make an Error that says what failed, on what, and what to do.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace torpor {

class Env;

struct FileStat {
  uint64_t size = 0;
  int64_t mtime_ns = 0;
  int64_t ctime_ns = 0;  ///< when contents, names or mode last changed; nobody can set it back
  uint64_t inode = 0;
  bool is_directory = false;
  bool is_file = false;  ///< a regular one
  bool is_link = false;  ///< a symbolic link; only stat_link says so
  uint64_t device = 0;   ///< inode numbers are of one device
  uint32_t owner = 0;    ///< user id
  uint32_t permissions = 0;  ///< the mode's lowest 12 bits
  bool is_same_file(const FileStat& other) const { return inode == other.inode && device == other.device; }
  /// Whether what is there now is what was there then: a name, or another mode, makes no other file.
  bool operator==(const FileStat& other) const {
    return size == other.size && mtime_ns == other.mtime_ns && inode == other.inode && is_directory == other.is_directory;
  }
};

enum class OpenMode {
  kRead,       ///< an existing regular file; a pipe or a device is refused (ENXIO) and never waited for
  kCreateNew,  ///< for writing, 0600; fails when the name exists
  kLockFile,   ///< read and write, created (0600) when absent; a regular file, and never through a symbolic link
  kAppendLocked,  ///< as kLockFile, and what is written goes to the file's end
};

/// Mappings of files that one process holds at most. Linux allows 65,530 of all kinds; beyond them malloc fails too.
inline constexpr int kMaxMappings = 16'384;

/// Which files `File::map` maps. Memory that comes over a network can fail (SIGBUS), stall or change at each touch.
enum class MapFrom { kLocal, kAnywhere };

/// An open file, closed by the destructor. Concurrent `read_at` is safe.
class File {
 public:
  File(Env& env, int fd, std::filesystem::path path) : env_(&env), fd_(fd), path_(std::move(path)) {}
  ~File();
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;

  const std::filesystem::path& path() const { return path_; }
  int fd() const { return fd_; }
  FileStat stat() const;
  /// Fills `out` from `offset`; kCorruption when the file ends first.
  void read_at(std::span<std::byte> out, uint64_t offset) const { read_pieces_at({out}, offset); }
  /// The same, with memory that lies apart; fills `pieces` in order.
  void read_pieces_at(std::vector<std::span<std::byte>> pieces, uint64_t offset) const;
  /// The first `size` bytes as read-only memory that outlives the file's descriptor; nullptr where that can't be had
  /// (the caller reads instead). The file must never be written or cut again.
  std::shared_ptr<const std::byte> map(uint64_t size, MapFrom from = MapFrom::kLocal) const;
  void write_all(std::vector<std::span<const std::byte>> pieces);
  /// Says how long the file will be, which makes writing it cheaper. Only a hint.
  void expect_size(uint64_t size) noexcept;
  void sync() const;
  /// Reports what close reports (some file systems refuse a write only here). The destructor does not.
  void close();
  /// Closes early what was only read.
  void release() noexcept;

 private:
  Env* env_;
  int fd_;
  std::filesystem::path path_;
};

/// A held lock; released by the destructor, and by the kernel when the process ends. A child that was forked shares it:
/// the process that took it releases it for both, and the child's copy releases nothing.
class FileLock {
 public:
  FileLock(Env& env, File file);
  ~FileLock() { release(); }
  FileLock(FileLock&& other) noexcept = default;
  FileLock& operator=(FileLock&& other) noexcept;
  const std::filesystem::path& path() const { return file_.path(); }
  /// Open for reading and writing, at its beginning.
  File& file() { return file_; }
  const File& file() const { return file_; }
  /// False for a forked child's copy, and for one that was moved from.
  bool is_held() const noexcept;

 private:
  void release() noexcept;

  Env* env_;
  File file_;
  int64_t process_;  ///< that took it
};

enum class LockMode { kShared, kExclusive };

class Env {
 public:
  virtual ~Env() = default;
  /// The operating system.
  static Env& posix();

  // What the store uses. All but `stat`, `exists` and `lock` throw kIo (kNotFound for a missing file to read).
  File open(const std::filesystem::path& path, OpenMode mode);
  /// nullopt when there is no such file.
  std::optional<FileStat> stat(const std::filesystem::path& path);
  bool exists(const std::filesystem::path& path) { return stat(path).has_value(); }
  /// Whether a regular file has this name. A directory, a pipe or a socket is nobody's file.
  bool is_file(const std::filesystem::path& path) {
    const auto found = stat(path);
    return found && found->is_file;
  }
  /// Of the name itself, where it is a symbolic link; nullopt when there is none.
  std::optional<FileStat> stat_link(const std::filesystem::path& path);
  /// Whether a directory has this name itself: a symbolic link to one may lead anywhere.
  bool is_own_directory(const std::filesystem::path& path) {
    const auto found = stat_link(path);
    return found && found->is_directory;
  }
  void rename(const std::filesystem::path& from, const std::filesystem::path& to);
  /// Renames `from` to `to` unless that name is taken; then false, and `from` stays. Of several at once one gets it.
  bool put_new(const std::filesystem::path& from, const std::filesystem::path& to);
  /// Gives a file a second name, which must be free; kNotFound when there is no such file. False where files have one.
  bool link(const std::filesystem::path& from, const std::filesystem::path& to);
  /// False when there was nothing to remove.
  bool remove(const std::filesystem::path& path);
  /// Makes one directory (0700); false when it exists. kIo when something else has the name, a symbolic link included.
  bool make_directory(const std::filesystem::path& path);
  void sync_directory(const std::filesystem::path& path);
  /// Names in a directory, sorted; empty when there is no such directory.
  std::vector<std::string> list(const std::filesystem::path& path);
  /// The same; none when it is a symbolic link, which may lead to somebody else's files.
  std::vector<std::string> list_own(const std::filesystem::path& path) {
    return is_own_directory(path) ? list(path) : std::vector<std::string>();
  }
  /// Bytes that an ordinary user may still write to the file system that `path` is on.
  uint64_t free_space(const std::filesystem::path& path);
  /// Whole file; kResourceExhausted when it is larger than `max_bytes`.
  std::string read_file(const std::filesystem::path& path, uint64_t max_bytes);
  /// Locks the file (made when absent). nullopt when it can't be had within `timeout`; zero = one attempt.
  std::optional<FileLock> lock(const std::filesystem::path& path, LockMode mode, std::chrono::milliseconds timeout,
                               OpenMode open_mode = OpenMode::kLockFile);
  virtual std::chrono::system_clock::time_point now();
  /// 128 bits that no one else draws, as 32 lower-case hex digits.
  virtual std::string random_id();

  // The raw layer: one system call each, >= 0 or -errno.
  virtual int raw_open(const char* path, OpenMode mode) = 0;
  virtual int raw_close(int fd) = 0;
  virtual int64_t raw_read(int fd, void* bytes, size_t size, uint64_t offset) = 0;
  /// As much of `pieces`, in order, as one call gives; none of them is empty.
  virtual int64_t raw_read_pieces(int fd, std::span<const std::span<std::byte>> pieces, uint64_t offset) {
    return raw_read(fd, pieces.front().data(), pieces.front().size(), offset);
  }
  virtual int64_t raw_write(int fd, const void* bytes, size_t size) = 0;
  /// As much of `pieces`, in order, as one call takes; none of them is empty.
  virtual int64_t raw_write_pieces(int fd, std::span<const std::span<const std::byte>> pieces) {
    return raw_write(fd, pieces.front().data(), pieces.front().size());
  }
  /// nullptr where files can't be mapped.
  virtual std::shared_ptr<const std::byte> raw_map(int /*fd*/, uint64_t /*size*/) { return nullptr; }
  /// Whether the file is on a network's file system, or one that a program serves (FUSE). False if that is not known.
  virtual bool raw_is_remote(int /*fd*/) { return false; }
  /// What can't be had is left to the writes to say.
  virtual void raw_preallocate(int /*fd*/, uint64_t /*size*/) noexcept {}
  /// Whether every page of a mapping is in memory now; true where that can't be told.
  virtual bool raw_in_memory(std::span<const std::byte>) { return true; }
  virtual int raw_sync(int fd) = 0;
  virtual int raw_stat_fd(int fd, FileStat& out) = 0;
  virtual int raw_stat(const char* path, FileStat& out) = 0;
  /// As raw_stat, but of a symbolic link itself.
  virtual int raw_stat_link(const char* path, FileStat& out) = 0;
  virtual int raw_rename(const char* from, const char* to) = 0;
  /// A second name for a file; -EEXIST when it is taken.
  virtual int raw_link(const char* from, const char* to) = 0;
  /// As raw_rename, but -EEXIST when the new name is taken; -ENOSYS where that can't be had.
  virtual int raw_rename_new(const char* from, const char* to) = 0;
  virtual int raw_remove(const char* path) = 0;
  virtual int raw_make_directory(const char* path) = 0;
  virtual int raw_sync_directory(const char* path) = 0;
  virtual int raw_list(const char* path, std::vector<std::string>& names) = 0;
  virtual int raw_free_space(const char* path, uint64_t& bytes) = 0;
  /// Without waiting; -EWOULDBLOCK when another holds it.
  virtual int raw_lock(int fd, LockMode mode) = 0;
  /// Releases it for every process that shares the descriptor.
  virtual int raw_unlock(int fd) = 0;
};

/// From the system: each process, a forked one too, gets others.
uint64_t random_bits();

/// Throws kIo with a sentence for people: what failed, on what, and what to do.
[[noreturn]] void throw_io_error(std::string_view what, const std::filesystem::path& path, int error_number);

}  // namespace torpor
