#include "store/segment.h"

#include <algorithm>

#include "base/hash.h"
#include "store/segment_headers.h"
#include "torpor/error.h"

namespace torpor {
namespace {

[[noreturn]] void corrupt(const std::string& file_name, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "'" + file_name + "' is damaged: " + what + ".");
}

}  // namespace

std::string segment_name(const SegmentPlace& place, const std::string& variant) {
  Hasher hasher;
  hasher.update_field("torpor segment 1")
      .update_field(place.identity_digest)
      .update_field(place.layout_digest)
      .update_field(place.parent)
      .update_field(variant)
      .update(token_bytes(place.tokens));
  return hasher.hex();
}

std::string content_digest(const std::vector<std::string>& layer_checksums) { return hash_hex(join(layer_checksums)); }

std::string SegmentFile::content() const {
  return content_digest({file.checksums.begin(), file.checksums.end() - 1});
}

SegmentFile parse_segment_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name) {
  SegmentFile segment;
  segment.file = parse_torpor_file(prefix, file_size, file_name);
  if (segment.file.kind != "segment") corrupt(file_name, "it is of the kind '" + segment.file.kind + "', not a segment");
  if (segment.file.rows != kSegmentTokens || segment.file.n_tokens != kSegmentTokens) {
    corrupt(file_name, "a segment holds " + std::to_string(kSegmentTokens) + " tokens, it has " +
                           std::to_string(segment.file.n_tokens) + " and " + std::to_string(segment.file.rows) + " rows");
  }
  if (!segment.file.state().empty()) corrupt(file_name, "a segment holds state");
  segment.parent = segment.file.required("parent", file_name);
  segment.identity_digest = segment.file.required("identity_digest", file_name);
  segment.variant = segment.file.required("variant", file_name);
  if (!segment.variant.empty() && segment.variant != segment.content()) {
    corrupt(file_name, "its variant is not the digest of its rows");
  }
  return segment;
}

OpenedSegment open_segment(Env& env, const std::filesystem::path& path, const std::string& name,
                           const SegmentPlace& place, SegmentHeaders& headers) {
  File handle = env.open(path, OpenMode::kRead);
  const FileStat stat = handle.stat();
  const std::string file_name = path.string();
  SegmentFile segment = headers.parse(read_header_bytes(handle, stat.size), stat.size, file_name);
  if (segment.identity_digest != place.identity_digest) corrupt(file_name, "it belongs to another model");
  if (layout_digest(segment.file.layout) != place.layout_digest) corrupt(file_name, "its layout is not the agent's");
  if (segment.parent != place.parent) corrupt(file_name, "it does not follow the segment before it");
  const auto tokens = read_tokens(handle, segment.file);
  if (!std::equal(tokens.begin(), tokens.end(), place.tokens.begin(), place.tokens.end())) {
    corrupt(file_name, "its tokens are not the agent's");
  }
  if (segment_name(place, segment.variant) != name) corrupt(file_name, "its name is not that of its contents");
  return {std::move(handle), stat, std::move(segment)};
}

std::string encode_segment_header(const SegmentPlace& place, const std::string& variant, const KvLayout& layout,
                                  const std::vector<std::string>& layer_checksums) {
  auto checksums = layer_checksums;
  checksums.push_back(hash_hex(token_bytes(place.tokens)));
  return encode_torpor_header(
      "segment", {{"parent", place.parent}, {"identity_digest", place.identity_digest}, {"variant", variant}}, layout,
      kSegmentTokens, {}, kSegmentTokens, checksums);
}

}  // namespace torpor
