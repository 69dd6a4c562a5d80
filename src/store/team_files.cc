#include "store/team_files.h"

#include <algorithm>
#include <optional>

#include "base/hash.h"
#include "store/agent_file.h"
#include "store/store_impl.h"
#include "store/temporary_file.h"
#include "store/writing.h"

namespace torpor {
namespace {

constexpr size_t kMostTeamFile = size_t(16) << 20;
constexpr std::string_view kTeamExtension = ".json";
constexpr std::string_view kBegin = "{\n";
constexpr std::string_view kTeamPrefix = "{\n  \"team_checksum\": \"";
constexpr std::string_view kSuffix = "\",\n";
/// What a file has beside its object, which begins with kBegin.
constexpr size_t kHead = kTeamPrefix.size() + kNoChecksum.size() + kSuffix.size() - kBegin.size();

/// The id that a file of this name is of; empty when it is no team's.
std::string id_of(const std::string& file) {
  if (!file.ends_with(kTeamExtension)) return {};
  std::string id = file.substr(0, file.size() - kTeamExtension.size());
  return is_agent_id(id) ? id : std::string();
}

/// The file of an object that begins "{\n".
std::string file_of(std::string_view json) {
  std::string text(kTeamPrefix);
  return with_checksum(text.append(kNoChecksum).append(kSuffix).append(json.substr(kBegin.size())), kTeamPrefix.size());
}

}  // namespace

std::filesystem::path TeamFiles::path(const std::string& id) const {
  check_agent_id(id);
  return directory_ / (id + std::string(kTeamExtension));
}

FileStat TeamFiles::write(const std::string& id, std::string_view json, bool is_new, bool durable) {
  const std::filesystem::path to = path(id);
  // Another process may have made the directory and not flushed it yet.
  env_.make_directory(directory_);
  if (durable) env_.sync_directory(directory_.parent_path());
  const std::string text = file_of(json);
  TemporaryFile file(env_, directory_, {as_bytes_of(text)}, durable);
  if (!is_new) {
    file.replace(to);
  } else if (!file.put_new(to)) {
    throw Error(ErrorCode::kInvalidArgument, "There is a team '" + id + "' already; choose another name.")
        .with_field(kTeamTaken);
  }
  if (durable) env_.sync_directory(directory_);
  return file.stat();
}

std::string TeamFiles::read(const std::string& id) const {
  const std::filesystem::path from = path(id);
  if (!env_.is_own_directory(directory_) || !env_.is_file(from))
    throw Error(ErrorCode::kNotFound, "There is no team '" + id + "'.");
  std::optional<std::string> text;
  try {
    text = env_.read_file(from, kMostTeamFile);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kResourceExhausted) throw;  // else it is larger than any that is written
  }
  if (!text || !has_checksum(*text, kTeamPrefix)) {
    throw Error(ErrorCode::kCorruption, "The team's file '" + from.string() +
                                            "' is damaged; remove the team. Its members' agents stay.")
        .with_path(from.string());
  }
  return *std::move(text);
}

bool TeamFiles::remove(const std::string& id, bool durable) {
  const std::filesystem::path gone = path(id);
  if (!env_.is_own_directory(directory_) || !env_.remove(gone)) return false;
  if (durable) env_.sync_directory(directory_);
  return true;
}

std::vector<std::string> TeamFiles::files() const {
  std::vector<std::string> files = env_.list_own(directory_);
  std::erase_if(files, [](const std::string& file) { return id_of(file).empty() && !is_temporary_name(file); });
  return files;
}

std::vector<std::string> TeamFiles::list() const {
  std::vector<std::string> ids;
  for (const std::string& file : files()) {
    if (std::string id = id_of(file); !id.empty() && env_.is_file(directory_ / file)) ids.push_back(std::move(id));
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

std::vector<std::filesystem::path> TeamFiles::temporary_files() const {
  std::vector<std::filesystem::path> found;
  for (const std::string& file : files()) {
    if (is_temporary_name(file) && env_.is_file(directory_ / file)) found.push_back(directory_ / file);
  }
  return found;
}

void keep_team(Store::Impl& store, const std::string& id, std::string_view json, bool is_new, Durability durability) {
  store.teams.path(id);
  if (!json.starts_with(kBegin) || json.size() > kMostTeamFile - kHead) {
    const std::string most = std::to_string(kMostTeamFile - kHead);
    throw Error(ErrorCode::kInvalidArgument,
                "What is to be kept of the team '" + id + "' is no JSON object of at most " + most + " bytes.");
  }
  store.agents.require_store();
  Writing writing(store);
  writing.make_room("Keeping a team", int64_t(json.size() + kHead), {});
  writing.claim({}, {});  // no sweep takes the file for one that a crash left
  const bool durable = durability == Durability::kFull;
  if (durable) store.agents.flush_marker();
  store.written.add(store.teams.write(id, json, is_new, durable));
}

}  // namespace torpor
