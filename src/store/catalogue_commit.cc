/// What changes an agent: the commit of a save or a copy, and that of a removal.

#include <algorithm>

#include "base/parallel.h"
#include "store/catalogue.h"
#include "store/sidecar.h"
#include "store/temporary_file.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor {

void Catalogue::find_obsolete(const std::string& uid, const std::vector<std::string>& parts, AgentDraft& draft) const {
  for (const std::string& name : parts) {
    const bool kept = uid == draft.uid && (std::any_of(draft.kept.begin(), draft.kept.end(),
                                                       [&](const OwnFile& part) { return part.ref.name == name; }) ||
                                           (draft.history && draft.history->ref.name == name));
    if (!kept) draft.obsolete.push_back(part_path(uid, name));
  }
}

bool Catalogue::link_part(const OwnFile& from, const std::filesystem::path& to) {
  if (from.path == to) return false;
  // What a crash left there under that name has its content, or is damaged.
  if (const auto there = env_.stat(to)) {
    if (*there == from.stat) return false;
    env_.remove(to);
  }
  if (!env_.link(from.path, to)) {
    const File file = env_.open(from.path, OpenMode::kRead);
    std::vector<std::byte> bytes(size_t(file.stat().size));
    file.read_at(bytes, 0);
    write_file(env_, to, {bytes}, true);
    return true;
  }
  if (env_.stat(to) == from.stat) return true;
  env_.remove(to);
  throw Error(ErrorCode::kNotFound, "'" + from.path.string() + "' was replaced while it was copied; try again.")
      .with_path(from.path.string());
}

void Catalogue::put_parts(AgentDraft& draft, SaveResult& result, std::vector<std::filesystem::path>& put,
                          std::vector<Unflushed>& unflushed) {
  bool changed = false;
  for (OwnFile& part : draft.kept) {
    const auto path = part_path(draft.uid, part.ref.name);
    if (link_part(part, path)) {
      put.push_back(path);
      changed = true;
    }
    part.path = path;
    part.stat = env_.stat(path).value_or(FileStat{});
    if (durable_.contains(part.ref.name, part.stat)) continue;
    unflushed.push_back({path, part.ref.name, part.stat});
    changed = true;
  }
  if (draft.history) {
    FileDraft& history = *draft.history;
    history.digests.path = part_path(draft.uid, history.ref.name);
    put.push_back(history.digests.path);
    history.digests.stat = write_file(env_, history.digests.path, history.pieces(), false);
    unflushed.push_back({history.digests.path, history.ref.name, history.digests.stat});
    written_.add(history.digests.stat);
    result.bytes_written += int64_t(history.digests.stat.size);
    changed = true;
  }
  if (!changed) return;
  unflushed.push_back({.directory = parts_path()});
  if (!parts_durable_) unflushed.push_back({.directory = root_});
}

void Catalogue::flush(const std::vector<Unflushed>& unflushed) {
  parallel_for(unflushed.size(), kFlushThreads, [&](size_t i) {
    const Unflushed& one = unflushed[i];
    if (!one.directory.empty()) return env_.sync_directory(one.directory);
    env_.open(one.path, OpenMode::kRead).sync();
    if (!one.name.empty()) durable_.add(one.name, one.stat);
  });
}

void Catalogue::commit(AgentDraft& draft, Durability durability, SaveResult& result) {
  const bool durable = durability == Durability::kFull;
  const std::string& id = draft.info.agent_id;
  std::vector<std::filesystem::path> put;
  const auto before = known_files(id);
  const bool replaces_durable = before != nullptr && !before->files.empty() &&
                                durable_.contains(before->files.back().ref.name, before->stat);
  env_.make_directory(parts_path());  // before there is one, so that the flush of a first commit is enough for it
  FileStat stat;
  try {
    std::vector<Unflushed> unflushed;
    put_parts(draft, result, put, unflushed);
    TemporaryFile file(env_, root_, draft.file.pieces(), false);
    if (durable) {
      unflushed.push_back({.path = file.path()});
      if (!marker_durable_) unflushed.push_back({.path = marker_path()});
      flush(unflushed);
    }
    file.replace(agent_path(id));
    stat = file.stat();
    written_.add(stat);
  } catch (...) {
    for (const auto& path : put) remove_quietly(path);
    throw;
  }
  if (durable) {
    env_.sync_directory(root_);
    parts_durable_ = marker_durable_ = true;
    durable_.add(draft.file.ref.name, stat);
  }
  // A power cut may bring back an old agent file that was flushed, if this one is not: what it needs is left to gc then.
  if (durable || !replaces_durable) {
    for (const auto& path : draft.obsolete) remove_quietly(path);
  }
  draft.file.digests.path = agent_path(id);
  draft.file.digests.stat = stat;
  OwnFiles files{stat, draft.uid, draft.info.created_at, draft.layout, {}, state_names(draft.info), draft.kept};
  if (draft.history) files.files.push_back(draft.history->digests);
  for (const OwnFile& part : files.files) files.parts.push_back(part.ref.name);
  files.files.push_back(draft.file.digests);
  if (draft.digests_known) {
    know(id, std::move(files));
  } else {
    forget(id);
  }
  result.bytes_written += int64_t(stat.size);
  if (durability != Durability::kNone) result.bytes_written += write_sidecar(draft.info, stat);
}

void Catalogue::install(const AgentFile& agent, std::span<const std::byte> bytes, Durability durability) {
  const bool durable = durability == Durability::kFull;
  const std::string& id = agent.info.agent_id;
  const std::optional<AgentFile> replaced = header(id);
  env_.make_directory(parts_path());
  TemporaryFile file(env_, root_, {bytes}, false);
  if (durable) {
    std::vector<Unflushed> unflushed{{.path = file.path()}, {.path = marker_path()}};
    for (const PartRef& part : agent.parts) {
      const auto path = part_path(agent.uid, part.name);
      if (env_.is_file(path)) unflushed.push_back({.path = path});
    }
    if (!agent.parts.empty()) unflushed.push_back({.directory = parts_path()});
    flush(unflushed);
  }
  file.replace(agent_path(id));
  written_.add(file.stat());
  forget(id);
  if (durable) {
    env_.sync_directory(root_);
    // Else a power cut may bring the old agent file back, and what it needs is left to gc.
    const std::vector<std::string> kept = part_names(agent.parts);
    for (const std::string& name : replaced ? part_names(replaced->parts) : std::vector<std::string>()) {
      const bool is_kept = replaced->uid == agent.uid && std::find(kept.begin(), kept.end(), name) != kept.end();
      if (!is_kept) remove_quietly(part_path(replaced->uid, name));
    }
  }
  AgentInfo info = agent.info;
  add_file_sizes(info, agent);
  if (durability != Durability::kNone) write_sidecar(info, file.stat());
}

int64_t Catalogue::write_sidecar(const AgentInfo& info, const FileStat& agent_file) noexcept {
  try {
    const auto path = sidecar_path(info.agent_id);
    if (path == marker_path()) return 0;
    if (env_.exists(path) && !is_own_sidecar(info.agent_id, /*or_no_json=*/true))
      throw Error(ErrorCode::kIo, "'" + path.string() + "' is no sidecar, and stays.");
    const std::string text = encode_sidecar(info, agent_file);
    // Never fsynced: half of one is found by its checksum and rebuilt.
    written_.add(write_file(env_, path, {as_bytes_of(text)}, false));
    return int64_t(text.size());
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, "The sidecar of agent '" + info.agent_id + "' could not be written: " + error.what());
    return 0;
  }
}

void Catalogue::remove_quietly(const std::filesystem::path& path) noexcept {
  try {
    if (env_.is_own_directory(path.parent_path())) env_.remove(path);
  } catch (const std::exception&) {
    // gc makes up for it.
  }
}

void Catalogue::remove(const std::string& id) {
  // Its parts are nobody else's. Those of one that is damaged are left to gc.
  const std::optional<AgentFile> agent = header(id);
  if (!env_.remove(agent_path(id))) require(id);
  forget(id);
  env_.sync_directory(root_);
  if (agent) {
    for (const PartRef& part : agent->parts) remove_quietly(part_path(agent->uid, part.name));
  }
}

void Catalogue::remove_sidecar(const std::string& id) noexcept {
  try {
    if (is_own_sidecar(id)) env_.remove(sidecar_path(id));
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, "The sidecar of agent '" + id + "', which is gone, could not be removed: " + error.what());
  }
}

}  // namespace torpor
