/// Prefixes that belong to no agent: whoever's prompt begins so finds their segments by name.

#include "store/run_loader.h"
#include "store/segment_writer.h"
#include "store/writing.h"

namespace torpor {

std::vector<std::string> Store::Impl::find_prefix(const Identity& identity, const KvLayout& layout,
                                                  std::span<const int32_t> tokens) {
  std::vector<std::string> names;
  if (layout.tensors.empty()) return names;
  const std::string identity_digest = identity.digest(), digest = layout_digest(layout);
  for (size_t end = kSegmentTokens; end <= tokens.size(); end += kSegmentTokens) {
    const SegmentPlace place{identity_digest, digest, names.empty() ? "" : names.back(),
                             tokens.subspan(end - kSegmentTokens, kSegmentTokens)};
    std::string name = segment_name(place, "");
    if (!env.exists(segment_path(name))) break;
    names.push_back(std::move(name));
  }
  return names;
}

LoadedPrefix Store::Impl::load_prefix(const Identity& identity, const KvLayout& layout, std::span<const int32_t> tokens,
                                      const LoadOptions& options) {
  LoadedPrefix loaded;
  loaded.segments = find_prefix(identity, layout, tokens);
  const SegmentChain chain{identity.digest(), layout_digest(layout), loaded.segments, tokens};
  RunLoader loader(*this, layout, chain, nullptr, options);
  loader.open(int64_t(loaded.segments.size()) * kSegmentTokens);
  loader.read();
  const auto n = size_t(loader.usable_tokens());
  loaded.snapshot = {identity, layout, {tokens.begin(), tokens.begin() + ptrdiff_t(n)}, loader.take()};
  loaded.segments.resize(n / kSegmentTokens);
  loaded.bytes_read = loader.bytes_read();
  return loaded;
}

SaveResult Store::Impl::save_prefix(const KvSnapshot& snapshot, Durability durability) {
  check_storable(snapshot);
  Writing writing(*this);
  SegmentWriter segments(*this, snapshot);
  writing.make_room("Keeping a prefix of " + std::to_string(snapshot.tokens.size()) + " tokens", segments.bytes_to_write(),
                    segments.names());
  SaveResult result;
  segments.write_missing(durability == Durability::kFull, result);
  return result;
}

std::optional<KvRun> Store::Impl::map_segment(const std::string& name) {
  const auto file = known.file(name);
  if (!file || !file->whole) return std::nullopt;
  try {
    const File handle = env.open(segment_path(name), OpenMode::kRead);
    const FileStat stat = handle.stat();
    if (stat != file->stat) return std::nullopt;
    const auto held = known.rows_of(name);
    if (held && held->run.mapped && held->content == file->content) return held->run;
    const SegmentFile segment = parse_segment_file(read_header_bytes(handle, stat.size), stat.size, handle.path().string());
    const auto mapping = segment.content() == file->content ? handle.map(stat.size) : nullptr;
    if (mapping == nullptr) return std::nullopt;
    const size_t size = size_t(segment.file.rows_bytes());
    const KvRun run{kSegmentTokens, {mapping.get() + segment.file.header.data_start, size}, mapping, true};
    known.add_rows({name, segment.variant, file->content, run, TensorMask(segment.file.layout.tensors.size(), true)});
    return run;
  } catch (const Error&) {
    return std::nullopt;  // gone, or another one
  }
}

}  // namespace torpor
