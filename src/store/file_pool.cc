#include "store/file_pool.h"

#include <algorithm>
#include <set>

#include "base/parallel.h"
#include "store/torpor_file.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor {
std::vector<std::optional<FileStat>> FilePool::find(std::span<const std::string> names) const {
  std::vector<std::optional<FileStat>> found;
  found.reserve(names.size());
  for (const std::string& name : names) found.push_back(find(name));
  return found;
}

std::optional<FileStat> FilePool::find(const std::string& name) const {
  const auto stat = env_.stat(path(name));
  return stat && stat->is_file ? stat : std::nullopt;
}

File FilePool::open(const std::string& name) const { return env_.open(path(name), OpenMode::kRead); }

TemporaryFile FilePool::write(const std::string& name, const std::vector<std::span<const std::byte>>& pieces,
                              bool durable) {
  if (env_.make_directory(directory_)) is_new_ = true;
  env_.make_directory(directory_of(name));
  return TemporaryFile(env_, directory_of(name), pieces, durable);
}

bool FilePool::put_new(const std::string& name, TemporaryFile& file) {
  if (file.put_new(path(name))) return true;
  // What is no file is found by nobody, so whoever was told to look again would come back for ever.
  if (const auto other = env_.stat_link(path(name)); other && !other->is_file && !find(name)) {
    throw Error(ErrorCode::kIo,
                "'" + path(name).string() + "' has the name of a " + kind_ + ", and is no file; move it aside.")
        .with_path(path(name).string());
  }
  return false;
}

void FilePool::replace(const std::string& name, TemporaryFile& file) { file.replace(path(name)); }

void FilePool::flush_names(std::span<const StoredFile> files) {
  if (files.empty()) return;
  sync_directories(files);
  if (is_new_.exchange(false)) env_.sync_directory(directory_.parent_path());
  for (const auto& [name, stat] : files) durable_.add(name, stat);
}

void FilePool::flush(std::span<const StoredFile> files) {
  std::vector<StoredFile> unseen;
  for (const StoredFile& file : files) {
    if (durable_.contains(file.name, file.stat)) continue;
    open(file.name).sync();
    unseen.push_back(file);
  }
  if (unseen.empty()) return;
  sync_directories(unseen);
  for (const auto& [name, stat] : unseen) durable_.add(name, stat);
}

void FilePool::sync_directories(std::span<const StoredFile> files) {
  std::set<std::filesystem::path> directories;
  for (const StoredFile& file : files) directories.insert(directory_of(file.name));
  directories.insert(directory_);
  const std::vector<std::filesystem::path> all(directories.begin(), directories.end());
  parallel_for(all.size(), kFlushThreads, [&](size_t i) { env_.sync_directory(all[i]); });
}

void FilePool::note_variant(const std::string& plain, const std::string& name) noexcept {
  try {
    env_.make_directory(notes());
    const auto note = notes() / (plain + "-" + name);
    if (!env_.exists(note)) env_.open(note, OpenMode::kCreateNew).close();
  } catch (const std::exception& error) {
    log(LogLevel::kInfo, "That the segment '" + name + "' is a variant could not be noted: " + error.what());
  }
}

std::unordered_multimap<std::string, std::string> FilePool::variants() const {
  std::unordered_multimap<std::string, std::string> variants;
  for (const std::string& note : env_.list_own(notes())) {
    const size_t dash = note.find('-');
    if (dash == std::string::npos) continue;
    const std::string plain = note.substr(0, dash), name = note.substr(dash + 1);
    if (is_hex_digest(plain) && is_hex_digest(name)) variants.emplace(plain, name);
  }
  return variants;
}

std::vector<Removable> FilePool::stale_notes() const {
  std::vector<Removable> stale;
  for (const auto& [plain, name] : variants()) {
    const auto note = notes() / (plain + "-" + name);
    const auto stat = env_.stat(note);
    if (stat && !find(name)) stale.push_back({note, *stat, name});
  }
  return stale;
}

std::vector<std::filesystem::path> FilePool::directories() const {
  std::vector<std::filesystem::path> directories;
  for (const std::string& name : env_.list_own(directory_)) {
    if (env_.is_own_directory(directory_ / name)) directories.push_back(directory_ / name);
  }
  return directories;
}

std::vector<StoredFile> FilePool::list() const {
  std::vector<StoredFile> files;
  for (const auto& directory : directories()) {
    for (const auto& file : env_.list(directory)) {
      if (!file.ends_with(kSafetensorsExtension)) continue;
      const std::string name = file.substr(0, file.size() - kSafetensorsExtension.size());
      if (!is_hex_digest(name) || !name.starts_with(directory.filename().string())) continue;
      if (const auto stat = env_.stat(directory / file); stat && stat->is_file) files.push_back({name, *stat});
    }
  }
  return files;
}

std::vector<std::filesystem::path> FilePool::temporary_files() const {
  std::vector<std::filesystem::path> found;
  for (const auto& directory : directories()) {
    for (const auto& name : env_.list(directory)) {
      if (is_temporary_name(name) && env_.is_file(directory / name)) found.push_back(directory / name);
    }
  }
  return found;
}

}  // namespace torpor
