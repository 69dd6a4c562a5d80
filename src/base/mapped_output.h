#pragma once
/// A file that is written as memory, for what is too large to be held in memory of its own: the system writes the pages
/// out and drops them as it needs room.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>

namespace torpor {

/// One thread takes places at a time; any thread may write to a place. A place outlives the object.
class MappedOutput {
 public:
  /// Makes the file (0600), whose name must be free. kIo.
  explicit MappedOutput(const std::filesystem::path& path);
  ~MappedOutput();
  MappedOutput(const MappedOutput&) = delete;

  struct Place {
    std::shared_ptr<std::byte> data;  ///< nullptr: the disk has no room, or the system no memory to map
    uint64_t offset = 0;              ///< in the file
  };
  /// The file's next `size` bytes, from a multiple of 64 on. The disk has room for them when this returns.
  Place take(size_t size);
  /// Bytes taken so far.
  uint64_t size() const noexcept { return end_; }
  /// Cuts off what was made ready beyond `size()`, and flushes everything to the disk. kIo.
  void finish();

 private:
  bool open_window(size_t size);

  const std::filesystem::path path_;
  int fd_ = -1;
  uint64_t end_ = 0;
  uint64_t window_begin_ = 0, window_size_ = 0;  // of the file, mapped
  std::shared_ptr<std::byte> window_;
};

}  // namespace torpor
