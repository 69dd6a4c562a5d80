/// Prefixes that belong to no agent: whoever's prompt begins so finds their segments by name.

#include <algorithm>

#include "store/run_loader.h"
#include "store/segment_writer.h"
#include "store/writing.h"

namespace torpor {
namespace {

/// Looks for segments that hold the rows of some tokens, by name alone.
class PrefixSearch {
 public:
  PrefixSearch(const SegmentPool& segments, const SegmentChain& chain)
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
  const SegmentPool& segments_;
  const SegmentChain& chain_;
  const size_t length_;
  const std::unordered_multimap<std::string, std::string> variants_;
};

}  // namespace

std::vector<std::string> find_prefix(Store::Impl& store, const Identity& identity, const Lineage& lineage,
                                     const KvLayout& layout, std::span<const int32_t> tokens) {
  if (layout.tensors.empty()) return {};
  const SegmentChain chain(identity, lineage, layout, {}, tokens);
  return PrefixSearch(store.segments, chain).longest({});
}

LoadedPrefix load_prefix(Store::Impl& store, const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                         std::span<const int32_t> tokens, const LoadOptions& options) {
  LoadedPrefix loaded;
  loaded.segments = find_prefix(store, identity, lineage, layout, tokens);
  const SegmentChain chain(identity, lineage, layout, loaded.segments, tokens);
  RunLoader loader(store, layout, chain, options);
  loader.open(int64_t(loaded.segments.size()) * kSegmentTokens, /*share_held=*/true);
  loader.read();
  const auto n = size_t(loader.usable_tokens());
  loaded.snapshot.identity = identity;
  loaded.snapshot.lineage = lineage;
  loaded.snapshot.layout = layout;
  loaded.snapshot.tokens.assign(tokens.begin(), tokens.begin() + ptrdiff_t(n));
  loader.take(loaded.snapshot);
  loaded.segments.resize(n / kSegmentTokens);
  loaded.bytes_read = loader.bytes_read();
  return loaded;
}

SaveResult save_prefix(Store::Impl& store, const KvSnapshot& snapshot, Durability durability) {
  check_storable(snapshot, nullptr);
  Writing writing(store);
  SegmentWriter writer(store, snapshot, nullptr);
  const auto make_room = [&] {
    writing.make_room("Keeping a prefix of " + std::to_string(snapshot.tokens.size()) + " tokens",
                      writer.bytes_to_write(), writer.names());
  };
  for (make_room(); !writing.claim(writer.names(), writer.found()); make_room()) writer.plan();
  SaveResult result;
  writer.write_missing(durability == Durability::kFull, writing, result);
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
    const auto run = std::make_shared<const SealedRun>(rows, mapping, /*mapped=*/true);
    run->set_segment({name, segment.variant, file->content});
    store.known.add_run(run);
    return run;
  } catch (const Error&) {
    return nullptr;  // gone, or another one
  }
}

}  // namespace torpor
