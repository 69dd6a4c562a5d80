#include "base/hash.h"
#include "store/segment_writer.h"
#include "store/writing.h"

namespace torpor {

AgentDraft Store::Impl::draft_agent(AgentInfo info, const KvLayout& layout, int tail_tokens, Pieces tail,
                                    std::span<const KvState> state, std::span<const int32_t> tokens) {
  AgentDraft draft;
  std::vector<std::string> checksums;
  if (tail_tokens > 0) {
    checksums = run_checksums(layout, tail_tokens, tail);
    draft.data.assign(tail.begin(), tail.end());
  }
  for (const KvState& tensor : state) {
    draft.data.push_back(tensor.bytes);
    checksums.push_back(hash_hex(tensor.bytes));
  }
  draft.data.push_back(token_bytes(tokens));
  checksums.push_back(hash_hex(draft.data.back()));
  info.cache_size = int64_t(tokens.size());
  draft.header = encode_torpor_header("agent", agent_metadata(info), layout, uint64_t(tail_tokens), state,
                                      tokens.size(), checksums, &info.hash);
  info.tail_bytes = int64_t(draft.header.size());
  for (const auto& piece : draft.data) info.tail_bytes += int64_t(piece.size());
  info.bytes += info.tail_bytes;
  draft.info = std::move(info);
  return draft;
}

int64_t Store::Impl::bytes_to_write(const AgentDraft& draft) {
  const FileStat longest{.size = UINT64_MAX, .mtime_ns = INT64_MAX, .inode = UINT64_MAX};
  return draft.info.tail_bytes + int64_t(encode_sidecar(draft.info, longest).size());
}

void Store::Impl::commit_agent(const AgentDraft& draft, Durability durability, SaveResult& result) {
  const bool durable = durability == Durability::kFull;
  std::vector<std::span<const std::byte>> pieces{as_bytes_of(draft.header)};
  pieces.insert(pieces.end(), draft.data.begin(), draft.data.end());
  const FileStat stat = write_file(agent_path(draft.info.agent_id), pieces, durable);
  count_written(stat);
  {
    const std::lock_guard lock(births_mutex_);
    births_[draft.info.agent_id] = {stat, draft.info.created_at};
  }
  if (durable) env.sync_directory(root);
  result.bytes_written += int64_t(stat.size);
  if (durability != Durability::kNone) result.bytes_written += write_sidecar(draft.info, stat);
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

std::string Store::Impl::date_of_birth(const std::string& id, const std::string& now) {
  const auto stat = env.stat(agent_path(id));
  if (!stat) return now;
  {
    const std::lock_guard lock(births_mutex_);
    if (const auto known = births_.find(id); known != births_.end() && known->second.first == *stat) return known->second.second;
  }
  try {
    return open_agent(id).agent.info.created_at;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    return now;  // a damaged file is being replaced: the agent begins anew
  }
}

SaveResult Store::Impl::save(const std::string& id, const KvSnapshot& snapshot, const BorrowedRows* rows,
                             const std::string& model, const UserMetadata& user, const RecordMetadata& record,
                             Durability durability) {
  check_agent_id(id);
  check_storable(snapshot, rows);
  AgentInfo info;
  info.agent_id = id;
  info.model = model;
  info.identity = snapshot.identity;
  info.user = user;
  info.record = record;
  info.created_at = info.updated_at = format_time(env.now());

  Writing writing(*this);
  info.created_at = date_of_birth(id, info.updated_at);
  SegmentWriter segments(*this, snapshot, rows);
  const int tail_tokens = int(snapshot.tokens.size() % kSegmentTokens);
  Pieces tail{&snapshot.tail.bytes, 1};
  if (rows != nullptr && tail_tokens > 0) tail = rows->runs.back().pieces;
  const auto draft_now = [&] {
    info.segments = segments.names();
    info.bytes = segments.bytes();
    return draft_agent(info, snapshot.layout, tail_tokens, tail, snapshot.state, segments.tokens());
  };
  AgentDraft draft = draft_now();
  const auto make_room = [&] {
    writing.make_room("Saving the agent '" + id + "'", segments.bytes_to_write() + bytes_to_write(draft), draft.info.segments);
  };
  for (make_room(); !writing.claim(segments.names(), segments.found()); make_room()) {
    segments.plan();
    draft = draft_now();
  }
  SaveResult result;
  segments.write_missing(durability == Durability::kFull, writing, result);
  if (result.segments != draft.info.segments) draft = draft_now();
  commit_agent(draft, durability, result);
  return result;
}

}  // namespace torpor
