/// Removal: of agents, and of what no agent needs. Nothing is removed that a power cut could bring back a need for: the
/// agent files that decide are flushed first.

#include "base/checked.h"
#include "store/store_impl.h"
#include "torpor/log.h"

namespace torpor {

std::unordered_set<std::string> Store::Impl::live_files() {
  std::unordered_set<std::string> live;
  for (const auto& id : agent_ids()) {
    try {
      const OpenedAgent opened = open_agent(id);
      opened.handle.sync();
      live.insert(opened.agent.info.segments.begin(), opened.agent.info.segments.end());
      for (const PartRef& part : opened.agent.parts) live.insert(part_path(opened.agent.uid, part.name).string());
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kNotFound) continue;  // deleted meanwhile
      if (error.code() == ErrorCode::kIo) throw;
      throw Error(ErrorCode::kCorruption, std::string(error.what()) +
                                              " No segment was removed, for it can't be known which ones this agent "
                                              "needs; restore its file or delete the agent, then try again.");
    }
  }
  env.sync_directory(root);
  return live;
}

void Store::Impl::require_agent(const std::string& id) {
  require_store();
  if (!env.is_file(agent_path(id))) throw no_agent(id);
}

void Store::Impl::remove_agent_file(const std::string& id) {
  // Its parts are nobody else's. Those of one that is damaged are left to gc.
  const std::optional<AgentFile> agent = agent_file(id);
  if (!env.remove(agent_path(id))) require_agent(id);
  forget_files(id);
  env.sync_directory(root);
  if (agent) {
    for (const PartRef& part : agent->parts) remove_quietly(part_path(agent->uid, part.name));
  }
}

void Store::Impl::remove_sidecar(const std::string& id) noexcept {
  try {
    if (is_own_sidecar(id)) env.remove(sidecar_path(id));
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, "The sidecar of agent '" + id + "', which is gone, could not be removed: " + error.what());
  }
}

void Store::Impl::remove_agent(const std::string& id, bool whatever_it_is) {
  check_agent_id(id);
  require_store();
  require_removable(id, whatever_it_is);
  const AgentFileLock agent_lock = locks.agent(id, agent_path(id));
  require_removable(id, whatever_it_is);
  std::vector<std::string> candidates;
  try {
    candidates = open_agent(id).agent.info.segments;
  } catch (const Error& error) {
    // Damaged, and to be deleted all the same; its segments are left to gc.
    log(LogLevel::kInfo, "The segments of agent '" + id + "' are left to garbage collection: " + error.what());
  }
  remove_agent_file(id);
  try {
    // Without waiting long: what is not removed now is left to gc.
    auto sweep = candidates.empty() ? std::nullopt : this->sweep(std::chrono::milliseconds(100));
    if (sweep) {
      const auto live = live_files();
      std::vector<Removable> unneeded;
      for (const auto& name : candidates) {
        const auto stat = segments.find(name);
        if (stat && !live.contains(name)) unneeded.push_back(segments.removable({name, *stat}));
      }
      sweep->remove(unneeded);
    }
  } catch (const Error& error) {
    // gc makes up for it.
    log(LogLevel::kInfo, "The segments of agent '" + id + "' are left to garbage collection: " + error.what());
  }
  remove_sidecar(id);
}

std::optional<Sweep> Store::Impl::sweep(std::chrono::milliseconds timeout) {
  return Sweep::begin(env, locks, [this] { return temporary_files(); }, timeout);
}

GcResult Store::Impl::gc() {
  require_store();
  auto sweep = this->sweep(std::chrono::minutes(1));
  if (!sweep) {
    throw Error(ErrorCode::kBusy, "A save to the store '" + root.string() + "' has been under way for long; try again later.");
  }
  std::vector<Removable> unneeded;
  auto add = [&](const std::filesystem::path& path, const std::string& segment = {}) {
    const auto stat = env.stat(path);
    if (stat && stat->is_file) unneeded.push_back({path, *stat, segment});
  };
  for (const auto& path : sweep->temporary_files()) add(path);
  // Temporary files go whatever the agents say.
  Sweep::Removed removed = sweep->remove(unneeded);
  unneeded.clear();
  const auto live = live_files();
  for (const auto& segment : segments.list()) {
    if (!live.contains(segment.name)) unneeded.push_back(segments.removable(segment));
  }
  for (const auto& part : stored_parts()) {
    const auto path = part_path(part.uid, part.name);
    if (!live.contains(path.string())) unneeded.push_back({path, part.stat, part_claim(part.uid, part.name)});
  }
  for (const auto& name : env.list(root)) {
    // Sidecars whose agent is gone. Other people's .json files stay.
    if (!name.ends_with(".json")) continue;
    const std::string id = name.substr(0, name.size() - 5);
    if (is_agent_id(id) && !env.is_file(agent_path(id)) && is_own_sidecar(id)) add(root / name);
  }
  const Sweep::Removed rest = sweep->remove(unneeded);
  sweep->remove(segments.stale_notes());
  // Locks that killed processes left of agents that never came to be. Whoever holds one makes that agent.
  for (const auto& id : locks.agents()) {
    if (env.is_file(agent_path(id))) continue;
    try {
      (void)lock_agent(id);
    } catch (const Error& error) {
      log(LogLevel::kInfo, "The lock of agent '" + id + "' is left: " + error.what());
    }
  }
  return {removed.files + rest.files, saturating_add(removed.bytes, rest.bytes)};
}

}  // namespace torpor
