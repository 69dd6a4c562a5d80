#include "store/catalogue.h"

#include <algorithm>

#include "base/checked.h"
#include "base/parallel.h"
#include "store/sidecar.h"
#include "torpor/error.h"

namespace torpor {
namespace {

constexpr std::string_view kSidecarExtension = ".json";
constexpr uint64_t kMaxSidecar = 64 << 20;  // bytes that are read of what may be one

}  // namespace

std::vector<std::string> Catalogue::names() const {
  std::vector<std::string> ids;
  for (const auto& name : env_.list(root_)) {
    if (!name.ends_with(kSafetensorsExtension)) continue;
    std::string id = name.substr(0, name.size() - kSafetensorsExtension.size());
    if (is_agent_id(id)) ids.push_back(std::move(id));
  }
  return ids;
}

std::vector<std::string> Catalogue::ids() const {
  std::vector<std::string> ids = names();
  std::erase_if(ids, [&](const std::string& id) { return !env_.is_file(agent_path(id)); });
  return ids;
}

void Catalogue::require(const std::string& id) const {
  require_store();
  if (!env_.is_file(agent_path(id))) throw no_agent(id);
}

OpenedAgent Catalogue::open(const std::string& id) const {
  check_agent_id(id);
  const auto path = agent_path(id);
  require(id);
  File handle = env_.open(path, OpenMode::kRead);
  const FileStat stat = handle.stat();
  try {
    AgentFile agent = parse_agent_file(read_header_bytes(handle, stat.size), stat.size, path.string());
    if (agent.info.agent_id != id) throw renamed_agent(id, agent.info.agent_id);
    return {std::move(handle), stat, std::move(agent)};
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kCorruption && holder(id).kind == Holder::kForeign) throw no_agent(id);
    throw;
  }
}

std::optional<AgentFile> Catalogue::header(const std::string& id) const {
  try {
    if (env_.exists(agent_path(id))) return open(id).agent;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
  }
  return std::nullopt;
}

void Catalogue::add_file_sizes(AgentInfo& info, const AgentFile& agent) const {
  for (const PartRef& part : agent.parts) {
    const auto stat = env_.stat(part_path(agent.uid, part.name));
    info.tail_bytes = saturating_add(info.tail_bytes, int64_t(stat.value_or(FileStat{}).size));
  }
  for (const StateRef& state : states_of(info)) {
    info.state_bytes = saturating_add(info.state_bytes, int64_t(states_.find(state.file).value_or(FileStat{}).size));
  }
  info.bytes = saturating_add(info.tail_bytes, info.state_bytes);
  for (const auto& stat : segments_.find(info.segments)) {
    info.bytes = saturating_add(info.bytes, int64_t(stat.value_or(FileStat{}).size));
  }
}

AgentInfo Catalogue::info(const std::string& id) const {
  const AgentFile agent = open(id).agent;
  AgentInfo info = agent.info;
  add_file_sizes(info, agent);
  return info;
}

std::optional<AgentInfo> Catalogue::list_one(const std::string& id, bool rebuild_sidecar) {
  const auto stat = env_.stat(agent_path(id));
  if (!stat || !stat->is_file) return std::nullopt;  // deleted meanwhile, or not ours
  try {
    auto found = decode_sidecar(env_.read_file(sidecar_path(id), kMaxSidecar), *stat);
    if (found && found->agent_id == id) return found;
  } catch (const Error&) {
    // None, or unreadable: as good as stale.
  }
  try {
    AgentInfo rebuilt = info(id);
    // Written only when no save came between: the pair must speak of one state.
    if (rebuild_sidecar && env_.stat(agent_path(id)) == stat) write_sidecar(rebuilt, *stat);
    return rebuilt;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) return std::nullopt;
    AgentInfo damaged;
    damaged.agent_id = id;
    damaged.bytes = damaged.tail_bytes = int64_t(stat->size);
    return damaged;
  }
}

std::vector<AgentInfo> Catalogue::list(bool rebuild_sidecars) {
  require_store();
  const std::vector<std::string> all = names();
  std::vector<std::optional<AgentInfo>> found(all.size());
  parallel_for(all.size(), std::min(reader_threads(), 1 + all.size() / 64),
               [&](size_t i) { found[i] = list_one(all[i], rebuild_sidecars); });
  std::vector<AgentInfo> agents;
  for (auto& agent : found) {
    if (agent) agents.push_back(std::move(*agent));
  }
  return agents;
}

std::vector<int64_t> Catalogue::count_missing(std::span<const AgentInfo> agents) const {
  // Agents share them: each is asked for once.
  std::unordered_set<std::string> named, named_states;
  for (const AgentInfo& info : agents) {
    named.insert(info.segments.begin(), info.segments.end());
    for (const StateRef& state : states_of(info)) named_states.insert(state.file);
  }
  const auto keep_missing = [](const FilePool& pool, std::unordered_set<std::string>& wanted) {
    const std::vector<std::string> names(wanted.begin(), wanted.end());
    const auto found = pool.find(names);
    for (size_t i = 0; i < names.size(); ++i) {
      if (found[i]) wanted.erase(names[i]);
    }
  };
  keep_missing(segments_, named);
  keep_missing(states_, named_states);
  std::vector<int64_t> missing;
  for (const AgentInfo& info : agents) {
    int64_t& n = missing.emplace_back(0);
    for (const std::string& segment : info.segments) n += named.contains(segment);
    for (const StateRef& state : states_of(info)) n += named_states.contains(state.file);
    for (const std::string& part : info.parts) {
      n += !env_.is_file(parts_path() / (part + std::string(kSafetensorsExtension)));
    }
  }
  return missing;
}

std::unordered_set<std::string> Catalogue::live_files() const {
  std::unordered_set<std::string> live;
  for (const auto& id : ids()) {
    try {
      const OpenedAgent opened = open(id);
      opened.handle.sync();
      live.insert(opened.agent.info.segments.begin(), opened.agent.info.segments.end());
      for (const StateRef& state : states_of(opened.agent.info)) live.insert(state.file);
      for (const PartRef& part : opened.agent.parts) live.insert(part_path(opened.agent.uid, part.name).string());
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kNotFound) continue;  // deleted meanwhile
      if (error.code() == ErrorCode::kIo) throw;
      throw Error(ErrorCode::kCorruption, std::string(error.what()) +
                                              " No segment was removed, for it can't be known which ones this agent "
                                              "needs; restore its file or delete the agent, then try again.");
    }
  }
  env_.sync_directory(root_);
  return live;
}

std::vector<StoredPart> Catalogue::stored_parts() const {
  std::vector<StoredPart> parts;
  for (const auto& file : env_.list_own(parts_path())) {
    constexpr size_t kDigest = 32;
    const std::string uid = file.substr(0, kDigest),
                      name = file.size() > kDigest ? file.substr(kDigest + 1, kDigest) : "";
    if (!is_hex_digest(uid) || !is_hex_digest(name) || part_path(uid, name).filename() != file) continue;
    if (const auto stat = env_.stat(parts_path() / file); stat && stat->is_file) parts.push_back({uid, name, *stat});
  }
  return parts;
}

std::vector<Removable> Catalogue::stray_sidecars() const {
  std::vector<Removable> stray;
  for (const auto& name : env_.list(root_)) {
    if (!name.ends_with(kSidecarExtension)) continue;
    const std::string id = name.substr(0, name.size() - kSidecarExtension.size());
    if (!is_agent_id(id) || contains(id)) continue;
    const auto stat = env_.stat(root_ / name);
    // Other people's .json files stay.
    if (stat && stat->is_file && is_own_sidecar(id)) stray.push_back({root_ / name, *stat, {}});
  }
  return stray;
}

std::vector<std::filesystem::path> Catalogue::temporary_files() const {
  std::vector<std::filesystem::path> found;
  auto add = [&](const std::filesystem::path& directory, const std::vector<std::string>& names) {
    for (const auto& name : names) {
      if (is_temporary_name(name) && env_.is_file(directory / name)) found.push_back(directory / name);
    }
  };
  add(root_, env_.list(root_));
  add(parts_path(), env_.list_own(parts_path()));
  return found;
}

}  // namespace torpor
