#include "store/segment.h"

#include "base/hash.h"
#include "torpor/error.h"

namespace torpor {
namespace {

/// Under which key a segment's file has its lineage.
const char* lineage_key(int version) { return version < 3 ? "identity_digest" : "lineage"; }

}  // namespace

std::string segment_name(const SegmentPlace& place, const std::string& variant) {
  Hasher hasher;
  hasher.update_field(place.old_names ? "torpor segment 1" : "torpor segment 3")
      .update_field(place.lineage)
      .update_field(place.layout_digest)
      .update_field(place.parent)
      .update_field(variant);
  if (!place.old_names) hasher.update_field("");  // the digests of its images and sounds
  return hasher.update(token_bytes(place.tokens)).hex();
}

std::string lineage_digest(const Identity& identity, const Lineage& lineage, int64_t position) {
  Hasher hasher;
  if (lineage.old_names) {
    // "+int8" is what old versions added for their int8 rows. Rows of other integers get a suffix that none of them wrote.
    const std::string& numerics = lineage.numerics_at(position);
    std::string suffix;
    if (numerics.starts_with("int")) suffix.append("+").append(numerics, 0, numerics.find('/'));
    hasher.update_field("architecture").update_field(identity.architecture);
    hasher.update_field("config").update_field(identity.config + suffix);
    hasher.update_field("weights").update_field(identity.weights);
    hasher.update_field("tokenizer").update_field(lineage.old_names->tokenizer);
    hasher.update_field("chat_template").update_field(lineage.old_names->chat_template);
    hasher.update_field("rope").update_field(identity.rope);
    hasher.update_field("kv").update_field(identity.kv);
    return hasher.hex();
  }
  hasher.update_field("torpor lineage 3");
  for (const auto& [name, value] : identity.fields()) hasher.update_field(value);
  hasher.update_field(lineage.numerics_at(position)).update_field(lineage.salt);
  return hasher.hex();
}

SegmentChain::SegmentChain(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                           std::span<const std::string> chain_names, std::span<const int32_t> chain_tokens)
    : names(chain_names), tokens(chain_tokens), old_names_(lineage.old_names.has_value()),
      layout_digest_(torpor::layout_digest(layout, old_names_ ? kOldVersion : kFormatVersion)) {
  lineages_.emplace_back(0, lineage_digest(identity, lineage, 0));
  for (const Lineage::Range& range : lineage.ranges) {
    if (range.first > 0) lineages_.emplace_back(range.first, lineage_digest(identity, lineage, range.first));
  }
}

SegmentPlace SegmentChain::place(size_t i, std::string parent) const {
  const int64_t position = int64_t(i) * kSegmentTokens;
  const std::string* lineage = &lineages_.front().second;
  for (const auto& [first, digest] : lineages_) {
    if (first <= position) lineage = &digest;
  }
  return {old_names_, *lineage, layout_digest_, std::move(parent),
          tokens.empty() ? tokens : tokens.subspan(size_t(position), kSegmentTokens)};
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
  if (segment.file.has_messages) corrupt(file_name, "a segment holds messages");
  segment.parent = segment.file.required("parent", file_name);
  segment.lineage = segment.file.required(lineage_key(segment.file.version), file_name);
  segment.variant = segment.file.required("variant", file_name);
  if (!segment.variant.empty() && segment.variant != segment.content()) {
    corrupt(file_name, "its variant is not the digest of its rows");
  }
  return segment;
}

std::string encode_segment_header(const SegmentPlace& place, const std::string& variant, const KvLayout& layout,
                                  const std::vector<std::string>& layer_checksums) {
  auto checksums = layer_checksums;
  checksums.push_back(hash_hex(token_bytes(place.tokens)));
  const int version = place.old_names ? kOldVersion : kFormatVersion;
  return encode_torpor_header({.kind = "segment", .version = version,
                               .metadata = {{"parent", place.parent}, {lineage_key(version), place.lineage}, {"variant", variant}},
                               .rows = kSegmentTokens, .n_tokens = kSegmentTokens, .checksums = std::move(checksums)},
                              layout);
}

}  // namespace torpor
