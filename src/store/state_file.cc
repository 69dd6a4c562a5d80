#include "store/state_file.h"

#include <algorithm>
#include <charconv>

#include "base/hash.h"
#include "store/segment.h"
#include "torpor/error.h"

namespace torpor {
// ---- names

std::string state_layout_digest(const StateLayout& layout) {
  std::string text;
  for (const StateTensorSpec& tensor : layout.tensors) {
    if (!text.empty()) text += ',';
    text.append(tensor.name).append(":").append(kv_dtype_name(tensor.dtype)).append(":");
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      text.append(i > 0 ? "x" : "").append(std::to_string(tensor.shape[i]));
    }
  }
  return hash_hex(text);
}

std::string state_name(const StatePlace& place, const std::string& variant) {
  Hasher hasher;
  hasher.update_field("torpor state 3")
      .update_field(place.lineage)
      .update_field(place.layout_digest)
      .update_field(place.state_digest)
      .update_field(place.parent)
      .update_field(variant)
      .update_field("");  // the digests of its images and sounds
  return hasher.update(token_bytes(place.tokens)).hex();
}

void check_state_layout(const StateLayout& layout, const KvLayout& rows) {
  std::vector<KvState> tensors;
  for (const StateTensorSpec& tensor : layout.tensors) {
    const bool has_elements = std::all_of(tensor.shape.begin(), tensor.shape.end(), [](int64_t n) { return n > 0; });
    if (!has_elements) {
      throw Error(ErrorCode::kInvalidArgument, "The state '" + tensor.name + "' can't be stored: it has no elements.");
    }
    tensors.push_back({.name = tensor.name});
  }
  check_layout(rows, tensors);
}

StateChain::StateChain(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                       std::span<const std::string> segments, std::span<const int32_t> tokens)
    : segments_(segments), tokens_(tokens), layout_digest_(torpor::layout_digest(layout, kFormatVersion)) {
  lineages_.emplace_back(0, lineage_digest(identity, lineage, 0));
  for (const Lineage::Range& range : lineage.ranges) {
    if (range.first > 0) lineages_.emplace_back(range.first, lineage_digest(identity, lineage, range.first));
  }
}

StatePlace StateChain::place(int64_t position, std::string state_digest) const {
  const auto n_segments = size_t(position / kSegmentTokens);
  const int64_t sealed = int64_t(n_segments) * kSegmentTokens;
  const std::string* lineage = &lineages_.front().second;
  for (const auto& [first, digest] : lineages_) {
    if (first < position) lineage = &digest;
  }
  const std::string parent = n_segments == 0 ? std::string() : segments_[n_segments - 1];
  return {*lineage, layout_digest_, std::move(state_digest), parent,
          tokens_.subspan(size_t(sealed), size_t(position - sealed))};
}

bool StateChain::has_lineage(const std::string& lineage) const {
  return std::any_of(lineages_.begin(), lineages_.end(), [&](const auto& own) { return own.second == lineage; });
}

// ---- files

StateLayout state_layout_of(const TorporFile& file, const std::string& file_name) {
  StateLayout layout;
  for (const SafetensorsTensor& tensor : file.state()) {
    const auto dtype = parse_kv_dtype(tensor.dtype);
    if (!dtype) corrupt(file_name, "the state '" + tensor.name + "' has the dtype " + tensor.dtype);
    // Each is at most the tensor's bytes, which the file holds.
    layout.tensors.push_back({tensor.name, *dtype, {tensor.shape.begin(), tensor.shape.end()}});
  }
  return layout;
}

std::string StateFile::content() const {
  return content_digest({file.checksums.begin(), file.checksums.end() - 1});
}

StateFile parse_state_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name) {
  StateFile state;
  state.file = parse_torpor_file(prefix, file_size, file_name);
  const TorporFile& file = state.file;
  if (file.kind != "state") corrupt(file_name, "it is of the kind '" + file.kind + "', not a state");
  if (file.version < kFormatVersion) corrupt(file_name, "it is of version " + std::to_string(file.version));
  if (file.row_tensors > 0) corrupt(file_name, "a state file holds rows");
  if (file.has_messages) corrupt(file_name, "a state file holds messages");
  if (file.state_tensors == 0) corrupt(file_name, "it holds no state");
  if (file.n_tokens >= uint64_t(kSegmentTokens)) {
    corrupt(file_name, "it has " + std::to_string(file.n_tokens) + " tokens after its last segment");
  }
  state.layout = state_layout_of(file, file_name);
  state.parent = file.required("parent", file_name);
  state.lineage = file.required("lineage", file_name);
  state.variant = file.required("variant", file_name);
  if (!state.variant.empty() && state.variant != state.content()) {
    corrupt(file_name, "its variant is not the digest of its state");
  }
  return state;
}

std::string encode_state_header(const StatePlace& place, const std::string& variant, const KvLayout& layout,
                                std::span<const KvState> state, const std::vector<std::string>& checksums) {
  auto all = checksums;
  all.push_back(hash_hex(token_bytes(place.tokens)));
  return encode_torpor_header(
      {.kind = "state",
       .metadata = {{"parent", place.parent}, {"lineage", place.lineage}, {"variant", variant}},
       .state = state, .n_tokens = place.tokens.size(), .checksums = std::move(all)},
      layout);
}

std::vector<KvState> state_tensors(const StateLayout& layout, const StateCheckpoint& state) {
  std::vector<KvState> tensors;
  for (size_t i = 0; i < layout.tensors.size(); ++i) {
    const StateTensorSpec& spec = layout.tensors[i];
    tensors.push_back({spec.name, kv_dtype_name(spec.dtype), {spec.shape.begin(), spec.shape.end()},
                       state.bytes().subspan(layout.offset(i), spec.bytes()), state.owner()});
  }
  return tensors;
}

std::vector<std::string> state_checksums(std::span<const KvState> state) {
  std::vector<std::string> checksums;
  for (const KvState& tensor : state) checksums.push_back(hash_hex(tensor.bytes));
  return checksums;
}

OpenedState open_state(const FilePool& pool, const StateChain& chain, const StateRef& ref) {
  File handle = pool.open(ref.file);
  const FileStat stat = handle.stat();
  const std::string name = handle.path().string();
  StateFile state = parse_state_file(read_header_bytes(handle, stat.size), stat.size, name);
  StatePlace place = chain.place(ref.position, state_layout_digest(state.layout));
  // An agent may go on in other numerics behind a state that it has.
  if (!chain.has_lineage(state.lineage)) corrupt(name, "it belongs to another model");
  place.lineage = state.lineage;
  if (layout_digest(state.file.layout, state.file.version) != place.layout_digest) {
    corrupt(name, "its layout is not the agent's");
  }
  if (state.parent != place.parent) corrupt(name, "it does not follow the agent's segments");
  const auto tokens = read_tokens(handle, state.file);
  if (!std::equal(tokens.begin(), tokens.end(), place.tokens.begin(), place.tokens.end())) {
    corrupt(name, "its tokens are not the agent's");
  }
  if (state_name(place, state.variant) != ref.file) corrupt(name, "its name is not that of its contents");
  return {std::move(handle), stat, std::move(state)};
}

std::shared_ptr<const StateCheckpoint> read_state(const OpenedState& opened, const StateRef& ref,
                                                  const BufferAllocator& allocate) {
  const size_t size = opened.state.layout.bytes();
  const std::shared_ptr<std::byte> buffer = allocate(size);
  const std::span<std::byte> bytes(buffer.get(), size);
  read_state_bytes(opened.handle, opened.state.file, bytes);
  const auto state = std::make_shared<const StateCheckpoint>(ref.position, bytes, buffer);
  state->set_file(ref.file);
  return state;
}

// ---- lists of them

std::string encode_states(std::span<const StateRef> states) {
  std::string text;
  for (const StateRef& state : states) {
    if (!text.empty()) text += ',';
    text += std::to_string(state.position) + ":" + state.file;
  }
  return text;
}

std::optional<std::vector<StateRef>> decode_states(std::string_view text, int64_t n_tokens, bool in_export) {
  std::vector<StateRef> states;
  int64_t before = 0;
  for (const std::string& entry : split(text)) {
    StateRef& state = states.emplace_back();
    const char* const end = entry.data() + entry.size();
    const auto [colon, error] = std::from_chars(entry.data(), end, state.position);
    if (error != std::errc() || colon == end || *colon != ':') return std::nullopt;
    state.file.assign(colon + 1, end);
    const bool is_own = state.file.empty() && state.position == n_tokens;
    if (in_export ? !is_own : !is_hex_digest(state.file)) return std::nullopt;
    if (state.position <= before || state.position > n_tokens) return std::nullopt;
    before = state.position;
  }
  return states;
}

}  // namespace torpor
