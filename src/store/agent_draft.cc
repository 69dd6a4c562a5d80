#include "store/agent_draft.h"

#include "base/hash.h"
#include "store/messages.h"

namespace torpor {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

/// Ids [first, end), and rows of the last `rows` of them. `contents`: what else the header says.
FileDraft draft_file(const AgentState& agent, int64_t first, int64_t end, int64_t rows, std::span<const StoredMessage> messages,
                     std::span<const KvState> state, FileContents contents) {
  FileDraft draft;
  draft.ref = {"", first, end - first, rows};
  draft.ids = agent.tokens.subspan(size_t(first), size_t(end - first));
  draft.messages = encode_messages(messages);
  draft.state = state;
  OwnFile& digests = draft.digests;
  digests.n_messages = messages.size();
  digests.has_state = !state.empty();
  digests.messages = hash_hex(draft.messages);
  digests.ids = hash_hex(token_bytes(draft.ids));
  if (rows > 0) {
    Hasher hasher;
    for_each_row_piece(agent.layout, {agent.tail.bytes.data(), agent.tail.n_tokens, agent.tail.n_tokens - int(rows)}, int(rows),
                       [&](std::span<const std::byte> piece) {
                         draft.rows.push_back(piece);
                         hasher.update(piece);
                       });
    digests.rows = hasher.hex();
    contents.checksums.push_back(digests.rows);
  }
  for (const KvState& tensor : state) contents.checksums.push_back(hash_hex(tensor.bytes));
  if (!draft.messages.empty()) contents.checksums.push_back(digests.messages);
  contents.checksums.push_back(digests.ids);
  contents.rows = uint64_t(rows);
  contents.state = state;
  contents.message_bytes = draft.messages.size();
  contents.n_tokens = draft.ids.size();
  draft.header = encode_torpor_header(contents, agent.layout, &draft.ref.name);
  digests.ref = draft.ref;
  return draft;
}

PartsPlan plan_of(std::span<const OwnFile> held, const AgentState& state) {
  std::vector<HeldPart> numbers;
  for (const OwnFile& file : held) numbers.push_back({file.ref.first, file.ref.tokens, file.ref.rows, file.has_state});
  return plan_parts(numbers, state.sealed, int64_t(state.tokens.size()), !state.state.empty());
}

}  // namespace

std::vector<std::span<const std::byte>> FileDraft::pieces() const {
  std::vector<std::span<const std::byte>> pieces{bytes_of(header)};
  pieces.insert(pieces.end(), rows.begin(), rows.end());
  for (const KvState& tensor : state) pieces.push_back(tensor.bytes);
  if (!messages.empty()) pieces.push_back(bytes_of(messages));
  pieces.push_back(token_bytes(ids));
  return pieces;
}

int64_t FileDraft::size() const {
  int64_t size = 0;
  for (const auto& piece : pieces()) size += int64_t(piece.size());
  return size;
}

int64_t rows_to_write(std::span<const OwnFile> held, const AgentState& state) { return plan_of(held, state).rows; }

AgentDraft draft_agent(AgentInfo info, const std::string& uid, const AgentState& state, std::vector<OwnFile> held) {
  const PartsPlan plan = plan_of(held, state);
  held.resize(plan.keep);
  AgentDraft draft;
  draft.uid = uid;
  draft.layout = layout_digest(state.layout, kFormatVersion);
  draft.kept = std::move(held);

  AgentFile file;
  file.uid = uid;
  size_t messages = 0;
  int64_t parts_size = 0;
  for (const OwnFile& part : draft.kept) {
    file.parts.push_back(part.ref);
    messages += part.n_messages;
    parts_size += int64_t(part.stat.size);
  }
  if (plan.history_end) {
    size_t end = messages;
    while (end < state.messages.size() && state.messages[end].end <= *plan.history_end) ++end;
    draft.history = draft_file(state, plan.history_first, *plan.history_end, 0, state.messages.subspan(messages, end - messages), {},
                               {.kind = "part", .metadata = {{"first", std::to_string(plan.history_first)}}});
    messages = end;
    file.parts.push_back(draft.history->ref);
    parts_size += draft.history->size();
  }
  file.first = plan.first;
  info.cache_size = int64_t(state.tokens.size());
  file.info = std::move(info);
  draft.file = draft_file(state, plan.first, file.info.cache_size, plan.rows, state.messages.subspan(messages), state.state,
                          {.kind = "agent", .metadata = agent_metadata(file)});
  file.info.hash = draft.file.ref.name;
  file.info.tail_bytes = draft.file.size() + parts_size;
  file.info.bytes += file.info.tail_bytes;
  file.info.parts.clear();
  for (const PartRef& part : file.parts) file.info.parts.push_back(part_stem(uid, part.name));
  draft.info = std::move(file.info);
  return draft;
}

}  // namespace torpor
