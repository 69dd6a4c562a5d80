#include "store/writing.h"

#include <algorithm>
#include <queue>
#include <tuple>

namespace torpor {
namespace {

/// A file that may go, and what has to go before it.
struct Evictable {
  std::filesystem::path path;
  FileStat stat;
  std::string parent;
  int children = 0;
};

std::string parent_of(Env& env, const std::filesystem::path& path, uint64_t size) {
  try {
    const File file = env.open(path, OpenMode::kRead);
    return parse_segment_file(read_header_bytes(file, size), size, path.string()).parent;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    return {};  // damaged: of use to nobody, so in nobody's way
  }
}

/// Files in the order in which they may be removed: what crashes left behind, then unnamed segments, oldest leaf first.
std::vector<Evictable> eviction_order(Store::Impl& store, const std::unordered_set<std::string>& live) {
  std::vector<Evictable> order;
  for (const auto& path : store.temporary_files()) {
    if (const auto stat = store.env.stat(path)) order.push_back({.path = path, .stat = *stat});
  }
  std::unordered_map<std::string, Evictable> unnamed;
  for (const auto& [name, stat] : store.stored_segments()) {
    if (live.contains(name)) continue;
    const auto path = store.segment_path(name);
    unnamed[name] = {.path = path, .stat = stat, .parent = parent_of(store.env, path, stat.size)};
  }
  for (const auto& [name, segment] : unnamed) {
    if (const auto parent = unnamed.find(segment.parent); parent != unnamed.end()) ++parent->second.children;
  }
  using Leaf = std::pair<int64_t, std::string>;  // age first
  std::priority_queue<Leaf, std::vector<Leaf>, std::greater<>> leaves;
  for (const auto& [name, segment] : unnamed) {
    if (segment.children == 0) leaves.emplace(segment.stat.mtime_ns, name);
  }
  for (; !leaves.empty();) {
    const Evictable& leaf = unnamed.at(leaves.top().second);
    leaves.pop();
    order.push_back(leaf);
    const auto parent = unnamed.find(leaf.parent);
    if (parent != unnamed.end() && --parent->second.children == 0) {
      leaves.emplace(parent->second.stat.mtime_ns, parent->first);
    }
  }
  return order;
}

}  // namespace

std::pair<int64_t, std::string> Writing::excess(int64_t needed) {
  std::pair<int64_t, std::string> worst;
  if (limits_.budget > 0) {
    const int64_t used = store_.stored_bytes();
    worst = {used + needed - limits_.budget, "the store holds " + std::to_string(used) + " of the " +
                                                 std::to_string(limits_.budget) + " bytes of its budget"};
  }
  if (limits_.min_free > 0) {
    const auto free = int64_t(std::min<uint64_t>(store_.env.free_space(store_.root), INT64_MAX));
    if (const int64_t over = needed - (free - limits_.min_free); limits_.budget == 0 || over > worst.first) {
      worst = {over, std::to_string(free) + " bytes are free on its file system, of which " +
                         std::to_string(limits_.min_free) + " are to stay free"};
    }
  }
  return worst;
}

void Writing::make_room(const std::string& what, int64_t needed, const std::vector<std::string>& keep) {
  if (!limited() || needed == 0) return;
  auto [over, state] = excess(needed);
  if (over <= 0) return;
  auto refuse = [&](const std::string& why) {
    throw Error(ErrorCode::kResourceExhausted, what + " needs " + std::to_string(needed) + " bytes on the disk, but " + state +
                                                   ". " + why + " Raise the limit, or delete agents.")
        .with_path(store_.root.string())
        .with_field("DiskLimits");
  };
  std::unordered_set<std::string> live;
  try {
    live = store_.live_segments();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kCorruption) throw;
    refuse(error.what());
  }
  live.insert(keep.begin(), keep.end());
  const auto order = eviction_order(store_, live);
  int64_t evictable = 0;
  for (const Evictable& file : order) evictable += int64_t(file.stat.size);
  if (evictable < over) {
    refuse("Segments that no agent names would give " + std::to_string(evictable) + ", so none was removed.");
  }
  for (size_t i = 0; over > 0; over -= int64_t(order[i++].stat.size)) store_.env.remove(order[i].path);
  // A file that someone still maps gives its space back later.
  std::tie(over, state) = excess(needed);
  if (over > 0) refuse("Segments that no agent names were removed, and it is not enough yet.");
}

}  // namespace torpor
