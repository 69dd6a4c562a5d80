#include "store/store_impl.h"

namespace torpor {

namespace {

constexpr std::string_view kExtension = ".safetensors";

}  // namespace

std::vector<std::string> Store::Impl::agent_names() {
  std::vector<std::string> ids;
  for (const auto& name : env.list(root)) {
    if (!name.ends_with(kExtension)) continue;
    std::string id = name.substr(0, name.size() - kExtension.size());
    if (is_agent_id(id)) ids.push_back(std::move(id));
  }
  return ids;
}

std::vector<std::string> Store::Impl::agent_ids() {
  std::vector<std::string> ids = agent_names();
  std::erase_if(ids, [&](const std::string& id) { return !env.is_file(agent_path(id)); });
  return ids;
}

AgentInfo Store::Impl::info(const std::string& id) {
  const AgentFile agent = open_agent(id).agent;
  AgentInfo info = agent.info;
  add_file_sizes(info, agent);
  return info;
}

std::optional<AgentInfo> Store::Impl::list_one(const std::string& id, bool rebuild_sidecar) {
  const auto stat = env.stat(agent_path(id));
  if (!stat || !stat->is_file) return std::nullopt;  // deleted meanwhile, or not ours
  try {
    auto found = decode_sidecar(env.read_file(sidecar_path(id), kMaxSidecar), *stat);
    if (found && found->agent_id == id) return found;
  } catch (const Error&) {
    // None, or unreadable: as good as stale.
  }
  try {
    AgentInfo rebuilt = info(id);
    // Written only when no save came between: the pair must speak of one state.
    if (rebuild_sidecar && env.stat(agent_path(id)) == stat) write_sidecar(rebuilt, *stat);
    return rebuilt;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) return std::nullopt;
    AgentInfo damaged;
    damaged.agent_id = id;
    damaged.bytes = damaged.tail_bytes = int64_t(stat->size);
    return damaged;
  }
}

std::vector<AgentInfo> Store::Impl::list(bool rebuild_sidecars) {
  require_store();
  const std::vector<std::string> ids = agent_names();
  std::vector<std::optional<AgentInfo>> found(ids.size());
  parallel_for(ids.size(), std::min(reader_threads(), 1 + ids.size() / 64),
               [&](size_t i) { found[i] = list_one(ids[i], rebuild_sidecars); });
  std::vector<AgentInfo> agents;
  for (auto& agent : found) {
    if (agent) agents.push_back(std::move(*agent));
  }
  return agents;
}

std::vector<Store::Impl::StoredPart> Store::Impl::stored_parts() {
  std::vector<StoredPart> parts;
  for (const auto& file : env.list_own(parts_path())) {
    constexpr size_t kDigest = 32;
    const std::string uid = file.substr(0, kDigest), name = file.size() > kDigest ? file.substr(kDigest + 1, kDigest) : "";
    if (!is_hex_digest(uid) || !is_hex_digest(name) || part_path(uid, name).filename() != file) continue;
    if (const auto stat = env.stat(parts_path() / file); stat && stat->is_file) parts.push_back({uid, name, *stat});
  }
  return parts;
}

std::vector<std::filesystem::path> Store::Impl::temporary_files() {
  std::vector<std::filesystem::path> found = segments.temporary_files();
  auto add = [&](const std::filesystem::path& directory, const std::vector<std::string>& names) {
    for (const auto& name : names) {
      if (is_temporary_name(name) && env.is_file(directory / name)) found.push_back(directory / name);
    }
  };
  add(root, env.list(root));
  add(parts_path(), env.list_own(parts_path()));
  return found;
}

}  // namespace torpor
