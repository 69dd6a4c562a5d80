#include "store/writing.h"

#include <algorithm>
#include <queue>
#include <tuple>

#include "base/checked.h"

namespace torpor {
namespace {

/// A file that may go, and what has to go before it.
struct Evictable {
  Removable file;
  std::string parent;  ///< a segment
  int children = 0;
};

std::string parent_of(const FilePool& pool, const StoredFile& stored) {
  try {
    const File file = pool.open(stored.name);
    const uint64_t size = stored.stat.size;
    const std::string name = file.path().string();
    return parse_torpor_file(read_header_bytes(file, size), size, name).required("parent", name);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    return {};  // damaged: of use to nobody, so in nobody's way
  }
}

/// Files in the order in which they may be removed: what crashes left behind, expired records, then unnamed segments
/// and states, oldest leaf first. Nothing follows a state, so it goes before the segments that lead to it.
std::vector<Removable> eviction_order(Store::Impl& store, const Sweep& sweep, const std::unordered_set<std::string>& live) {
  std::vector<Removable> order;
  for (const auto& path : sweep.temporary_files()) {
    if (const auto stat = store.env.stat(path); stat && stat->is_file) order.push_back({path, *stat, {}});
  }
  for (const Removable& record : store.records.expired()) order.push_back(record);
  for (const StoredPart& part : store.agents.stored_parts()) {
    const Removable removable = store.agents.removable(part);
    if (!live.contains(removable.path.string())) order.push_back(removable);
  }
  std::unordered_map<std::string, Evictable> unnamed;
  for (const FilePool* pool : {&store.segments, &store.states}) {
    for (const StoredFile& file : pool->list()) {
      if (!live.contains(file.name)) unnamed[file.name] = {pool->removable(file), parent_of(*pool, file)};
    }
  }
  for (const auto& [name, evictable] : unnamed) {
    if (const auto parent = unnamed.find(evictable.parent); parent != unnamed.end()) ++parent->second.children;
  }
  using Leaf = std::pair<int64_t, std::string>;  // age first
  std::priority_queue<Leaf, std::vector<Leaf>, std::greater<>> leaves;
  for (const auto& [name, evictable] : unnamed) {
    if (evictable.children == 0) leaves.emplace(evictable.file.stat.mtime_ns, name);
  }
  for (; !leaves.empty();) {
    const std::string name = leaves.top().second;
    const Evictable& leaf = unnamed.at(name);
    leaves.pop();
    order.push_back(leaf.file);
    const auto parent = unnamed.find(leaf.parent);
    if (parent != unnamed.end() && --parent->second.children == 0) {
      leaves.emplace(parent->second.file.stat.mtime_ns, parent->first);
    }
  }
  return order;
}

void check_limits(const DiskLimits& limits) {
  if (limits.budget >= 0 && limits.min_free >= 0) return;
  throw Error(ErrorCode::kInvalidArgument, "A disk limit of " + std::to_string(std::min(limits.budget, limits.min_free)) +
                                               " bytes can't be kept; give one of 0 (no limit) or more.")
      .with_field("DiskLimits");
}

}  // namespace

bool Writing::claim(const std::vector<std::string>& names, const std::vector<StoredFile>& segments,
                    const std::vector<StoredFile>& states) {
  store_.agents.make_store();
  if (!saving_) saving_ = store_.locks.saving();
  if (names.empty()) return true;
  const StoreLock hold = store_.locks.claiming();
  for (const auto& [name, stat] : segments) {
    if (store_.segments.find(name) != stat) return false;
  }
  for (const auto& [name, stat] : states) {
    if (store_.states.find(name) != stat) return false;
  }
  // A sweep that begins later waits for this operation; one that is under way reads what it needs.
  if (!store_.locks.is_swept()) return true;
  std::string lines;
  for (const auto& name : names) lines += name + "\n";
  auto claims = store_.env.lock(store_.locks.claims_path(), LockMode::kExclusive, std::chrono::seconds(10), OpenMode::kAppendLocked);
  if (!claims) {
    throw Error(ErrorCode::kBusy, "The store '" + store_.root.string() + "' is in use by another process; try again later.");
  }
  claims->file().write_all({as_bytes_of(lines)});
  return true;
}

std::pair<int64_t, std::string> Writing::excess(int64_t needed, bool reserved) {
  std::pair<int64_t, std::string> worst;
  int64_t given = 0;
  const int64_t used = stored_bytes(store_, &given);
  if (!reserved) given = 0;
  const int64_t wanted = saturating_add(needed, given);
  if (limits_.budget > 0) {
    worst = {saturating_add(used, wanted) - limits_.budget, "the store holds " + std::to_string(used) + " of the " +
                                                         std::to_string(limits_.budget) + " bytes of its budget"};
  }
  if (limits_.min_free > 0) {
    const auto free = int64_t(std::min<uint64_t>(store_.env.free_space(store_.root), INT64_MAX));
    if (const int64_t over = saturating_add(wanted, limits_.min_free) - free; limits_.budget == 0 || over > worst.first) {
      worst = {over, std::to_string(free) + " bytes are free on its file system, of which " +
                         std::to_string(limits_.min_free) + " are to stay free"};
    }
  }
  return worst;
}

void Writing::make_room(const std::string& what, int64_t needed, const std::vector<std::string>& keep) {
  while (true) {
    try {
      return take_room(what, needed, keep);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kResourceExhausted || !store_.reclaim()) throw;
    }
  }
}

void Writing::take_room(const std::string& what, int64_t needed, const std::vector<std::string>& keep) {
  // Who waits for room is not waited for by whoever makes it.
  reservation_.reset();
  saving_.reset();
  if (!limited() || needed == 0) return;
  store_.agents.make_store();
  const LimitsLock turn = store_.locks.limits();
  if (excess(needed, true).first > 0) evict(what, needed, keep);
  saving_ = store_.locks.saving();
  reservation_.emplace(store_.env, store_.root, needed);
}

void Writing::evict(const std::string& what, int64_t needed, const std::vector<std::string>& keep) {
  auto sweep = begin_sweep(store_, std::chrono::minutes(1));
  if (!sweep) {
    throw Error(ErrorCode::kBusy, what + " waits for room in the store '" + store_.root.string() +
                                      "', and saves to it take long; try again later.");
  }
  // Whoever had been given room is through with it now, so this is the exact sum.
  int64_t over = 0;
  std::string state;
  std::tie(over, state) = excess(needed, false);
  auto refuse = [&](const std::string& why) {
    throw Error(ErrorCode::kResourceExhausted, what + " needs " + std::to_string(needed) + " bytes on the disk, but " + state +
                                                   ". " + why + " Raise the limit, or delete agents.")
        .with_path(store_.root.string())
        .with_field("DiskLimits");
  };
  // What a killed process had been given.
  std::vector<Removable> given;
  for (const auto& path : sweep->temporary_files()) {
    const auto stat = reserved_bytes(path.filename().string()) > 0 ? store_.env.stat(path) : std::nullopt;
    if (stat) given.push_back({path, *stat, {}});
  }
  sweep->remove(given);
  if (over <= 0) return;
  std::unordered_set<std::string> live;
  try {
    live = store_.agents.live_files();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kCorruption) throw;
    refuse(error.what());
  }
  live.insert(keep.begin(), keep.end());
  const auto order = eviction_order(store_, *sweep, live);
  int64_t evictable = 0;
  for (const Removable& file : order) evictable = saturating_add(evictable, int64_t(file.stat.size));
  if (evictable < over) {
    refuse("Segments that no agent names would give " + std::to_string(evictable) + ", so none was removed.");
  }
  sweep->remove(order, over);
  // A file that someone still maps gives its space back later.
  std::tie(over, state) = excess(needed, false);
  if (over > 0) refuse("Segments that no agent names were removed, and it is not enough yet.");
}

// ---- limits

DiskLimits kept_limits(Store::Impl& store) {
  store.agents.require_store();
  const auto kept = store.agents.marker();
  return kept ? kept->limits : DiskLimits{};
}

void keep_limits(Store::Impl& store, const DiskLimits& limits) {
  check_limits(limits);
  store.agents.require_store();
  const LimitsLock turn = store.locks.limits();
  store.agents.make_store();
  const std::string text = encode_marker(limits, store.agents.marker().value_or(Marker{}));
  write_file(store.env, store.agents.marker_path(), {as_bytes_of(text)}, true);
  store.env.sync_directory(store.root);
}

void Store::Impl::set_disk_limits(const DiskLimits& limits) {
  check_limits(limits);
  const MutexLock lock(limits_mutex_);
  limits_ = limits;
}

void Store::Impl::set_reclaimer(std::function<bool()> reclaim) {
  const MutexLock lock(limits_mutex_);
  reclaim_ = std::move(reclaim);
}

bool Store::Impl::reclaim() {
  std::function<bool()> reclaim;
  {
    const MutexLock lock(limits_mutex_);
    reclaim = reclaim_;
  }
  return reclaim && reclaim();
}

DiskLimits disk_limits(Store::Impl& store) {
  const auto kept = store.agents.marker();
  DiskLimits limits = kept ? kept->limits : DiskLimits{};
  const DiskLimits own = store.own_limits();
  if (own.budget > 0) limits.budget = own.budget;
  if (own.min_free > 0) limits.min_free = own.min_free;
  return limits;
}

}  // namespace torpor
