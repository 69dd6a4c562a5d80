#include "store/records.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <optional>

#include "base/checked.h"
#include "base/hash.h"
#include "store/temporary_file.h"
#include "store/writing.h"

namespace torpor {
namespace {

constexpr size_t kMostBytes = size_t(1) << 30;

bool is_name(std::string_view name) {
  const size_t dash = name.find('-');
  if (dash == 0 || dash > 32 || name.size() != dash + 33) return false;
  return std::all_of(name.begin(), name.begin() + ptrdiff_t(dash), [](char c) { return c >= 'a' && c <= 'z'; }) &&
         name.find_first_not_of("0123456789abcdef", dash + 1) == std::string_view::npos;
}

/// Of `NAME.EXPIRES`; nullopt when the file is no record.
std::optional<Record> parse_file_name(const std::string& file) {
  const size_t dot = file.find('.');
  if (dot == std::string::npos || !is_name(std::string_view(file).substr(0, dot))) return std::nullopt;
  Record record{.name = file.substr(0, dot)};
  const char* const end = file.data() + file.size();
  const auto [last, error] = std::from_chars(file.data() + dot + 1, end, record.expires);
  if (error != std::errc() || last != end || std::to_string(record.expires) != file.substr(dot + 1))
    return std::nullopt;
  return record.expires < 0 ? std::nullopt : std::optional(record);
}

}  // namespace

std::filesystem::path Records::path(const Record& record) const {
  if (!is_name(record.name) || record.expires < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "'" + record.name + "' can't be a record's name; use letters a to z, '-' and 32 hex digits.");
  }
  return directory_ / (record.name + "." + std::to_string(record.expires));
}

FileStat Records::write(const Record& record, std::string_view bytes, bool durable) {
  const std::filesystem::path to = path(record);
  // Another process may have made the directory and not flushed it yet.
  env_.make_directory(directory_);
  if (durable) env_.sync_directory(directory_.parent_path());
  const std::string header = hash_hex(bytes) + "\n";
  const FileStat stat = write_file(env_, to, {as_bytes_of(header), as_bytes_of(bytes)}, durable);
  if (durable) env_.sync_directory(directory_);
  return stat;
}

std::string Records::read(const Record& record) const {
  const std::filesystem::path from = path(record);
  std::string text = env_.read_file(from, kMostBytes + size_t(kHeader));
  if (text.size() < size_t(kHeader) ||
      text.substr(0, kHeader) != hash_hex(std::string_view(text).substr(kHeader)) + "\n") {
    throw Error(ErrorCode::kCorruption, "The record '" + from.string() + "' is damaged; remove it.")
        .with_path(from.string());
  }
  return text.substr(kHeader);
}

bool Records::remove(const Record& record, bool durable) {
  const std::filesystem::path gone = path(record);
  if (!env_.is_own_directory(directory_) || !env_.remove(gone)) return false;
  if (durable) env_.sync_directory(directory_);
  return true;
}

std::vector<std::string> Records::files() const {
  std::vector<std::string> files = env_.list_own(directory_);
  std::erase_if(files, [](const std::string& file) { return !parse_file_name(file) && !is_temporary_name(file); });
  return files;
}

std::vector<Record> Records::list() const {
  std::vector<std::pair<int64_t, Record>> found;  // with the time of writing
  for (const std::string& file : files()) {
    auto record = parse_file_name(file);
    const auto stat = record ? env_.stat(directory_ / file) : std::nullopt;
    if (!stat || !stat->is_file) continue;
    record->bytes = int64_t(stat->size);
    found.emplace_back(stat->mtime_ns, std::move(*record));
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Record> records;
  for (auto& [time, record] : found) records.push_back(std::move(record));
  return records;
}

std::vector<Removable> Records::expired() const {
  const int64_t now = std::chrono::duration_cast<std::chrono::seconds>(env_.now().time_since_epoch()).count();
  std::vector<Removable> expired;
  for (const Record& record : list()) {
    const bool over = record.expires != 0 && record.expires <= now;
    const auto stat = over ? env_.stat(path(record)) : std::nullopt;
    if (stat) expired.push_back({path(record), *stat, {}});
  }
  return expired;
}

std::vector<std::filesystem::path> Records::temporary_files() const {
  std::vector<std::filesystem::path> found;
  for (const std::string& file : files()) {
    if (is_temporary_name(file) && env_.is_file(directory_ / file)) found.push_back(directory_ / file);
  }
  return found;
}

void keep_record(Store::Impl& store, const Record& record, std::string_view bytes, Durability durability) {
  store.records.path(record);
  if (bytes.size() > kMostBytes) {
    throw Error(ErrorCode::kInvalidArgument, "A record of " + std::to_string(bytes.size()) +
                                                 " bytes is too large; the most are " + std::to_string(kMostBytes) +
                                                 ".");
  }
  store.agents.require_store();
  Writing writing(store);
  writing.make_room("Keeping a record", saturating_add(int64_t(bytes.size()), Records::kHeader), {});
  writing.claim({}, {});  // no sweep takes the file for one that a crash left
  const bool durable = durability == Durability::kFull;
  if (durable) store.agents.flush_marker();
  store.written.add(store.records.write(record, bytes, durable));
}

}  // namespace torpor
