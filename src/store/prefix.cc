/// Prefixes that belong to no agent: whoever's prompt begins so finds their segments by name.

#include <algorithm>

#include "store/run_loader.h"
#include "store/segment_writer.h"
#include "store/state_writer.h"
#include "store/states.h"
#include "store/writing.h"

namespace torpor {
namespace {

/// Looks for segments that hold the rows of some tokens, by name alone.
class PrefixSearch {
 public:
  PrefixSearch(const FilePool& segments, const SegmentChain& chain)
      : segments_(segments),
        chain_(chain),
        length_(chain.tokens.size() / kSegmentTokens),
        variants_(segments.variants()) {}

  /// The longest sequence that is there and begins with `names`.
  std::vector<std::string> longest(std::vector<std::string> names) const {
    const size_t begin = names.size();
    std::vector<std::string> plain = std::move(names);
    while (plain.size() < length_) {
      plain.push_back(segment_name(chain_.place(plain.size(), plain.empty() ? "" : plain.back()), ""));
    }
    const auto found = segments_.find(std::span(plain).subspan(begin));
    const size_t there = size_t(std::find(found.begin(), found.end(), std::nullopt) - found.begin());
    std::vector<std::string> best(plain.begin(), plain.begin() + ptrdiff_t(begin + there));
    // What follows a variant is under other names than what follows the plain one, so each is a way of its own.
    for (size_t i = begin; !variants_.empty() && i < std::min(begin + there + 1, length_); ++i) {
      const auto [first, last] = variants_.equal_range(plain[i]);
      for (auto variant = first; variant != last; ++variant) {
        if (!segments_.find(variant->second)) continue;
        std::vector<std::string> way(plain.begin(), plain.begin() + ptrdiff_t(i));
        way.push_back(variant->second);
        way = longest(std::move(way));
        if (way.size() > best.size()) best = std::move(way);
      }
    }
    return best;
  }

 private:
  const FilePool& segments_;
  const SegmentChain& chain_;
  const size_t length_;
  const std::unordered_multimap<std::string, std::string> variants_;
};

}  // namespace

std::vector<std::string> find_segments(Store::Impl& store, const Identity& identity, const Lineage& lineage,
                                       const KvLayout& layout, std::span<const int32_t> tokens) {
  if (layout.tensors.empty()) return {};
  const SegmentChain chain(identity, lineage, layout, {}, tokens);
  return PrefixSearch(store.segments, chain).longest({});
}

int64_t find_prefix(Store::Impl& store, const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                    std::span<const int32_t> tokens, const StatesSought* states) {
  const auto segments = find_segments(store, identity, lineage, layout, tokens);
  if (states == nullptr) return int64_t(segments.size()) * kSegmentTokens;
  const StateChain chain(identity, lineage, layout, segments, tokens);
  if (layout.has_apart()) {
    return resumable_by_files(layout, find_windows(store, chain, layout), chain.segment_tokens(),
                              chain.segment_tokens());
  }
  const auto found = find_states(store, chain, *states);
  return found.empty() ? 0 : found.front().position;
}

LoadedPrefix load_prefix(Store::Impl& store, const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                         std::span<const int32_t> tokens, const LoadOptions& options) {
  LoadedPrefix loaded;
  KvSnapshot& snapshot = loaded.snapshot;
  loaded.segments = find_segments(store, identity, lineage, layout, tokens);
  loaded.rows = int64_t(loaded.segments.size()) * kSegmentTokens;
  const SegmentChain chain(identity, lineage, layout, loaded.segments, tokens);
  const StateChain states(identity, lineage, layout, loaded.segments, tokens);
  const bool apart = layout.has_apart();
  if (apart) loaded.windows = find_windows(store, states, layout);
  std::optional<RunLoader> loader;
  for (int64_t held = loaded.rows;;) {
    snapshot.states.clear();
    snapshot.state_layout = {};
    if (apart) {
      held = resumable_by_files(layout, loaded.windows, loaded.rows, held);
    } else if (options.states != nullptr) {
      const auto found = find_states(store, states, *options.states);
      const auto usable = std::ranges::find_if(found, [&](const StateRef& ref) {
        if (ref.position > held) return false;
        try {
          snapshot.states = {load_state(store, states, ref, options.allocate, snapshot.state_layout)};
          return true;
        } catch (const Error& error) {
          if (!is_damage(error)) throw;
          return false;
        }
      });
      held = usable != found.end() ? usable->position : 0;
    }
    loader.emplace(store, layout, chain, options, loaded.windows, &states);
    loader->open(held, /*share_held=*/true);
    loader->read();
    if ((!apart && options.states == nullptr) || loader->complete()) break;
    held = loader->usable_tokens();
  }
  const auto n = size_t(loader->usable_tokens());
  snapshot.identity = identity;
  snapshot.lineage = lineage;
  snapshot.layout = layout;
  snapshot.tokens.assign(tokens.begin(), tokens.begin() + ptrdiff_t(n));
  loader->take(snapshot);
  loaded.segments.resize(n / kSegmentTokens);
  std::erase_if(loaded.windows, [&](const StateRef& window) {
    return !sees_window_rows(layout, window.position / kSegmentTokens - 1, int64_t(n));
  });
  loaded.bytes_read = loader->bytes_read();
  for (const auto& state : snapshot.states) loaded.bytes_read += int64_t(state->bytes().size());
  return loaded;
}

namespace {

/// Of states that need not be that after the last token.
void check_prefix_states(const KvSnapshot& snapshot) {
  int64_t before = 0;
  for (const auto& state : snapshot.states) {
    if (state->position() <= before || state->bytes().size() != snapshot.state_layout.bytes()) {
      throw Error(ErrorCode::kInvalidArgument, "The states of the prefix are not in order, or not of their layout.");
    }
    before = state->position();
  }
}

}  // namespace

SaveResult save_prefix(Store::Impl& store, const KvSnapshot& given, Durability durability) {
  KvSnapshot snapshot = given;
  const int64_t sealed = int64_t(snapshot.sealed.size()) * kSegmentTokens;
  std::erase_if(snapshot.states, [&](const auto& state) { return state == nullptr || state->position() > sealed; });
  check_prefix_states(snapshot);
  KvSnapshot rows = given;
  rows.states.clear();
  rows.state_layout = {};
  check_storable(rows, nullptr);
  check_state_layout(snapshot.state_layout, snapshot.layout);
  Writing writing(store);
  SegmentWriter writer(store, snapshot, nullptr);
  add_windows(store, snapshot, {});
  StateWriter states(store, snapshot, {});
  const auto names = [&] {
    std::vector<std::string> names = writer.names();
    for (const StateRef& state : states.refs().value_or(std::vector<StateRef>())) names.push_back(state.file);
    return names;
  };
  const auto make_room = [&] {
    states.plan(writer.tokens(), writer.names());
    writing.make_room("Keeping a prefix of " + std::to_string(snapshot.tokens.size()) + " tokens",
                      writer.bytes_to_write() + states.bytes_to_write(), names());
  };
  for (make_room(); !writing.claim(names(), writer.found(), states.found()); make_room()) writer.plan();
  SaveResult result;
  const bool durable = durability == Durability::kFull;
  writer.write_missing(durable, writing, result);
  do states.plan(writer.tokens(), writer.names());
  while (!writing.claim(names(), {}, states.found()));
  states.write_missing(durable, writing, result);
  return result;
}

std::shared_ptr<const SealedRun> map_segment(Store::Impl& store, const std::string& name) {
  const auto file = store.known.file(name);
  if (!file || !file->whole) return nullptr;
  try {
    const File handle = store.segments.open(name);
    const FileStat stat = handle.stat();
    if (stat != file->stat) return nullptr;
    const auto held = store.known.run(name);
    if (held != nullptr && held->mapped() && held->segment()->content == file->content) return held;
    const SegmentFile segment =
        parse_segment_file(read_header_bytes(handle, stat.size), stat.size, handle.path().string());
    const auto mapping = segment.content() == file->content ? handle.map(stat.size) : nullptr;
    if (mapping == nullptr) return nullptr;
    const std::span rows(mapping.get() + segment.file.header.data_start, size_t(segment.file.rows_bytes()));
    const KvLayout& layout = segment.file.layout;
    TensorMask checked;
    if (layout.has_apart()) {
      checked.assign(layout.tensors.size(), false);
      std::fill_n(checked.begin(), layout.n_together(), true);
    }
    const auto run = std::make_shared<const SealedRun>(rows, mapping, /*mapped=*/true, std::move(checked));
    run->set_segment({name, segment.variant, file->content});
    store.known.add_run(run);
    return run;
  } catch (const Error&) {
    return nullptr;  // gone, or another one
  }
}

}  // namespace torpor
