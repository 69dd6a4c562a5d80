/// Removal: of agents, and of what no agent needs. Nothing is removed that a power cut could bring back a need for: the
/// agent files that decide are flushed first.

#include "store/store_impl.h"
#include "torpor/log.h"

namespace torpor {

std::unordered_set<std::string> Store::Impl::live_segments() {
  std::unordered_set<std::string> live;
  for (const auto& id : agent_ids()) {
    try {
      const OpenedAgent opened = open_agent(id);
      opened.handle.sync();
      live.insert(opened.agent.info.segments.begin(), opened.agent.info.segments.end());
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
  if (env.exists(agent_path(id))) return;
  throw Error(ErrorCode::kNotFound, "There is no agent '" + id + "' in '" + root.string() + "'.")
      .with_agent(id)
      .with_path(root.string());
}

void Store::Impl::remove_agent_file(const std::string& id) {
  if (!env.remove(agent_path(id))) require_agent(id);
  {
    const std::lock_guard lock(births_mutex_);
    births_.erase(id);
  }
  env.sync_directory(root);
}

void Store::Impl::tidy_after_agent(const std::string& id, const FileLock& agent_lock) noexcept {
  try {
    env.remove(sidecar_path(id));
    env.remove(agent_lock.path());
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, "What is left of agent '" + id + "' could not be removed: " + error.what());
  }
}

void Store::Impl::remove_agent(const std::string& id) {
  check_agent_id(id);
  require_agent(id);
  const FileLock agent_lock = lock_agent(id);
  std::vector<std::string> candidates;
  try {
    candidates = open_agent(id).agent.info.segments;
  } catch (const Error& error) {
    // Damaged, and to be deleted all the same; its segments are left to gc.
    log(LogLevel::kInfo, "The segments of agent '" + id + "' are left to garbage collection: " + error.what());
  }
  remove_agent_file(id);
  try {
    if (!candidates.empty()) {
      // Without waiting: a save under way in another process may be about to name one of them.
      if (const auto store_lock =
              env.lock(lock_path(".store"), LockMode::kExclusive, std::chrono::milliseconds(100))) {
        const auto live = live_segments();
        for (const auto& name : candidates) {
          if (!live.contains(name)) env.remove(segment_path(name));
        }
      }
    }
  } catch (const Error& error) {
    // gc makes up for it.
    log(LogLevel::kInfo, "The segments of agent '" + id + "' are left to garbage collection: " + error.what());
  }
  tidy_after_agent(id, agent_lock);
}

GcResult Store::Impl::gc() {
  GcResult result;
  const FileLock lock = lock_store(LockMode::kExclusive);
  auto remove = [&](const std::filesystem::path& path) {
    const auto stat = env.stat(path);
    if (!stat || !env.remove(path)) return;
    ++result.files_removed;
    result.bytes_freed += int64_t(stat->size);
  };
  for (const auto& path : temporary_files()) remove(path);
  const auto live = live_segments();
  for (const auto& segment : stored_segments()) {
    if (!live.contains(segment.name)) remove(segment_path(segment.name));
  }
  for (const auto& name : env.list(root)) {
    // Sidecars whose agent is gone. Other people's .json files hold no sidecar checksum and stay.
    if (!name.ends_with(".json")) continue;
    const std::string id = name.substr(0, name.size() - 5);
    if (!is_agent_id(id) || env.exists(agent_path(id))) continue;
    try {
      if (env.read_file(root / name, kMaxSidecar).find("\"sidecar_checksum\"") != std::string::npos) remove(root / name);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kNotFound) throw;  // removed by whoever deleted the agent just now
    }
  }
  return result;
}

}  // namespace torpor
