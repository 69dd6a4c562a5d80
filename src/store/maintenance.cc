/// Removal: of agents, and of what no agent needs. Nothing is removed that a power cut could bring back a need for: the
/// agent files that decide are flushed first.

#include <algorithm>
#include <utility>

#include "base/checked.h"
#include "store/store_impl.h"
#include "torpor/log.h"

namespace torpor {

namespace {

/// Those of the segments and states that no agent names. False when others save or remove just now: nobody waits long.
bool remove_unneeded(Store::Impl& store, const std::vector<std::string>& segments,
                     const std::vector<std::string>& states) {
  if (segments.empty() && states.empty()) return true;
  auto sweep = begin_sweep(store, std::chrono::milliseconds(100));
  if (!sweep) return false;
  const auto live = store.agents.live_files();
  std::vector<Removable> unneeded;
  const auto add = [&](const FilePool& pool, const std::vector<std::string>& names) {
    for (const auto& name : names) {
      const auto stat = pool.find(name);
      if (stat && !live.contains(name)) unneeded.push_back(pool.removable({name, *stat}));
    }
  };
  add(store.states, states);
  add(store.segments, segments);
  sweep->remove(unneeded);
  return true;
}

/// The files of all names in `dropped`. Those stay there that others are in the way of.
void remove_dropped(Store::Impl& store) {
  std::vector<std::string> names;
  {
    const MutexLock lock(store.dropped_mutex);
    names = std::exchange(store.dropped, {});
  }
  if (remove_unneeded(store, {}, names)) return;
  const MutexLock lock(store.dropped_mutex);
  store.dropped.insert(store.dropped.end(), names.begin(), names.end());
}

template <typename Act>
void or_leave_to_gc(Act act) {
  try {
    act();
  } catch (const std::exception& error) {
    log(LogLevel::kInfo, std::string("States of no agent are left to garbage collection: ") + error.what());
  }
}

}  // namespace

Store::~Store() {
  or_leave_to_gc([this] { remove_dropped(*impl_); });
}

bool remove_agent(Store::Impl& store, const std::string& id, bool whatever_it_is, const std::string* hash) {
  check_agent_id(id);
  store.agents.require_store();
  store.agents.require_removable(id, whatever_it_is);
  const AgentFileLock agent_lock = store.locks.agent(id, store.agents.agent_path(id));
  store.agents.require_removable(id, whatever_it_is);
  std::vector<std::string> segments, states;
  try {
    const AgentInfo info = store.agents.open(id).agent.info;
    if (hash != nullptr && info.hash != *hash) return false;
    segments = info.segments;
    states = state_names(info);
  } catch (const Error& error) {
    if (hash != nullptr) throw;
    // Damaged, and to be deleted all the same; its segments are left to gc.
    log(LogLevel::kInfo, "The segments of agent '" + id + "' are left to garbage collection: " + error.what());
  }
  store.agents.remove(id);
  try {
    remove_unneeded(store, segments, states);
  } catch (const Error& error) {
    // gc makes up for it.
    log(LogLevel::kInfo, "The segments of agent '" + id + "' are left to garbage collection: " + error.what());
  }
  store.agents.remove_sidecar(id);
  return true;
}

void drop_states(Store::Impl& store, const std::vector<std::string>& before, const std::vector<StateRef>& now) {
  // A sweep looks at each agent: at about eight for a state that goes.
  constexpr size_t kLeast = 4, kAgentsOfOne = 8;
  size_t held = 0, dropped = 0;
  {
    const MutexLock lock(store.dropped_mutex);
    held = store.dropped.size();
    for (const std::string& name : before) {
      if (std::ranges::find(now, name, &StateRef::file) == now.end()) store.dropped.push_back(name);
    }
    dropped = store.dropped.size();
  }
  if (dropped == held || dropped < kLeast) return;
  or_leave_to_gc([&] {
    const size_t at_once = std::max(kLeast, store.agents.ids().size() / kAgentsOfOne);
    // When others were in the way, it is tried again after as many more.
    if (dropped / at_once > held / at_once) remove_dropped(store);
  });
}

std::optional<Sweep> begin_sweep(Store::Impl& store, std::chrono::milliseconds timeout) {
  const auto temporary_files = [&store] {
    auto found = store.agents.temporary_files();
    for (const auto& others : {store.segments.temporary_files(), store.states.temporary_files(),
                               store.records.temporary_files(), store.teams.temporary_files()}) {
      found.insert(found.end(), others.begin(), others.end());
    }
    return found;
  };
  return Sweep::begin(store.env, store.locks, temporary_files, timeout);
}

GcResult gc(Store::Impl& store, bool dry_run) {
  store.agents.require_store();
  auto sweep = begin_sweep(store, std::chrono::minutes(1));
  if (!sweep) {
    throw Error(ErrorCode::kBusy, "A save to the store '" + store.root.string() + "' has been under way for long; try again later.");
  }
  std::vector<Removable> unneeded;
  auto add = [&](const std::filesystem::path& path, const std::string& segment = {}) {
    const auto stat = store.env.stat(path);
    if (stat && stat->is_file) unneeded.push_back({path, *stat, segment});
  };
  const auto remove = [&](const std::vector<Removable>& files) {
    if (!dry_run) return sweep->remove(files);
    Sweep::Removed wanted;
    for (const Removable& file : files) {
      ++wanted.files;
      wanted.bytes = saturating_add(wanted.bytes, int64_t(file.stat.size));
    }
    return wanted;
  };
  for (const auto& path : sweep->temporary_files()) add(path);
  for (const Removable& record : store.records.expired()) unneeded.push_back(record);
  // These go whatever the agents say.
  Sweep::Removed removed = remove(unneeded);
  unneeded.clear();
  const auto live = store.agents.live_files();
  for (const FilePool* pool : {&store.segments, &store.states}) {
    for (const auto& file : pool->list()) {
      if (!live.contains(file.name)) unneeded.push_back(pool->removable(file));
    }
  }
  for (const auto& part : store.agents.stored_parts()) {
    const Removable removable = store.agents.removable(part);
    if (!live.contains(removable.path.string())) unneeded.push_back(removable);
  }
  for (const Removable& sidecar : store.agents.stray_sidecars()) unneeded.push_back(sidecar);
  const Sweep::Removed rest = remove(unneeded);
  const GcResult result{removed.files + rest.files, saturating_add(removed.bytes, rest.bytes)};
  if (dry_run) return result;
  sweep->remove(store.segments.stale_notes());
  // Locks that killed processes left of agents that never came to be. Whoever holds one makes that agent.
  for (const auto& id : store.locks.agents()) {
    if (store.agents.contains(id)) continue;
    try {
      (void)lock_agent(store, id);
    } catch (const Error& error) {
      log(LogLevel::kInfo, "The lock of agent '" + id + "' is left: " + error.what());
    }
  }
  return result;
}

}  // namespace torpor
