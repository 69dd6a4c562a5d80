#include "store/agent_draft.h"

#include <algorithm>

#include "base/hash.h"
#include "store/messages.h"
#include "store/sidecar.h"
#include "torpor/error.h"

namespace torpor {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

/// Ids [first, end), and rows of the last `rows` of them. `contents`: what else the header says.
FileDraft draft_file(const AgentState& agent, int64_t first, int64_t end, int64_t rows,
                     std::span<const StoredMessage> messages, std::span<const KvState> state, FileContents contents) {
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
    for_each_row_piece(agent.layout, {agent.tail.bytes.data(), agent.tail.capacity(), agent.tail.n_tokens - int(rows)},
                       int(rows), [&](std::span<const std::byte> piece) {
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
  PartsPlan plan = plan_parts(numbers, state.sealed, int64_t(state.tokens.size()), !state.state.empty());
  if (state.without_tail) plan.rows = 0;
  return plan;
}

/// Reads the file for what it holds up to position `end`. False when it is damaged.
bool cut_own_file(Env& env, OwnFile& file, const KvLayout& layout, int64_t end) {
  try {
    const KnownLayout known_layout{encode_layout(layout, kFormatVersion), layout.bytes_per_token()};
    const auto handle = std::make_shared<const File>(env.open(file.path, OpenMode::kRead));
    const uint64_t size = file.stat.size;
    const auto header = read_header_bytes(*handle, size);
    const auto parsed =
        std::make_shared<const TorporFile>(parse_part_file(header, size, file.path.string(), known_layout).file);
    if (parsed->checksum != file.ref.name) return false;
    RowBuffer rows;
    OwnContents contents = read_own_file({file.ref, file.path, handle, file.stat, parsed}, layout, &rows);
    if (!contents.problem.empty()) return false;
    cut_contents(contents, layout, end);
    file = std::move(contents.file);
    return true;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    return false;  // it is written anew
  }
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
  file.without_tail = state.without_tail;
  file.whole = state.whole;
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
    draft.history =
        draft_file(state, plan.history_first, *plan.history_end, 0, state.messages.subspan(messages, end - messages),
                   {}, {.kind = "part", .metadata = {{"first", std::to_string(plan.history_first)}}});
    messages = end;
    file.parts.push_back(draft.history->ref);
    parts_size += draft.history->size();
  }
  file.first = plan.first;
  info.cache_size = int64_t(state.tokens.size());
  file.info = std::move(info);
  draft.file = draft_file(state, plan.first, file.info.cache_size, plan.rows, state.messages.subspan(messages),
                          state.state, {.kind = "agent", .metadata = agent_metadata(file)});
  file.info.hash = draft.file.ref.name;
  file.info.tail_bytes = draft.file.size() + parts_size;
  file.info.bytes += file.info.tail_bytes;
  file.info.parts.clear();
  for (const PartRef& part : file.parts) file.info.parts.push_back(part_stem(uid, part.name));
  draft.info = std::move(file.info);
  return draft;
}

std::vector<OwnFile> held_files(Env& env, const OwnFiles& known, const AgentState& agent) {
  std::vector<OwnFile> held;
  if (known.layout != layout_digest(agent.layout, kFormatVersion)) return held;
  const int64_t n_tokens = int64_t(agent.tokens.size());
  int64_t position = 0;
  std::span<const StoredMessage> messages = agent.messages;
  for (size_t i = 0; i < known.files.size(); ++i) {
    OwnFile file = known.files[i];
    if (file.ref.first != position || file.ref.first > n_tokens) break;
    if (i + 1 < known.files.size() && env.stat(file.path) != file.stat) break;
    int64_t end = std::min(file.ref.end(), n_tokens);
    if (const int64_t rows_begin = file.ref.end() - file.ref.rows;
        end > agent.sealed && rows_begin > std::max(agent.sealed, file.ref.first)) {
      end = agent.sealed;  // not all the rows that it would have to have
    }
    const bool cut = end < file.ref.end();
    if (cut && (end <= file.ref.first || !cut_own_file(env, file, agent.layout, end))) break;
    const PartRef& ref = file.ref;
    if (hash_hex(token_bytes(agent.tokens.subspan(size_t(ref.first), size_t(ref.tokens)))) != file.ids) break;
    if (file.n_messages > messages.size() ||
        hash_hex(encode_messages(messages.first(file.n_messages))) != file.messages)
      break;
    if (end > agent.sealed &&
        rows_checksum(agent.layout,
                      {agent.tail.bytes.data(), agent.tail.capacity(), int(end - ref.rows - agent.sealed)},
                      int(ref.rows)) != file.rows) {
      break;
    }
    messages = messages.subspan(file.n_messages);
    position = end;
    held.push_back(std::move(file));
    if (cut) break;
  }
  return held;
}

int64_t bytes_to_write(const AgentDraft& draft) {
  const FileStat longest{.size = UINT64_MAX, .mtime_ns = INT64_MAX, .inode = UINT64_MAX};
  return draft.file.size() + (draft.history ? draft.history->size() : 0) +
         int64_t(encode_sidecar(draft.info, longest).size());
}

std::vector<std::string> claims_of(const AgentDraft& draft) {
  std::vector<std::string> claims = draft.info.segments;
  for (const std::string& state : state_names(draft.info)) claims.push_back(state);
  for (const OwnFile& part : draft.kept) claims.push_back(part_claim(draft.uid, part.ref.name));
  if (draft.history) claims.push_back(part_claim(draft.uid, draft.history->ref.name));
  return claims;
}

}  // namespace torpor
