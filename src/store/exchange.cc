/// Export and import: one file that holds an agent whole, its layers in one piece as other programs expect them.


#include "base/hash.h"
#include "store/store_impl.h"

namespace torpor {
namespace {

/// Visits a layer tensor's bytes in the order of an export, [head][token][dim]: one piece for each head and run.
/// visit(run index, offset in that run, size)
template <typename Visit>
void for_each_piece(const KvLayout& layout, const std::vector<int>& run_tokens, size_t tensor, Visit visit) {
  const auto& spec = layout.tensors[tensor];
  const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
  for (int head = 0; head < spec.n_kv_heads; ++head) {
    for (size_t run = 0; run < run_tokens.size(); ++run) {
      const size_t size = row * size_t(run_tokens[run]);
      visit(run, layout.offset(tensor, run_tokens[run]) + size_t(head) * size, size);
    }
  }
}

std::filesystem::path json_beside(const std::filesystem::path& path) {
  auto beside = path;
  return beside.replace_extension(".json");
}

}  // namespace

void Store::Impl::export_agent(const std::string& id, const std::filesystem::path& path) {
  const auto directory = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  if (!path.has_filename() || json_beside(path) == path) {
    throw Error(ErrorCode::kInvalidArgument, "'" + path.string() + "' can't be an export's name; end it in .safetensors.");
  }
  const auto target = env.stat(directory);
  if (!target || !target->is_directory) {
    throw Error(ErrorCode::kIo, "There is no directory '" + directory.string() + "' to export to; make it first.");
  }
  if (target->inode == env.stat(root).value_or(FileStat{}).inode) {
    throw Error(ErrorCode::kInvalidArgument, "An export can't go into the store itself; choose another directory.");
  }
  const LoadedAgent loaded = load(id, {});
  const KvSnapshot& snapshot = loaded.snapshot;
  std::vector<int> run_tokens;
  for (const auto& run : snapshot.runs) run_tokens.push_back(run.n_tokens);

  std::vector<std::string> checksums;
  std::vector<std::span<const std::byte>> pieces(1);
  for (size_t t = 0; t < snapshot.layout.tensors.size() && !snapshot.runs.empty(); ++t) {
    Hasher hasher;
    for_each_piece(snapshot.layout, run_tokens, t, [&](size_t run, size_t offset, size_t size) {
      pieces.push_back(snapshot.runs[run].bytes.subspan(offset, size));
      hasher.update(pieces.back());
    });
    checksums.push_back(hasher.hex());
  }
  pieces.push_back(token_bytes(snapshot.tokens));
  checksums.push_back(hash_hex(pieces.back()));
  AgentInfo info = loaded.info;
  info.segments.clear();
  const std::string header = encode_torpor_header("export", agent_metadata(info), snapshot.layout, snapshot.tokens.size(),
                                                  snapshot.tokens.size(), checksums, &info.hash);
  pieces.front() = as_bytes_of(header);
  const FileStat stat = write_file(directory / path.filename(), pieces, true);
  info.bytes = info.tail_bytes = int64_t(stat.size);
  const std::string json = encode_sidecar(info, stat);
  write_file(directory / json_beside(path.filename()), {as_bytes_of(json)}, true);
  env.sync_directory(directory);
}

SaveResult Store::Impl::import_agent(const std::filesystem::path& path, const std::string& id) {
  check_agent_id(id);
  const FileLock agent_lock = lock_agent(id);
  if (env.exists(agent_path(id))) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + id + "' already; choose another id.");
  }
  const File handle = env.open(path, OpenMode::kRead);
  const FileStat stat = handle.stat();
  const auto prefix = read_header_bytes(handle, stat.size);
  const SafetensorsHeader plain = parse_safetensors_header(prefix, stat.size, path.string());
  if (plain.metadata_value("checksum") == nullptr || plain.metadata_value("kind") == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, "'" + path.string() + "' is a safetensors file, but no export of Torpor's.");
  }
  const AgentFile agent = parse_export_file(prefix, stat.size, path.string());
  const TorporFile& file = agent.file;

  KvSnapshot snapshot;
  snapshot.identity = agent.info.identity;
  snapshot.layout = file.layout;
  snapshot.tokens = read_tokens(handle, file);
  std::vector<int> run_tokens;
  std::vector<std::shared_ptr<std::byte>> buffers;
  for (uint64_t done = 0; done < file.rows; done += uint64_t(run_tokens.back())) {
    run_tokens.push_back(int(std::min<uint64_t>(kSegmentTokens, file.rows - done)));
    const size_t size = file.layout.offset(file.layout.tensors.size(), run_tokens.back());
    buffers.push_back(allocate_heap_buffer(size));
    snapshot.runs.push_back({run_tokens.back(), {buffers.back().get(), size}, buffers.back()});
  }
  uint64_t position = file.header.data_start;
  for (size_t t = 0; t < file.layout.tensors.size() && file.rows > 0; ++t) {
    Hasher hasher;
    for_each_piece(file.layout, run_tokens, t, [&](size_t run, size_t offset, size_t size) {
      const std::span<std::byte> piece(buffers[run].get() + offset, size);
      handle.read_at(piece, position);
      hasher.update(piece);
      position += size;
    });
    if (hasher.hex() != file.checksums[t]) {
      throw Error(ErrorCode::kCorruption, "'" + path.string() + "' is damaged: the data of tensor '" +
                                              file.header.tensors[t].name + "' does not match its checksum.");
    }
  }
  return save(id, snapshot, agent.info.model, agent.info.user, Durability::kFull);
}

}  // namespace torpor
