#include <algorithm>

#include "store/segment_writer.h"
#include "store/writing.h"

namespace torpor {
namespace {

/// Rows of `n` tokens that lie apart, in one piece.
KvTail gather_rows(const KvLayout& layout, int n, Pieces pieces) {
  const size_t size = layout.offset(layout.tensors.size(), n);
  const auto rows = allocate_heap_buffer(size);
  std::byte* to = rows.get();
  for (const auto& piece : pieces) to = std::copy(piece.begin(), piece.end(), to);
  return {n, {rows.get(), size}, rows};
}

}  // namespace

int64_t Store::Impl::bytes_to_write(const AgentDraft& draft) {
  const FileStat longest{.size = UINT64_MAX, .mtime_ns = INT64_MAX, .inode = UINT64_MAX};
  return draft.file.size() + (draft.history ? draft.history->size() : 0) + int64_t(encode_sidecar(draft.info, longest).size());
}

bool Store::Impl::link_part(const OwnFile& from, const std::filesystem::path& to) {
  if (from.path == to) return false;
  // What a crash left there under that name has its content, or is damaged.
  if (const auto there = env.stat(to)) {
    if (*there == from.stat) return false;
    env.remove(to);
  }
  if (!env.link(from.path, to)) {
    const File file = env.open(from.path, OpenMode::kRead);
    std::vector<std::byte> bytes(size_t(file.stat().size));
    file.read_at(bytes, 0);
    write_file(env, to, {bytes}, true);
    return true;
  }
  if (env.stat(to) == from.stat) return true;
  env.remove(to);
  throw Error(ErrorCode::kNotFound, "'" + from.path.string() + "' was replaced while it was copied; try again.").with_path(from.path.string());
}

void Store::Impl::put_parts(AgentDraft& draft, bool durable, SaveResult& result, std::vector<std::filesystem::path>& put) {
  if (durable && !parts_durable_) env.sync_directory(root);
  bool changed = false;
  for (OwnFile& part : draft.kept) {
    const auto path = part_path(draft.uid, part.ref.name);
    if (link_part(part, path)) {
      put.push_back(path);
      changed = true;
    }
    part.path = path;
    part.stat = env.stat(path).value_or(FileStat{});
    if (!durable || durable_files.contains(part.ref.name, part.stat)) continue;
    env.open(path, OpenMode::kRead).sync();
    durable_files.add(part.ref.name, part.stat);
    changed = true;
  }
  if (draft.history) {
    FileDraft& history = *draft.history;
    history.digests.path = part_path(draft.uid, history.ref.name);
    put.push_back(history.digests.path);
    history.digests.stat = write_file(env, history.digests.path, history.pieces(), durable);
    count_written(history.digests.stat);
    if (durable) durable_files.add(history.ref.name, history.digests.stat);
    result.bytes_written += int64_t(history.digests.stat.size);
    changed = true;
  }
  if (changed && durable) env.sync_directory(parts_path());
}

void Store::Impl::commit_agent(AgentDraft& draft, Durability durability, SaveResult& result) {
  const bool durable = durability == Durability::kFull;
  const std::string& id = draft.info.agent_id;
  std::vector<std::filesystem::path> put;
  const auto before = own_files_known(id);
  const bool replaces_durable = before != nullptr && !before->files.empty() &&
                                durable_files.contains(before->files.back().ref.name, before->stat);
  const bool has_parts = !draft.kept.empty() || draft.history;
  env.make_directory(parts_path());  // before there is one, so that the flush of a first commit is enough for it
  FileStat stat;
  try {
    std::optional<TemporaryFile> file;
    const auto write = [&](size_t which) {
      if (which == 0) file.emplace(env, root, draft.file.pieces(), durable);
      if (which == 1) put_parts(draft, durable, result, put);
    };
    // Two at a time: what is flushed together the disk writes at once.
    parallel_for(has_parts ? 2 : 1, durable ? 2 : 1, write);
    file->replace(agent_path(id));
    stat = file->stat();
    count_written(stat);
  } catch (...) {
    for (const auto& path : put) remove_quietly(path);
    throw;
  }
  if (durable) {
    env.sync_directory(root);
    parts_durable_ = true;
    durable_files.add(draft.file.ref.name, stat);
  }
  // A power cut may bring back an old agent file that was flushed, if this one is not: what it needs is left to gc then.
  if (durable || !replaces_durable) {
    for (const auto& path : draft.obsolete) remove_quietly(path);
  }
  draft.file.digests.path = agent_path(id);
  draft.file.digests.stat = stat;
  OwnFiles files{stat, draft.uid, draft.info.created_at, draft.layout, {}, draft.kept};
  if (draft.history) files.files.push_back(draft.history->digests);
  for (const OwnFile& part : files.files) files.parts.push_back(part.ref.name);
  files.files.push_back(draft.file.digests);
  if (draft.digests_known) {
    know_files(id, std::move(files));
  } else {
    forget_files(id);
  }
  result.bytes_written += int64_t(stat.size);
  if (durability != Durability::kNone) result.bytes_written += write_sidecar(draft.info, stat);
}

void Store::Impl::remove_quietly(const std::filesystem::path& path) noexcept {
  try {
    if (env.is_own_directory(path.parent_path())) env.remove(path);
  } catch (const std::exception&) {
    // gc makes up for it.
  }
}

void Store::Impl::check_storable(const KvSnapshot& snapshot, const BorrowedRows* rows) {
  check_layout(snapshot.layout, snapshot.state);
  if (rows != nullptr) {
    snapshot.validate(*rows);
  } else {
    snapshot.validate();
  }
  if (snapshot.layout.tensors.empty() && !snapshot.tokens.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "The KV layout can't be stored: it has tokens and no tensors.");
  }
}

SaveResult Store::Impl::save(const std::string& id, const KvSnapshot& snapshot, const BorrowedRows* rows,
                             const std::string& model, const UserMetadata& user, Durability durability, const AgentNotes& notes) {
  check_agent_id(id);
  check_storable(snapshot, rows);
  AgentInfo info;
  info.agent_id = id;
  info.model = model;
  info.identity = snapshot.identity;
  info.lineage = snapshot.lineage;
  info.conversation = snapshot.conversation;
  info.record = notes.record;
  info.user = user;
  info.created_at = info.updated_at = format_time(env.now());

  require_replaceable(id);
  Writing writing(*this);
  const std::shared_ptr<const OwnFiles> replaced = own_files(id);
  if (replaced != nullptr) info.created_at = replaced->created_at;
  SegmentWriter writer(*this, snapshot, rows);
  AgentState agent{.layout = snapshot.layout, .tokens = writer.tokens(), .tail = snapshot.tail, .state = snapshot.state,
                   .messages = notes.messages};
  agent.sealed = int64_t(snapshot.tokens.size()) / kSegmentTokens * kSegmentTokens;
  if (const int n = int(int64_t(snapshot.tokens.size()) - agent.sealed); rows != nullptr && n > 0) {
    agent.tail = gather_rows(snapshot.layout, n, rows->runs.back().pieces);
  }
  const bool has_uid = replaced != nullptr && !replaced->uid.empty();
  const std::string uid = has_uid ? replaced->uid : env.random_id();
  const std::vector<OwnFile> held = has_uid ? held_files(*replaced, agent) : std::vector<OwnFile>();
  const auto draft_now = [&] {
    info.segments = writer.names();
    info.bytes = writer.bytes();
    AgentDraft draft = draft_agent(info, uid, agent, held);
    if (has_uid) find_obsolete(uid, replaced->parts, draft);
    return draft;
  };
  AgentDraft draft = draft_now();
  const auto make_room = [&] {
    writing.make_room("Saving the agent '" + id + "'", writer.bytes_to_write() + bytes_to_write(draft), draft.info.segments);
  };
  for (make_room(); !writing.claim(claims_of(draft), writer.found()); make_room()) {
    writer.plan();
    draft = draft_now();
  }
  SaveResult result;
  writer.write_missing(durability == Durability::kFull, writing, result);
  if (result.segments != draft.info.segments) draft = draft_now();
  commit_agent(draft, durability, result);
  return result;
}

}  // namespace torpor
