#pragma once
/// Files on their way into a directory: written whole under a temporary name, then put in place by one call.

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/env.h"

namespace torpor {

/// `.torpor-tmp-PID-RANDOM`. The random number is drawn anew each time, so a forked process has names of its own.
std::string temporary_name();
/// Whether a file of this name is one, also of an earlier Torpor's.
bool is_temporary_name(std::string_view name);

/// Removes what killed processes left in a directory that is no store's, where no gc comes by. These are files of such
/// names that nobody has written to for a day. Best effort.
void remove_abandoned(Env& env, const std::filesystem::path& directory) noexcept;

/// Room in the store that a save under limits has been given, while this object lives. It is an empty file in the root,
/// whose name says how many bytes.
class Reservation {
 public:
  Reservation(Env& env, const std::filesystem::path& root, int64_t bytes);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

 private:
  Env& env_;
  const std::filesystem::path path_;
};

/// The bytes that a file of this name reserves; 0 when it is none that does.
int64_t reserved_bytes(std::string_view name);

/// A file under a temporary name; the destructor removes it unless it was put in place.
class TemporaryFile {
 public:
  /// Writes `pieces` to a new file in `directory`, and flushes it when `sync`.
  TemporaryFile(Env& env, const std::filesystem::path& directory, const std::vector<std::span<const std::byte>>& pieces,
                bool sync);
  ~TemporaryFile();
  TemporaryFile(TemporaryFile&& other) noexcept;
  TemporaryFile& operator=(TemporaryFile&&) = delete;

  /// Where it is until it is put in place.
  const std::filesystem::path& path() const { return path_; }
  /// Stays the file's whatever its name.
  const FileStat& stat() const { return stat_; }
  /// Takes the name, whatever had it before.
  void replace(const std::filesystem::path& path);
  /// Takes the name unless it is taken: false then.
  bool put_new(const std::filesystem::path& path);

 private:
  void remove() noexcept;

  Env& env_;
  std::filesystem::path path_;  ///< empty once there is no such file
  FileStat stat_;
};

/// Writes `pieces` beside `path` and renames that into place. On an error nothing is left behind.
FileStat write_file(Env& env, const std::filesystem::path& path,
                    const std::vector<std::span<const std::byte>>& pieces, bool sync);

}  // namespace torpor
