/// What the store takes of the disk, and what it has written to it.

#include <algorithm>
#include <charconv>

#include "base/checked.h"
#include "store/store_impl.h"
#include "torpor/log.h"

namespace torpor {
namespace {

constexpr int kCounterDigits = 20;  // the counter's width, so that it is overwritten in place by one write

int64_t parse_counter(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value >= 0 ? value : 0;
}

}  // namespace

int64_t stored_bytes(Store::Impl& store, int64_t* reserved) {
  int64_t bytes = 0;
  std::unordered_set<uint64_t> inodes;  // a part has one name for each fork, or is an agent's file too
  const auto is_own = [&](const std::string& name, const std::vector<std::string>& names) {
    const auto has = [&](const std::string& other) { return std::binary_search(names.begin(), names.end(), other); };
    const size_t dot = name.rfind('.');
    const std::string id = name.substr(0, dot), extension = dot == std::string::npos ? "" : name.substr(dot);
    if (is_temporary_name(name)) return true;
    if (!is_agent_id(id)) return false;
    if (extension == ".json") return has(id + ".safetensors");
    return extension == ".safetensors" && (has(id + ".json") || store.agents.holder(id).kind != Catalogue::Holder::kForeign);
  };
  auto add_files = [&](const std::filesystem::path& directory, const std::vector<std::string>& names) {
    std::vector<std::filesystem::path> directories;
    for (const auto& name : names) {
      const auto stat = store.env.stat(directory / name);
      if (!stat) continue;
      if (stat->is_directory) {
        directories.push_back(directory / name);
      } else if (stat->is_file) {
        if (reserved != nullptr) *reserved = saturating_add(*reserved, reserved_bytes(name));
        bytes = saturating_add(bytes, inodes.insert(stat->inode).second ? int64_t(stat->size) : 0);
      }
    }
    return directories;
  };
  auto names = store.env.list(store.root);
  const auto all = names;
  std::erase_if(names, [&](const std::string& name) { return !is_own(name, all); });
  add_files(store.root, names);
  add_files(store.agents.parts_path(), store.env.list_own(store.agents.parts_path()));
  add_files(store.records.directory(), store.records.files());
  add_files(store.teams.directory(), store.teams.files());
  for (const FilePool* pool : {&store.segments, &store.states}) {
    for (const auto& directory : add_files(pool->directory(), store.env.list_own(pool->directory()))) {
      add_files(directory, store.env.list_own(directory));
    }
  }
  return bytes;
}

DiskUsage usage(Store::Impl& store) {
  DiskUsage usage;
  // Sizes of sparse files may be any.
  const auto add = [](int64_t& sum, uint64_t bytes) { sum = saturating_add(sum, int64_t(bytes)); };
  std::unordered_set<std::string> live, live_parts;
  std::unordered_set<uint64_t> counted;  // inodes
  bool all_readable = true;
  for (const auto& agent : store.agents.list(false)) {
    ++usage.agents;
    for (const auto& path : {store.agents.agent_path(agent.agent_id), store.agents.sidecar_path(agent.agent_id)}) {
      const auto stat = store.env.stat(path);
      if (stat && stat->is_file && counted.insert(stat->inode).second) add(usage.agent_bytes, stat->size);
    }
    live.insert(agent.segments.begin(), agent.segments.end());
    for (const std::string& state : state_names(agent)) live.insert(state);
    live_parts.insert(agent.parts.begin(), agent.parts.end());
    all_readable = all_readable && !agent.hash.empty();
  }
  const std::vector<StoredPart> parts = store.agents.stored_parts();
  for (const bool live_ones : {true, false}) {
    for (const auto& [uid, name, stat] : parts) {
      // gc frees nothing while an agent file is damaged: what that one needs is not known.
      if ((!all_readable || live_parts.contains(part_stem(uid, name))) != live_ones || !counted.insert(stat.inode).second) continue;
      add(live_ones ? usage.agent_bytes : usage.orphan_bytes, stat.size);
    }
  }
  const auto add_pool = [&](const FilePool& pool, int64_t& files, int64_t& bytes, int64_t& orphans) {
    for (const auto& file : pool.list()) {
      ++files;
      add(bytes, file.stat.size);
      if (!all_readable || live.contains(file.name)) continue;
      ++orphans;
      add(usage.orphan_bytes, file.stat.size);
    }
  };
  add_pool(store.segments, usage.segments, usage.segment_bytes, usage.orphan_segments);
  add_pool(store.states, usage.states, usage.state_bytes, usage.orphan_states);
  for (const Record& record : store.records.list()) {
    ++usage.records;
    add(usage.record_bytes, uint64_t(record.bytes));
  }
  for (const Removable& record : store.records.expired()) add(usage.orphan_bytes, record.stat.size);
  for (const std::string& id : store.teams.list()) {
    const auto stat = store.env.stat(store.teams.path(id));
    if (!stat || !stat->is_file) continue;
    ++usage.teams;
    add(usage.team_bytes, stat->size);
  }
  for (const auto& files : {store.agents.temporary_files(), store.segments.temporary_files(),
                            store.states.temporary_files(), store.records.temporary_files(),
                            store.teams.temporary_files()}) {
    for (const auto& path : files) {
      const auto stat = store.env.stat(path);
      if (!stat || !stat->is_file) continue;
      ++usage.temporary_files;
      add(usage.temporary_bytes, stat->size);
    }
  }
  usage.total_bytes = stored_bytes(store);
  usage.bytes_written = store.written.total();
  return usage;
}

// ---- the counter

int64_t WrittenBytes::total() const {
  try {
    return parse_counter(env_.read_file(path_, kCounterDigits));
  } catch (const Error&) {
    return 0;
  }
}

void WrittenBytes::record() noexcept {
  if (unrecorded_ == 0) return;
  const std::lock_guard guard(mutex_);
  const int64_t bytes = unrecorded_.exchange(0);
  try {
    if (auto lock = env_.lock(path_, LockMode::kExclusive, std::chrono::seconds(1))) {
      const int64_t before = total();
      const std::string digits = std::to_string(saturating_add(before, bytes));
      lock->file().write_all({as_bytes_of(std::string(kCounterDigits - digits.size(), '0') + digits)});
      return;
    }
  } catch (const std::exception& error) {
    // A counter is no reason for a save to fail.
    log(LogLevel::kWarning, std::string("The store's counter of bytes written could not be changed: ") + error.what());
  }
  unrecorded_ += bytes;
}

}  // namespace torpor
