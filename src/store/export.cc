/// Export and import: one file that holds an agent whole, its layers in one piece as other programs expect them.

#include "store/export.h"

#include "base/hash.h"
#include "store/messages.h"
#include "store/sidecar.h"
#include "store/state_file.h"
#include "store/store_impl.h"
#include "store/temporary_file.h"

namespace torpor {
namespace {

std::filesystem::path json_beside(const std::filesystem::path& path) {
  auto beside = path;
  return beside.replace_extension(".json");
}

}  // namespace

std::filesystem::path export_directory(Env& env, const std::filesystem::path& root, const std::filesystem::path& path) {
  if (!path.has_filename())
    throw Error(ErrorCode::kInvalidArgument, "'" + path.string() + "' can't be an export's name.");
  const auto directory = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const auto target = env.stat(directory);
  if (!target || !target->is_directory) {
    throw Error(ErrorCode::kIo, "There is no directory '" + directory.string() + "' to export to; make it first.");
  }
  if (target->is_same_file(env.stat(root).value_or(FileStat{}))) {
    throw Error(ErrorCode::kInvalidArgument, "An export can't go into the store itself; choose another directory.");
  }
  remove_abandoned(env, directory);
  return directory;
}

void export_agent(Store::Impl& store, const std::string& id, const std::filesystem::path& path, const std::string& as) {
  const auto directory = export_directory(store.env, store.root, path);
  if (json_beside(path) == path) {
    throw Error(ErrorCode::kInvalidArgument,
                "'" + path.string() + "' can't be an export's name; end it in .safetensors.");
  }
  const LoadedAgent loaded = load(store, id, {.map_rows = true});
  const KvSnapshot& snapshot = loaded.snapshot;
  const auto n_tokens = int64_t(snapshot.tokens.size());
  if (n_tokens < int64_t(loaded.tokens.size())) {
    throw Error(ErrorCode::kInvalidArgument, "The agent '" + id + "' can go on from " + std::to_string(n_tokens) +
                                                 " of its " + std::to_string(loaded.tokens.size()) +
                                                 " tokens only, so it can't be exported; let it take a turn first.")
        .with_agent(id);
  }
  std::vector<KvState> states = snapshot.state;
  if (!snapshot.states.empty()) states = state_tensors(snapshot.state_layout, *snapshot.states.back());

  std::vector<std::string> checksums;
  std::vector<std::span<const std::byte>> pieces(1);
  size_t longest = 0;
  for (const KvTensorSpec& tensor : snapshot.layout.tensors) {
    longest = std::max(longest, tensor.apart ? tensor.bytes_per_token() * kSegmentTokens : 0);
  }
  const std::vector<std::byte> zeros(longest);
  for (size_t t = 0; t < snapshot.layout.tensors.size() && n_tokens > 0; ++t) {
    Hasher hasher;
    for_each_piece(snapshot.layout, n_tokens, t, 0, n_tokens, [&](const Piece& piece) {
      const bool has = !snapshot.layout.tensors[t].apart || piece.run >= snapshot.sealed.size() ||
                       snapshot.has_window_rows(piece.run);
      // What no window sees of rows that are kept apart is not there.
      pieces.push_back(has ? snapshot.run_bytes(piece.run).subspan(piece.offset, piece.size)
                           : std::span<const std::byte>(zeros).first(piece.size));
      hasher.update(pieces.back());
    });
    checksums.push_back(hasher.hex());
  }
  for (const KvState& tensor : states) {
    pieces.push_back(tensor.bytes);
    checksums.push_back(hash_hex(tensor.bytes));
  }
  const std::string messages = encode_messages(loaded.messages);
  if (!messages.empty()) {
    pieces.push_back(as_bytes_of(messages));
    checksums.push_back(hash_hex(messages));
  }
  pieces.push_back(token_bytes(snapshot.tokens));
  checksums.push_back(hash_hex(pieces.back()));
  AgentFile exported;
  exported.info = loaded.info;
  AgentInfo& info = exported.info;
  info.segments.clear();
  info.state_bytes = 0;
  if (info.states) info.states->clear();
  if (snapshot.layout.has_apart()) info.states.reset();  // of windows the file has what the last token's see
  if (!snapshot.states.empty()) info.states = {{n_tokens, ""}};  // the last one alone: it is in the file
  info.lineage.salt.clear();  // whose it was is nobody else's business
  if (!as.empty()) info.agent_id = as;
  const std::string header = encode_torpor_header({.kind = "export",
                                                   .metadata = agent_metadata(exported),
                                                   .rows = snapshot.tokens.size(),
                                                   .state = states,
                                                   .message_bytes = messages.size(),
                                                   .n_tokens = snapshot.tokens.size(),
                                                   .checksums = std::move(checksums)},
                                                  snapshot.layout, &info.hash);
  pieces.front() = as_bytes_of(header);
  const FileStat stat = write_file(store.env, directory / path.filename(), pieces, true);
  info.bytes = info.tail_bytes = int64_t(stat.size);
  const std::string json = encode_sidecar(info, stat);
  write_file(store.env, directory / json_beside(path.filename()), {as_bytes_of(json)}, true);
  store.env.sync_directory(directory);
}

SaveResult import_agent(Store::Impl& store, const std::filesystem::path& path, const std::string& id) {
  check_agent_id(id);
  const AgentFileLock agent_lock = lock_agent(store, id);
  if (store.agents.contains(id)) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + id + "' already; choose another id.")
        .with_agent(id)
        .with_field(kAgentTaken);
  }
  const File handle = store.env.open(path, OpenMode::kRead);
  const FileStat stat = handle.stat();
  const auto prefix = read_header_bytes(handle, stat.size);
  const SafetensorsHeader plain = parse_safetensors_header(prefix, stat.size, path.string());
  if (plain.metadata_value("checksum") == nullptr || plain.metadata_value("kind") == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, "'" + path.string() +
                                                 "' is a safetensors file, but neither an export of Torpor's nor a "
                                                 "prompt-cache file of mlx-lm.");
  }
  const AgentFile agent = parse_export_file(prefix, stat.size, path.string());
  const TorporFile& file = agent.file;

  KvSnapshot snapshot;
  snapshot.identity = agent.info.identity;
  snapshot.conversation = agent.info.conversation;
  // It begins anew here, with names of its own.
  snapshot.lineage.ranges = agent.info.lineage.ranges;
  snapshot.layout = file.layout;
  snapshot.tokens = read_tokens(handle, file);
  const std::vector<std::shared_ptr<std::byte>> buffers = allocate_runs(snapshot);
  uint64_t position = file.header.data_start;
  for (size_t t = 0; t < file.layout.tensors.size() && file.rows > 0; ++t) {
    Hasher hasher;
    for_each_piece(file.layout, int64_t(file.rows), t, 0, int64_t(file.rows), [&](const Piece& piece) {
      const std::span<std::byte> bytes(buffers[piece.run].get() + piece.offset, piece.size);
      handle.read_at(bytes, position);
      hasher.update(bytes);
      position += piece.size;
    });
    if (hasher.hex() != file.checksums[t]) {
      throw Error(ErrorCode::kCorruption, "'" + path.string() + "' is damaged: the data of tensor '" +
                                              file.header.tensors[t].name + "' does not match its checksum.");
    }
  }
  if (agent.info.states && !agent.info.states->empty()) {
    snapshot.state_layout = state_layout_of(file, path.string());
    const size_t size = snapshot.state_layout.bytes();
    const auto buffer = allocate_heap_buffer(size);
    read_state_bytes(handle, file, {buffer.get(), size});
    snapshot.states = {std::make_shared<const StateCheckpoint>(
        int64_t(file.n_tokens), std::span<const std::byte>(buffer.get(), size), buffer)};
  } else {
    snapshot.state = read_state(handle, file);
  }
  AgentNotes notes{agent.old_messages, agent.info.record};
  if (file.has_messages) notes.messages = decode_messages(read_messages(handle, file), path.string());
  return save(store, id, snapshot, nullptr, agent.info.model, agent.info.user, Durability::kFull, notes);
}

}  // namespace torpor
