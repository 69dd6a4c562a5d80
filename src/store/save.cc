#include <algorithm>

#include "store/segment_writer.h"
#include "store/state_writer.h"
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

void check_storable(const KvSnapshot& snapshot, const BorrowedRows* rows) {
  check_layout(snapshot.layout, snapshot.state);
  check_state_layout(snapshot.state_layout, snapshot.layout);
  if (!snapshot.state.empty() && !snapshot.states.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "The snapshot can't be stored: it has state of two kinds.");
  }
  if (rows != nullptr && snapshot.layout.has_apart()) {
    throw Error(ErrorCode::kInvalidArgument, "The snapshot can't be stored: borrowed rows are kept in segments alone.");
  }
  if (rows != nullptr) {
    snapshot.validate(*rows);
  } else {
    snapshot.validate();
  }
  if (snapshot.layout.tensors.empty() && !snapshot.tokens.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "The KV layout can't be stored: it has tokens and no tensors.");
  }
}

namespace {

/// `states_before` receives the names of the states that the agent had.
SaveResult write_agent(Store::Impl& store, const std::string& id, const KvSnapshot& snapshot, const BorrowedRows* rows,
                       const std::string& model, const UserMetadata& user, Durability durability,
                       const AgentNotes& notes, std::vector<std::string>& states_before) {
  AgentInfo info;
  info.agent_id = id;
  info.model = model;
  info.identity = snapshot.identity;
  info.lineage = snapshot.lineage;
  info.window = window_apart(snapshot.layout);
  info.conversation = snapshot.conversation;
  info.record = notes.record;
  info.user = user;
  info.created_at = info.updated_at = format_time(store.env.now());

  store.agents.require_replaceable(id);
  Writing writing(store);
  const std::shared_ptr<const OwnFiles> replaced = store.agents.files(id);
  if (replaced != nullptr) {
    info.created_at = replaced->created_at;
    states_before = replaced->states;
  }
  SegmentWriter writer(store, snapshot, rows);
  StateWriter states(store, snapshot, notes.states);
  states.plan(writer.tokens(), writer.names());
  AgentState agent{.layout = snapshot.layout, .tokens = writer.tokens(), .tail = snapshot.tail, .state = snapshot.state,
                   .messages = notes.messages};
  agent.sealed = int64_t(snapshot.tokens.size()) / kSegmentTokens * kSegmentTokens;
  if (const int n = int(int64_t(snapshot.tokens.size()) - agent.sealed); rows != nullptr && n > 0) {
    agent.tail = gather_rows(snapshot.layout, n, rows->runs.back().pieces);
  }
  const bool has_uid = replaced != nullptr && !replaced->uid.empty();
  const std::string uid = has_uid ? replaced->uid : store.env.random_id();
  const std::vector<OwnFile> held = has_uid ? held_files(store.env, *replaced, agent) : std::vector<OwnFile>();
  const auto draft_now = [&] {
    info.segments = writer.names();
    info.states = states.refs();
    info.state_bytes = states.bytes();
    info.bytes = writer.bytes() + info.state_bytes;
    AgentDraft draft = draft_agent(info, uid, agent, held);
    if (has_uid) store.agents.find_obsolete(uid, replaced->parts, draft);
    return draft;
  };
  AgentDraft draft = draft_now();
  const auto make_room = [&] {
    writing.make_room("Saving the agent '" + id + "'",
                      writer.bytes_to_write() + states.bytes_to_write() + bytes_to_write(draft), claims_of(draft));
  };
  for (make_room(); !writing.claim(claims_of(draft), writer.found(), states.found()); make_room()) {
    writer.plan();
    states.plan(writer.tokens(), writer.names());
    draft = draft_now();
  }
  SaveResult result;
  const bool durable = durability == Durability::kFull;
  writer.write_missing(durable, writing, result);
  if (result.segments != draft.info.segments) {
    do states.plan(writer.tokens(), writer.names());
    while (!writing.claim(claims_of(draft = draft_now()), {}, states.found()));
  }
  states.write_missing(durable, writing, result);
  if (states.refs() != draft.info.states) draft = draft_now();
  store.agents.commit(draft, durability, result);
  return result;
}

}  // namespace

SaveResult save(Store::Impl& store, const std::string& id, const KvSnapshot& snapshot, const BorrowedRows* rows,
                const std::string& model, const UserMetadata& user, Durability durability, const AgentNotes& notes) {
  check_agent_id(id);
  check_storable(snapshot, rows);
  std::vector<std::string> states_before;
  KvSnapshot with_windows;
  if (snapshot.layout.has_apart()) {
    with_windows = snapshot;
    add_windows(store, with_windows, notes.states);
  }
  SaveResult result = write_agent(store, id, snapshot.layout.has_apart() ? with_windows : snapshot, rows, model, user,
                                  durability, notes, states_before);
  drop_states(store, states_before, result.states);
  return result;
}

}  // namespace torpor
