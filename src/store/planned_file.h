#pragma once
/// What the files of a save have in common on their way to disk, segments and states.

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "store/file_pool.h"
#include "store/store_impl.h"

namespace torpor {

struct PlannedFile {
  std::string name, variant;
  std::vector<std::string>* checksums = nullptr;  ///< empty until someone needed them
  bool write = false;                             ///< it is missing
  std::optional<FileStat> damaged;  ///< a file that has the name, and that no reader would take
  FileStat stat;                    ///< of a file to be written its size alone
};

/// Whether what is under a planned file's name is the same.
enum class FoundFile { kNothing, kSame, kOther };

/// All of them, or those that are on disk already, as they were when they were looked at.
template <class Files>
std::vector<StoredFile> stored_files(const Files& planned, bool missing_too) {
  std::vector<StoredFile> files;
  for (const PlannedFile& file : planned) {
    if (missing_too || !file.write) files.push_back({file.name, file.stat});
  }
  return files;
}

template <class Files>
std::vector<std::string> names_of(const Files& planned) {
  std::vector<std::string> names;
  for (const PlannedFile& file : planned) names.push_back(file.name);
  return names;
}

template <class Files>
int64_t bytes_of(const Files& planned) {
  int64_t bytes = 0;
  for (const PlannedFile& file : planned) bytes += int64_t(file.stat.size);
  return bytes;
}
/// Of those that are missing.
template <class Files>
int64_t missing_bytes_of(const Files& planned) {
  int64_t bytes = 0;
  for (const PlannedFile& file : planned) bytes += file.write ? int64_t(file.stat.size) : 0;
  return bytes;
}

/// Gives `written` its name in `pool`, in place of a damaged file. False when another has taken it meanwhile.
inline bool put_in_place(Store::Impl& store, FilePool& pool, const PlannedFile& planned, TemporaryFile& written) {
  if (!planned.damaged) return pool.put_new(planned.name, written);
  // Of several who find the damage one replaces the file.
  const auto hold = store.locks.removing(std::chrono::seconds(10));
  if (!hold)
    throw Error(ErrorCode::kBusy,
                "The store '" + store.root.string() + "' is in use by another process; try again later.");
  if (pool.find(planned.name) != planned.damaged) return false;
  pool.replace(planned.name, written);
  return true;
}

}  // namespace torpor
