#include "store/whole_files.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "base/hash.h"
#include "store/segment.h"
#include "store/state_file.h"
#include "store/writing.h"

namespace torpor {
namespace {

constexpr size_t kNameAt = 37, kNameDigits = 32;
constexpr std::string_view kSegments = "segments/", kStates = "states/", kParts = "parts/";

/// A path taken apart.
struct FilePath {
  enum Kind { kNone, kSegment, kState, kPart } kind = kNone;
  std::string name;  ///< of a part the checksum
  std::string uid;   ///< of a part
};

FilePath parse_path(const std::string& path) {
  const auto pooled = [&](std::string_view prefix) {
    std::string name = path.substr(std::min(path.size(), prefix.size() + 3));
    const bool is_one = path.starts_with(prefix) && is_hex_digest(name) &&
                        path == std::string(prefix) + name.substr(0, 2) + "/" + name;
    return is_one ? name : std::string();
  };
  if (std::string name = pooled(kSegments); !name.empty()) return {FilePath::kSegment, std::move(name), {}};
  if (std::string name = pooled(kStates); !name.empty()) return {FilePath::kState, std::move(name), {}};
  if (path.starts_with(kParts) && path.size() == kParts.size() + 2 * kNameDigits + 1) {
    std::string uid = path.substr(kParts.size(), kNameDigits), name = path.substr(kParts.size() + kNameDigits + 1);
    if (is_hex_digest(uid) && is_hex_digest(name) && path == std::string(kParts) + part_stem(uid, name)) {
      return {FilePath::kPart, std::move(name), std::move(uid)};
    }
  }
  return {};
}

std::string pool_path(std::string_view prefix, const std::string& name) {
  return std::string(prefix) + name.substr(0, 2) + "/" + name;
}

std::span<const std::byte> header_of(std::span<const std::byte> bytes, const std::string& name) {
  return bytes.first(size_t(safetensors_data_start(bytes, bytes.size(), name)));
}

/// Every tensor's checksum.
void check_tensors(std::span<const std::byte> bytes, const TorporFile& file, const std::string& name) {
  for (size_t i = 0; i < file.header.tensors.size(); ++i) {
    const SafetensorsTensor& tensor = file.header.tensors[i];
    const auto data = bytes.subspan(size_t(file.header.data_start + tensor.begin), size_t(tensor.size()));
    if (hash_hex(data) != file.checksums[i]) {
      corrupt(name, "the data of tensor '" + tensor.name + "' does not match its checksum");
    }
  }
}

std::vector<int32_t> tokens_of(std::span<const std::byte> bytes, const TorporFile& file) {
  std::vector<int32_t> tokens(size_t(file.n_tokens));
  const auto data = bytes.subspan(size_t(file.header.data_start + file.tokens_tensor().begin),
                                  size_t(file.tokens_tensor().size()));
  std::copy(data.begin(), data.end(), std::as_writable_bytes(std::span(tokens)).begin());
  return tokens;
}

/// What is known of a file once it was checked.
struct Checked {
  std::string checksum;
  std::string plain;  ///< of a segment's variant the plain name
};

Checked check_file(const FilePath& path, std::span<const std::byte> bytes, const std::string& name) {
  const auto header = header_of(bytes, name);
  const auto require_name = [&](const std::string& named) {
    if (named != path.name) corrupt(name, "its name is not that of its contents");
  };
  switch (path.kind) {
    case FilePath::kSegment: {
      const SegmentFile segment = parse_segment_file(header, bytes.size(), name);
      check_tensors(bytes, segment.file, name);
      const std::vector<int32_t> tokens = tokens_of(bytes, segment.file);
      const SegmentPlace place{segment.file.version < kFormatVersion, segment.lineage,
                               layout_digest(segment.file.layout, segment.file.version), segment.parent, tokens};
      require_name(segment_name(place, segment.variant));
      return {segment.file.checksum, segment.variant.empty() ? std::string() : segment_name(place, "")};
    }
    case FilePath::kState: {
      const StateFile state = parse_state_file(header, bytes.size(), name);
      check_tensors(bytes, state.file, name);
      const std::vector<int32_t> tokens = tokens_of(bytes, state.file);
      require_name(state_name({state.lineage, layout_digest(state.file.layout, state.file.version),
                               state_layout_digest(state.layout), state.parent, tokens},
                              state.variant));
      return {state.file.checksum, {}};
    }
    case FilePath::kPart: {
      const TorporFile part = parse_torpor_file(header, bytes.size(), name);
      if (part.kind != "agent" && part.kind != "part") {
        corrupt(name, "it is of the kind '" + part.kind + "', not a part");
      }
      check_tensors(bytes, part, name);
      require_name(part.checksum);
      return {part.checksum, {}};
    }
    case FilePath::kNone: break;
  }
  throw Error(ErrorCode::kInvalidArgument, "'" + name + "' can't be a segment, a state or a part.");
}

AgentFile parse_whole_agent(std::span<const std::byte> bytes, const std::string& name) {
  AgentFile agent = parse_agent_file(header_of(bytes, name), bytes.size(), name);
  check_tensors(bytes, agent.file, name);
  return agent;
}

std::vector<std::string> files_of(const AgentFile& agent) {
  std::vector<std::string> files;
  for (const std::string& segment : agent.info.segments) files.push_back(pool_path(kSegments, segment));
  for (const StateRef& state : states_of(agent.info)) files.push_back(pool_path(kStates, state.file));
  for (const PartRef& part : agent.parts) files.push_back(std::string(kParts) + part_stem(agent.uid, part.name));
  return files;
}

AgentContents contents_of(const AgentFile& agent) {
  const int64_t rows = int64_t(agent.file.layout.bytes_per_token()) * kSegmentTokens;
  return {agent.info, agent.file.checksum, files_of(agent), rows + kSegmentTokens * int64_t(sizeof(int32_t)) + 65536};
}

}  // namespace

AgentContents check_agent_file(std::span<const std::byte> bytes, const std::string& name) {
  return contents_of(parse_whole_agent(bytes, name));
}

std::string checksum_of_whole(std::span<const std::byte> bytes) {
  try {
    const AgentFile agent = parse_agent_file(header_of(bytes, ""), bytes.size(), "");
    return agent.whole.empty() ? agent.file.checksum : agent.whole;
  } catch (const Error&) {
    return {};
  }
}

std::string check_whole_file(const std::string& path, std::span<const std::byte> bytes, const std::string& name) {
  return check_file(parse_path(path), bytes, name).checksum;
}

bool is_file_path(const std::string& path) { return parse_path(path).kind != FilePath::kNone; }

// ---- out of a store

struct WholeFiles::Impl {
  explicit Impl(const Store& of) : store(of.root(), of.env()) {}

  File open(const std::string& path) {
    const FilePath parsed = parse_path(path);
    switch (parsed.kind) {
      case FilePath::kSegment: return store.segments.open(parsed.name);
      case FilePath::kState: return store.states.open(parsed.name);
      case FilePath::kPart: return store.env.open(store.agents.part_path(parsed.uid, parsed.name), OpenMode::kRead);
      case FilePath::kNone: break;
    }
    throw Error(ErrorCode::kInvalidArgument, "'" + path + "' can't be a segment, a state or a part.");
  }

  std::optional<FileStat> find(const std::string& path) {
    const FilePath parsed = parse_path(path);
    if (parsed.kind == FilePath::kSegment) return store.segments.find(parsed.name);
    if (parsed.kind == FilePath::kState) return store.states.find(parsed.name);
    const auto stat = store.env.stat(store.agents.part_path(parsed.uid, parsed.name));
    return stat && stat->is_file ? stat : std::nullopt;
  }

  Store::Impl store;
};

WholeFiles::WholeFiles(const Store& store) : impl_(std::make_unique<Impl>(store)) {}
WholeFiles::~WholeFiles() = default;
void WholeFiles::set_disk_limits(const DiskLimits& limits) { impl_->store.set_disk_limits(limits); }

std::string WholeFiles::agent_file(const std::string& id) const {
  const OpenedAgent opened = impl_->store.agents.open(id);
  std::string bytes(size_t(opened.stat.size), '\0');
  opened.handle.read_at(std::as_writable_bytes(std::span(bytes)), 0);
  check_agent_file(as_bytes_of(bytes), opened.handle.path().string());
  return bytes;
}

std::optional<std::string> WholeFiles::agent_file_without_tail(const std::string& id) const {
  const OpenedAgent opened = impl_->store.agents.open(id);
  const AgentFile& agent = opened.agent;
  AgentInfo info = agent.info;
  const int64_t n = info.cache_size, sealed = int64_t(info.segments.size()) * kSegmentTokens;
  // Windows that end there need rows that nobody has.
  const auto is_cut = [](const auto& entry) { return entry.first == "shortest_cut"; };
  if (n == sealed || info.bare_tail || agent.file.version < kFormatVersion || !agent.file.state().empty() ||
      std::ranges::any_of(info.record, is_cut)) {
    return std::nullopt;
  }
  OwnState own = read_own_state(impl_->store.agents.open_files(opened), agent.file.layout,
                                {.sealed = n, .length = n, .rows = false});
  if (!own.problem.empty()) throw Error(ErrorCode::kCorruption, own.problem).with_agent(id);
  const auto is_unknown = [](int32_t token) { return token < 0; };
  if (std::any_of(own.ids.begin() + sealed, own.ids.end(), is_unknown)) return std::nullopt;
  const auto first = std::ranges::find_if(own.files, [&](const OwnFile& file) { return file.ref.end() > sealed; });
  own.files.erase(first, own.files.end());
  info.bare_tail = true;
  if (info.states) std::erase_if(*info.states, [&](const StateRef& state) { return state.position > sealed; });
  const AgentState state{.layout = agent.file.layout, .tokens = own.ids, .sealed = sealed, .messages = own.messages,
                         .without_tail = true, .whole = agent.file.checksum};
  const AgentDraft draft = draft_agent(std::move(info), agent.uid, state, std::move(own.files));
  std::string bytes;
  for (const auto& piece : draft.file.pieces()) {
    bytes.append(reinterpret_cast<const char*>(piece.data()), piece.size());
  }
  return bytes;
}

std::string WholeFiles::checksum(const std::string& path) const {
  std::string digits(kNameDigits, '\0');
  impl_->open(path).read_at(std::as_writable_bytes(std::span(digits)), kNameAt);
  return digits;
}

WholeFile WholeFiles::read(const std::string& path) const {
  const File file = impl_->open(path);
  const auto size = size_t(file.stat().size);
  WholeFile whole;
  if (auto mapped = size > 0 ? file.map(size) : nullptr) {
    whole = {{mapped.get(), size}, mapped};
  } else {
    const auto read = std::make_shared<std::vector<std::byte>>(size);
    file.read_at(*read, 0);
    whole = {*read, read};
  }
  check_whole_file(path, whole.bytes, file.path().string());
  return whole;
}

// ---- into a store

struct Arrival::State {
  State(WholeFiles::Impl& of, const std::string& id, std::string bytes, const std::string& name)
      : files(of), agent_bytes(std::move(bytes)), agent(parse_whole_agent(as_bytes_of(agent_bytes), name)),
        contents(contents_of(agent)), lock((check_id(id, name), lock_agent(of.store, id))), writing(of.store) {}

  void check_id(const std::string& id, const std::string& name) const {
    if (agent.info.agent_id != id) corrupt(name, "it is the agent '" + agent.info.agent_id + "', not '" + id + "'");
  }

  WholeFiles::Impl& files;
  const std::string agent_bytes;
  const AgentFile agent;
  const AgentContents contents;
  const AgentFileLock lock;
  Writing writing;
  std::vector<StoredFile> segments, states;    ///< that were there
  std::map<std::string, FileStat> damaged;     ///< by path
  std::mutex mutex;                            ///< of what `put` adds
  std::vector<StoredFile> put_segments, put_states;
};

Arrival::Arrival(WholeFiles& files, const std::string& id, std::string agent_file, const std::string& name)
    : state_(std::make_unique<State>(*files.impl_, id, std::move(agent_file), name)) {}
Arrival::~Arrival() = default;
const AgentContents& Arrival::contents() const { return state_->contents; }

std::vector<std::string> Arrival::missing(bool check) {
  std::vector<std::string> claims;
  for (const std::string& path : state_->contents.files) {
    const FilePath parsed = parse_path(path);
    claims.push_back(parsed.kind == FilePath::kPart ? part_claim(parsed.uid, parsed.name) : parsed.name);
  }
  for (;;) {
    std::vector<std::string> missing;
    state_->segments.clear();
    state_->states.clear();
    state_->damaged.clear();
    for (const std::string& path : state_->contents.files) {
      const FilePath parsed = parse_path(path);
      const auto stat = state_->files.find(path);
      if (stat && check) {
        try {
          const File file = state_->files.open(path);
          std::vector<std::byte> bytes(size_t(file.stat().size));
          file.read_at(bytes, 0);
          check_file(parsed, bytes, file.path().string());
        } catch (const Error& error) {
          if (error.code() == ErrorCode::kIo) throw;
          state_->damaged.emplace(path, *stat);
        }
      }
      if (!stat || state_->damaged.contains(path)) {
        missing.push_back(path);
      } else if (parsed.kind != FilePath::kPart) {
        (parsed.kind == FilePath::kSegment ? state_->segments : state_->states).push_back({parsed.name, *stat});
      }
    }
    state_->writing.make_room("Bringing the agent '" + state_->agent.info.agent_id + "' here",
                              int64_t(state_->agent_bytes.size()) +
                                  int64_t(missing.size()) * state_->contents.segment_bytes,
                              claims);
    if (state_->writing.claim(claims, state_->segments, state_->states)) return missing;
  }
}

void Arrival::put(const std::string& path, std::span<const std::byte> bytes, const std::string& name,
                  Durability durability) {
  Store::Impl& store = state_->files.store;
  const FilePath parsed = parse_path(path);
  const Checked checked = check_file(parsed, bytes, name);
  const bool durable = durability == Durability::kFull;
  if (parsed.kind == FilePath::kPart) {
    // Its name is its checksum: whatever has the name is the same, or damaged.
    store.env.make_directory(store.agents.parts_path());
    store.written.add(write_file(store.env, store.agents.part_path(parsed.uid, parsed.name), {bytes}, durable));
    return;
  }
  FilePool& pool = parsed.kind == FilePath::kSegment ? store.segments : store.states;
  TemporaryFile file = pool.write(parsed.name, {bytes}, durable);
  const auto damaged = state_->damaged.find(path);
  bool is_put = false;
  if (damaged != state_->damaged.end()) {
    const auto hold = store.locks.removing(std::chrono::seconds(10));
    if (!hold) {
      throw Error(ErrorCode::kBusy, "The store '" + store.root.string() + "' is in use by another process; try again.");
    }
    if ((is_put = pool.find(parsed.name) == damaged->second)) pool.replace(parsed.name, file);
  } else {
    is_put = pool.put_new(parsed.name, file);
  }
  if (!is_put) {  // somebody else made it just now
    std::string there(kNameDigits, '\0');
    pool.open(parsed.name).read_at(std::as_writable_bytes(std::span(there)), kNameAt);
    if (there == checked.checksum) return;
    throw Error(ErrorCode::kIncompatible, "The store has other rows under the name of '" + name +
                                              "', computed otherwise; use another store.")
        .with_path(name);
  }
  store.written.add(file.stat());
  if (!checked.plain.empty()) store.segments.note_variant(checked.plain, parsed.name);
  const std::lock_guard lock(state_->mutex);
  (parsed.kind == FilePath::kSegment ? state_->put_segments : state_->put_states)
      .push_back({parsed.name, file.stat()});
}

void Arrival::commit(Durability durability) {
  Store::Impl& store = state_->files.store;
  if (durability == Durability::kFull) {
    store.segments.flush_names(state_->put_segments);
    store.states.flush_names(state_->put_states);
    store.segments.flush(state_->segments);
    store.states.flush(state_->states);
  }
  store.agents.install(state_->agent, as_bytes_of(state_->agent_bytes), durability);
}

}  // namespace torpor
