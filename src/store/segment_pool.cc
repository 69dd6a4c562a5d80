#include "store/segment_pool.h"

#include <algorithm>
#include <set>

#include "base/parallel.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor {
namespace {

constexpr std::string_view kExtension = ".safetensors";

[[noreturn]] void corrupt(const std::filesystem::path& path, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "'" + path.string() + "' is damaged: " + what + ".");
}

}  // namespace

SegmentPool::SegmentPool(Env& env, std::filesystem::path root) : env_(env), directory_(std::move(root) / "segments") {}

std::vector<std::optional<FileStat>> SegmentPool::find(std::span<const std::string> names) const {
  std::vector<std::optional<FileStat>> found;
  found.reserve(names.size());
  for (const std::string& name : names) found.push_back(find(name));
  return found;
}

std::optional<FileStat> SegmentPool::find(const std::string& name) const {
  const auto stat = env_.stat(path(name));
  return stat && stat->is_file ? stat : std::nullopt;
}

File SegmentPool::open(const std::string& name) const { return env_.open(path(name), OpenMode::kRead); }

OpenedSegment SegmentPool::open(const std::string& name, const SegmentPlace& place, SegmentHeaders& headers) const {
  File handle = open(name);
  const FileStat stat = handle.stat();
  SegmentFile segment = headers.parse(read_header_bytes(handle, stat.size), stat.size, handle.path().string());
  if (segment.lineage != place.lineage) corrupt(handle.path(), "it belongs to another model");
  if (layout_digest(segment.file.layout, segment.file.version) != place.layout_digest) {
    corrupt(handle.path(), "its layout is not the agent's");
  }
  if (segment.parent != place.parent) corrupt(handle.path(), "it does not follow the segment before it");
  const auto tokens = read_tokens(handle, segment.file);
  if (!std::equal(tokens.begin(), tokens.end(), place.tokens.begin(), place.tokens.end())) {
    corrupt(handle.path(), "its tokens are not the agent's");
  }
  if (segment_name(place, segment.variant) != name) corrupt(handle.path(), "its name is not that of its contents");
  return {std::move(handle), stat, std::move(segment)};
}

TemporaryFile SegmentPool::write(const std::string& name, const std::vector<std::span<const std::byte>>& pieces,
                                 bool durable) {
  if (env_.make_directory(directory_)) is_new_ = true;
  env_.make_directory(directory_of(name));
  return TemporaryFile(env_, directory_of(name), pieces, durable);
}

bool SegmentPool::put_new(const std::string& name, TemporaryFile& file) {
  if (file.put_new(path(name))) return true;
  // What is no file is found by nobody, so whoever was told to look again would come back for ever.
  if (const auto other = env_.stat_link(path(name)); other && !other->is_file && !find(name)) {
    throw Error(ErrorCode::kIo,
                "'" + path(name).string() + "' has the name of a segment, and is no file; move it aside.")
        .with_path(path(name).string());
  }
  return false;
}

void SegmentPool::replace(const std::string& name, TemporaryFile& file) { file.replace(path(name)); }

void SegmentPool::flush_names(std::span<const StoredSegment> segments) {
  if (segments.empty()) return;
  sync_directories(segments);
  if (is_new_.exchange(false)) env_.sync_directory(directory_.parent_path());
  for (const auto& [name, stat] : segments) durable_.add(name, stat);
}

void SegmentPool::flush(std::span<const StoredSegment> segments) {
  std::vector<StoredSegment> unseen;
  for (const StoredSegment& segment : segments) {
    if (durable_.contains(segment.name, segment.stat)) continue;
    open(segment.name).sync();
    unseen.push_back(segment);
  }
  if (unseen.empty()) return;
  sync_directories(unseen);
  for (const auto& [name, stat] : unseen) durable_.add(name, stat);
}

void SegmentPool::sync_directories(std::span<const StoredSegment> segments) {
  std::set<std::filesystem::path> directories;
  for (const StoredSegment& segment : segments) directories.insert(directory_of(segment.name));
  directories.insert(directory_);
  const std::vector<std::filesystem::path> all(directories.begin(), directories.end());
  parallel_for(all.size(), kFlushThreads, [&](size_t i) { env_.sync_directory(all[i]); });
}

void SegmentPool::note_variant(const std::string& plain, const std::string& name) noexcept {
  try {
    env_.make_directory(notes());
    const auto note = notes() / (plain + "-" + name);
    if (!env_.exists(note)) env_.open(note, OpenMode::kCreateNew).close();
  } catch (const std::exception& error) {
    log(LogLevel::kInfo, "That the segment '" + name + "' is a variant could not be noted: " + error.what());
  }
}

std::unordered_multimap<std::string, std::string> SegmentPool::variants() const {
  std::unordered_multimap<std::string, std::string> variants;
  for (const std::string& note : env_.list_own(notes())) {
    const size_t dash = note.find('-');
    if (dash == std::string::npos) continue;
    const std::string plain = note.substr(0, dash), name = note.substr(dash + 1);
    if (is_hex_digest(plain) && is_hex_digest(name)) variants.emplace(plain, name);
  }
  return variants;
}

std::vector<Removable> SegmentPool::stale_notes() const {
  std::vector<Removable> stale;
  for (const auto& [plain, name] : variants()) {
    const auto note = notes() / (plain + "-" + name);
    const auto stat = env_.stat(note);
    if (stat && !find(name)) stale.push_back({note, *stat, name});
  }
  return stale;
}

std::vector<std::filesystem::path> SegmentPool::directories() const {
  std::vector<std::filesystem::path> directories;
  for (const std::string& name : env_.list_own(directory_)) {
    if (env_.is_own_directory(directory_ / name)) directories.push_back(directory_ / name);
  }
  return directories;
}

std::vector<StoredSegment> SegmentPool::list() const {
  std::vector<StoredSegment> segments;
  for (const auto& directory : directories()) {
    for (const auto& file : env_.list(directory)) {
      if (!file.ends_with(kExtension)) continue;
      const std::string name = file.substr(0, file.size() - kExtension.size());
      if (!is_hex_digest(name) || !name.starts_with(directory.filename().string())) continue;
      if (const auto stat = env_.stat(directory / file); stat && stat->is_file) segments.push_back({name, *stat});
    }
  }
  return segments;
}

std::vector<std::filesystem::path> SegmentPool::temporary_files() const {
  std::vector<std::filesystem::path> found;
  for (const auto& directory : directories()) {
    for (const auto& name : env_.list(directory)) {
      if (is_temporary_name(name) && env_.is_file(directory / name)) found.push_back(directory / name);
    }
  }
  return found;
}

}  // namespace torpor
