#include "torpor/kv_snapshot.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <functional>
#include <new>

#include "base/checked.h"
#include "base/hash.h"
#include "base/safetensors.h"
#include "torpor/error.h"

namespace torpor {

size_t kv_dtype_size(KvDtype dtype) noexcept {
  return dtype == KvDtype::kF32 || dtype == KvDtype::kU32 ? 4 : 2;
}

const char* kv_dtype_name(KvDtype dtype) noexcept {
  switch (dtype) {
    case KvDtype::kF32: return "F32";
    case KvDtype::kF16: return "F16";
    case KvDtype::kBF16: return "BF16";
    case KvDtype::kU32: return "U32";
  }
  return "?";
}

std::optional<KvDtype> parse_kv_dtype(std::string_view name) noexcept {
  for (KvDtype dtype : {KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16, KvDtype::kU32}) {
    if (name == kv_dtype_name(dtype)) return dtype;
  }
  return std::nullopt;
}

std::string KvFormat::name() const {
  std::string float_name = kv_dtype_name(dtype);
  for (char& c : float_name) c = char(std::tolower(static_cast<unsigned char>(c)));
  if (!quantized()) return float_name;
  std::string name("q");
  name.append(std::to_string(bits.keys));
  if (bits.values != bits.keys) name.append(",").append(std::to_string(bits.values));
  name.append(" group ").append(std::to_string(group)).append(" ").append(float_name);
  if (bias_free) name += " bias-free";
  if (rotated) name += " rotated";
  return name;
}

std::optional<KvFormat> KvFormat::parse(std::string_view name) {
  for (const KvDtype dtype : {KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16}) {
    if (const KvFormat plain(dtype); plain.name() == name) return plain;
    for (const KvBits bits : {KvBits(8), KvBits(4), KvBits(8, 4), KvBits(4, 8)}) {
      for (const int group : {32, 64, 128}) {
        KvFormat format(dtype, bits, group);
        for (const int method : {0, 1, 2, 3}) {
          format.bias_free = (method & 1) != 0;
          format.rotated = (method & 2) != 0;
          if (format.rotated && !format.rotates_keys() && !format.rotates_values()) continue;
          if (format.name() == name) return format;
        }
      }
    }
  }
  return std::nullopt;
}

bool KvLayout::has_windows() const noexcept {
  return std::any_of(tensors.begin(), tensors.end(), [](const KvTensorSpec& tensor) { return tensor.window > 0; });
}

size_t KvLayout::n_together() const noexcept {
  return size_t(std::ranges::find(tensors, true, &KvTensorSpec::apart) - tensors.begin());
}

size_t KvLayout::first_of(int layer, size_t per_layer) const {
  if (!has_apart()) return size_t(layer) * per_layer;
  const std::string name = "layer_" + std::to_string(layer) + "_";
  for (size_t t = 0; t < tensors.size(); t += per_layer) {
    if (tensors[t].name.starts_with(name)) return t;
  }
  throw Error(ErrorCode::kInternal, "The KV layout has no tensors of layer " + std::to_string(layer) + ".");
}

bool KvLayout::attended(const KvTensorSpec& tensor, int64_t first, int64_t n, int64_t length) noexcept {
  return tensor.window == 0 || first + n > length - tensor.window;
}

TensorMask KvLayout::attended(int64_t first, int64_t n, int64_t length) const {
  TensorMask mask;
  for (const KvTensorSpec& tensor : tensors) mask.push_back(attended(tensor, first, n, length));
  return mask;
}

size_t KvLayout::bytes_per_token() const noexcept { return offset(tensors.size(), 1); }

size_t KvLayout::offset(size_t i, int n_tokens) const noexcept {
  size_t bytes = 0;
  for (size_t t = 0; t < i; ++t) bytes += tensors[t].bytes_per_token() * size_t(n_tokens);
  return bytes;
}

std::vector<std::pair<std::string, std::string>> Identity::fields() const {
  return {{"architecture", architecture}, {"config", config}, {"weights", weights}, {"rope", rope}, {"kv", kv}};
}

Identity Identity::from_fields(const std::vector<std::pair<std::string, std::string>>& fields) {
  Identity identity;
  for (const auto& [name, value] : fields) {
    std::string* field = name == "architecture" ? &identity.architecture
                         : name == "config"     ? &identity.config
                         : name == "weights"    ? &identity.weights
                         : name == "rope"       ? &identity.rope
                         : name == "kv"         ? &identity.kv
                                                : nullptr;
    if (field == nullptr) {
      throw Error(ErrorCode::kIncompatible,
                  "The identity has a field '" + name + "' that this version of Torpor does not know; use a newer one.")
          .with_field(name, "", value);
    }
    *field = value;
  }
  return identity;
}

std::optional<std::string> Identity::first_difference(const Identity& other) const {
  const auto mine = fields();
  const auto theirs = other.fields();
  for (size_t i = 0; i < mine.size(); ++i) {
    if (mine[i].second != theirs[i].second) return mine[i].first;
  }
  return std::nullopt;
}

std::string Identity::value(std::string_view field) const {
  for (const auto& [name, value] : fields()) {
    if (name == field) return value;
  }
  return "";
}

const std::string& Lineage::numerics() const noexcept { return numerics_at(INT64_MAX); }

const std::string& Lineage::numerics_at(int64_t position) const noexcept {
  static const std::string kUnknown;
  const std::string* found = &kUnknown;
  for (const Range& range : ranges) {
    if (range.first <= position) found = &range.numerics;
  }
  return *found;
}

bool Lineage::go_on_with(const std::string& with, int64_t n_tokens) {
  const std::string& now = numerics();
  const bool any = !now.empty() && now.find('/') == std::string::npos && with.starts_with(now + "/");
  if (now == with || any) return false;
  cut(n_tokens);
  const int64_t first = n_tokens / kSegmentTokens * kSegmentTokens;
  if (!ranges.empty() && ranges.back().first >= first) ranges.pop_back();
  ranges.push_back({ranges.empty() ? 0 : first, with});
  return true;
}

void Lineage::cut(int64_t n_tokens) {
  const int64_t first = n_tokens / kSegmentTokens * kSegmentTokens;
  // The last one stays: it says how new rows are computed.
  while (ranges.size() > 1 && ranges.back().first > first) {
    const size_t before = ranges.size() - 2;
    if (ranges[before].first >= first) {
      ranges.erase(ranges.begin() + ptrdiff_t(before));
    } else {
      ranges.back().first = first;
    }
  }
}

StateLayout window_rows(const KvLayout& layout) {
  StateLayout rows;
  for (size_t t = layout.n_together(); t < layout.tensors.size(); ++t) {
    const KvTensorSpec& tensor = layout.tensors[t];
    rows.tensors.push_back({tensor.name + "_rows", tensor.dtype, {tensor.n_kv_heads, kSegmentTokens, tensor.dim}});
  }
  return rows;
}

bool sees_window_rows(const KvLayout& layout, int64_t run, int64_t length) noexcept {
  const auto seen = [&](const KvTensorSpec& tensor) {
    return tensor.apart && KvLayout::attended(tensor, run * kSegmentTokens, kSegmentTokens, length);
  };
  return run * kSegmentTokens < length && std::ranges::any_of(layout.tensors, seen);
}

int64_t resumable_by_windows(const KvLayout& layout, int64_t n_tokens,
                             const std::function<bool(int64_t run)>& has_run) {
  if (!layout.has_apart()) return n_tokens;
  // A run that the end sees is seen from everywhere inside it and behind it, so what lacks it is cut to its beginning.
  for (int64_t run = (n_tokens + kSegmentTokens - 1) / kSegmentTokens - 1; run >= 0; --run) {
    if (!sees_window_rows(layout, run, n_tokens)) break;
    if (!has_run(run)) n_tokens = run * kSegmentTokens;
  }
  return n_tokens;
}

size_t StateTensorSpec::bytes() const noexcept {
  size_t bytes = kv_dtype_size(dtype);
  for (const int64_t n : shape) bytes *= size_t(n);
  return bytes;
}

size_t StateLayout::offset(size_t i) const noexcept {
  size_t bytes = 0;
  for (size_t t = 0; t < i; ++t) bytes += tensors[t].bytes();
  return bytes;
}

std::string StateCheckpoint::file() const {
  const std::lock_guard lock(mutex_);
  return file_;
}

void StateCheckpoint::set_file(std::string name) const {
  const std::lock_guard lock(mutex_);
  file_ = std::move(name);
}

bool covers(const TensorMask& mask, const TensorMask& other) noexcept {
  for (size_t i = 0; i < mask.size(); ++i) {
    if ((other.empty() || other[i]) && !mask[i]) return false;
  }
  return true;
}

std::shared_ptr<const SealedRun::Segment> SealedRun::segment() const {
  const std::lock_guard lock(mutex_);
  return segment_;
}

void SealedRun::set_segment(Segment segment) const {
  auto shared = std::make_shared<const Segment>(std::move(segment));
  const std::lock_guard lock(mutex_);
  segment_ = std::move(shared);
}

namespace {

[[noreturn]] void inconsistent(const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, "The KV snapshot is inconsistent: " + what + ".");
}

/// Of `n_runs` runs the i-th has room for `capacity` tokens in `bytes` bytes. A sealed one may lack what is kept apart.
void check_run(const KvLayout& layout, size_t i, size_t n_runs, int capacity, size_t bytes) {
  const size_t expected = layout.offset(layout.tensors.size(), capacity);
  if (bytes == expected || (capacity == kSegmentTokens && i + 1 < n_runs && bytes == layout.together_bytes())) return;
  inconsistent("run " + std::to_string(i) + " of " + std::to_string(n_runs) + " has " + std::to_string(bytes) +
               " bytes, its layout needs " + std::to_string(expected));
}

void check_covered(size_t rows, size_t tokens) {
  if (rows == tokens) return;
  inconsistent("its runs hold " + std::to_string(rows) + " rows for " + std::to_string(tokens) + " tokens");
}

void check_state(const std::vector<KvState>& state) {
  for (const KvState& tensor : state) {
    std::optional<uint64_t> size = safetensors_dtype_size(tensor.dtype);
    for (const uint64_t n : tensor.shape) size = size ? checked_mul(*size, n) : size;
    if (size.value_or(0) == 0 || *size != tensor.bytes.size()) {
      inconsistent("the state '" + tensor.name + "' has " + std::to_string(tensor.bytes.size()) +
                   " bytes, which its dtype and shape do not need");
    }
  }
}

void check_states(const KvSnapshot& snapshot) {
  const StateLayout& layout = snapshot.state_layout;
  if (layout.empty() && !snapshot.states.empty()) inconsistent("it has states without a layout of them");
  int64_t before = 0;
  for (const auto& state : snapshot.states) {
    if (state == nullptr || state->position() <= before) inconsistent("its states are not in the order of their tokens");
    if (state->bytes().size() != layout.bytes()) {
      inconsistent("the state after " + std::to_string(state->position()) + " tokens has " +
                   std::to_string(state->bytes().size()) + " bytes, its layout needs " + std::to_string(layout.bytes()));
    }
    before = state->position();
  }
  if (snapshot.layout.has_apart()) {
    const auto of_run = [&](const auto& state) {
      return state->position() % kSegmentTokens == 0 && state->position() <= int64_t(snapshot.tokens.size());
    };
    if (!std::ranges::all_of(snapshot.states, of_run)) inconsistent("rows of windows are not those of its runs");
    if (!layout.empty() && layout != window_rows(snapshot.layout)) inconsistent("it has states and rows kept apart");
    return;
  }
  if (!layout.empty() && before != int64_t(snapshot.tokens.size())) inconsistent("the state after its last token is missing");
}

}  // namespace

void KvSnapshot::validate() const {
  if (tail.n_tokens < 0 || tail.n_tokens >= kSegmentTokens) {
    inconsistent("its tail holds " + std::to_string(tail.n_tokens) + " tokens");
  }
  for (size_t i = 0; i < sealed.size(); ++i) {
    if (sealed[i] == nullptr) inconsistent("run " + std::to_string(i) + " is missing");
  }
  for (size_t i = 0; i < n_runs(); ++i) check_run(layout, i, n_runs(), run_capacity(i), run_bytes(i).size());
  check_covered(sealed.size() * kSegmentTokens + size_t(tail.n_tokens), tokens.size());
  check_state(state);
  check_states(*this);
}

void KvSnapshot::validate(const BorrowedRows& rows) const {
  if (n_runs() > 0) inconsistent("it has rows of its own beside the borrowed ones");
  size_t covered = 0;
  for (size_t i = 0; i < rows.runs.size(); ++i) {
    const int n = int(std::min<size_t>(kSegmentTokens, tokens.size() - std::min(covered, tokens.size())));
    size_t bytes = 0;
    for (const auto& piece : rows.runs[i].pieces) bytes += piece.size();
    check_run(layout, i, rows.runs.size(), n, bytes);
    covered += size_t(n);
  }
  check_covered(covered, tokens.size());
  if (rows.runs.size() != (tokens.size() + kSegmentTokens - 1) / kSegmentTokens) {
    inconsistent(std::to_string(rows.runs.size()) + " runs are borrowed for " + std::to_string(tokens.size()) +
                 " tokens");
  }
  check_state(state);
  check_states(*this);
}

void KvSnapshot::add_run(int n_tokens, std::span<const std::byte> bytes, std::shared_ptr<const void> owner) {
  if (n_tokens == kSegmentTokens) {
    sealed.push_back(std::make_shared<SealedRun>(bytes, std::move(owner)));
  } else {
    tail = {n_tokens, bytes, std::move(owner)};
  }
}

bool KvSnapshot::has_window_rows(size_t i) const noexcept {
  const SealedRun& run = *sealed[i];
  if (run.bytes().size() < layout.offset(layout.tensors.size(), kSegmentTokens)) return false;
  const TensorMask& checked = run.checked();
  const auto apart = checked.begin() + ptrdiff_t(checked.empty() ? 0 : layout.n_together());
  return std::all_of(apart, checked.end(), std::identity());
}

std::shared_ptr<const StateCheckpoint> KvSnapshot::window_rows_of(size_t i) const {
  return std::make_shared<const StateCheckpoint>(int64_t(i + 1) * kSegmentTokens,
                                                 sealed[i]->bytes().subspan(layout.together_bytes()), sealed[i]);
}

std::optional<KvSnapshot> in_layout(const KvSnapshot& snapshot, const KvLayout& layout) {
  const auto& from = snapshot.layout.tensors;
  std::vector<size_t> sources;
  for (const KvTensorSpec& tensor : layout.tensors) {
    const auto found = std::ranges::find(from, tensor.name, &KvTensorSpec::name);
    if (found == from.end()) return std::nullopt;
    KvTensorSpec there = *found;
    there.apart = tensor.apart;
    if (there != tensor) return std::nullopt;
    sources.push_back(size_t(found - from.begin()));
  }
  if (sources.size() != from.size()) return std::nullopt;
  KvSnapshot moved{.identity = snapshot.identity, .lineage = snapshot.lineage, .conversation = snapshot.conversation,
                   .layout = layout, .tokens = snapshot.tokens, .state = snapshot.state};
  for (size_t i = 0; i < snapshot.n_runs(); ++i) {
    const bool sealed = i < snapshot.sealed.size();
    const int n = snapshot.run_tokens(i), capacity = snapshot.run_capacity(i);
    const std::span<const std::byte> bytes = snapshot.run_bytes(i);
    const TensorMask has = sealed ? snapshot.sealed[i]->checked() : TensorMask();
    const auto is_there = [&](size_t t) {
      return (has.empty() || has[sources[t]]) && snapshot.layout.offset(sources[t] + 1, capacity) <= bytes.size();
    };
    TensorMask checked;
    for (size_t t = 0; t < sources.size(); ++t) checked.push_back(is_there(t));
    const size_t size = layout.offset(sources.size(), n);
    const std::shared_ptr<std::byte> buffer = allocate_heap_buffer(size);
    for (size_t t = 0; t < sources.size(); ++t) {
      std::byte* const to = buffer.get() + layout.offset(t, n);
      if (!checked[t]) {
        std::memset(to, 0, layout.tensors[t].bytes_per_token() * size_t(n));
        continue;
      }
      const std::byte* const rows = bytes.data() + snapshot.layout.offset(sources[t], capacity);
      const size_t row = size_t(layout.tensors[t].dim) * kv_dtype_size(layout.tensors[t].dtype);
      for (size_t head = 0; head < size_t(layout.tensors[t].n_kv_heads); ++head) {
        std::memcpy(to + head * size_t(n) * row, rows + head * size_t(capacity) * row, size_t(n) * row);
      }
    }
    if (sealed) {
      if (std::ranges::all_of(checked, std::identity())) checked.clear();
      moved.sealed.push_back(std::make_shared<SealedRun>(std::span<const std::byte>(buffer.get(), size), buffer, false,
                                                         std::move(checked)));
    } else {
      moved.add_run(n, {buffer.get(), size}, buffer);
    }
  }
  return moved;
}

void name_unknown_tokens(std::span<int32_t> ids, const std::string& rows_digest) {
  for (size_t i = 0; i < ids.size(); ++i) {
    const uint32_t part = uint32_t(std::stoul(rows_digest.substr(i % 4 * 8, 8), nullptr, 16));
    ids[i] = int32_t(part | 0x80000000u);
  }
}

bool has_unknown_tokens(std::span<const int32_t> ids) noexcept {
  return std::any_of(ids.begin(), ids.end(), [](int32_t id) { return id < 0; });
}

std::shared_ptr<std::byte> allocate_heap_buffer(size_t size) {
  constexpr std::align_val_t kAlignment{64};
  auto* bytes = static_cast<std::byte*>(::operator new(size, kAlignment, std::nothrow));
  if (bytes == nullptr) {
    throw Error(ErrorCode::kResourceExhausted, "Out of memory for a KV buffer of " + std::to_string(size) + " bytes.");
  }
  return {bytes, [](std::byte* p) { ::operator delete(p, std::align_val_t{64}); }};
}

}  // namespace torpor
