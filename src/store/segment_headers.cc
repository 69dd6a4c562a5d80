#include "store/segment_headers.h"

#include <algorithm>
#include <array>

#include "torpor/error.h"

namespace torpor {
namespace {

constexpr std::array<std::string_view, 4> kKeys = {"checksum", "parent", "variant", "checksums"};

void replace_metadata(TorporFile& file, std::string_view key, std::string value) {
  for (auto& [name, text] : file.header.metadata) {
    if (name == key) text = std::move(value);
  }
}

}  // namespace

SegmentFile SegmentHeaders::parse(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name) {
  std::shared_ptr<const Parsed> parsed;
  {
    const MutexLock lock(mutex_);
    parsed = parsed_;
  }
  const size_t data_start = size_t(safetensors_data_start(prefix, file_size, file_name));
  const std::string_view header(reinterpret_cast<const char*>(prefix.data()), std::min(data_start, prefix.size()));
  if (parsed != nullptr && parsed->file_size == file_size && alike(*parsed, header)) {
    std::array<std::string, kKeys.size()> texts;
    for (size_t i = 0; i < kKeys.size(); ++i) texts[i] = header.substr(parsed->values[i].begin, parsed->values[i].size);
    const auto& [checksum, parent, variant, checksums] = texts;
    SegmentFile segment = parsed->segment;
    segment.file.checksums = split(checksums);
    // Digits and commas mean the same in JSON as they do here; anything else is for the parser to judge.
    if (is_hex_digest(checksum) && is_hex_digest(parent) && (variant.empty() || variant == segment.content()) &&
        segment.file.checksums.size() == parsed->segment.file.checksums.size() &&
        std::all_of(segment.file.checksums.begin(), segment.file.checksums.end(), is_hex_digest)) {
      segment.file.checksum = check_header_checksum(prefix.first(data_start), file_name);
      segment.parent = parent;
      segment.variant = variant;
      for (size_t i = 0; i < kKeys.size(); ++i) replace_metadata(segment.file, kKeys[i], texts[i]);
      return segment;
    }
  }
  SegmentFile segment = parse_segment_file(prefix, file_size, file_name);
  if (parsed == nullptr && !segment.parent.empty()) {
    parsed = remember(header, file_size, segment);
    const MutexLock lock(mutex_);
    parsed_ = parsed;
  }
  return segment;
}

std::shared_ptr<const SegmentHeaders::Parsed> SegmentHeaders::remember(std::string_view header, uint64_t file_size,
                                                                       const SegmentFile& segment) {
  auto parsed = std::make_shared<Parsed>(Parsed{std::string(header), file_size, {}, segment});
  size_t at = 0;
  for (const std::string_view key : kKeys) {
    const std::string& text = *segment.file.header.metadata_value(key);
    const std::string field = std::string(1, '"').append(key).append("\":\"");
    const size_t found = header.find(field);
    // Written by somebody else, in another order or with the same text elsewhere: not taken as a pattern.
    if (found == std::string_view::npos || found < at || header.find(field, found + 1) != std::string_view::npos ||
        header.substr(found + field.size(), text.size()) != text) {
      return nullptr;
    }
    parsed->values.push_back({found + field.size(), text.size()});
    at = found + field.size() + text.size();
  }
  return parsed;
}

bool SegmentHeaders::alike(const Parsed& parsed, std::string_view header) {
  const std::string_view known = parsed.header;
  if (header.size() != known.size()) return false;
  size_t at = 0;
  for (const Value& value : parsed.values) {
    if (header.substr(at, value.begin - at) != known.substr(at, value.begin - at)) return false;
    at = value.begin + value.size;
  }
  return header.substr(at) == known.substr(at);
}

OpenedSegment open_segment(const FilePool& pool, const std::string& name, const SegmentPlace& place,
                           SegmentHeaders& headers) {
  File handle = pool.open(name);
  const FileStat stat = handle.stat();
  SegmentFile segment = headers.parse(read_header_bytes(handle, stat.size), stat.size, handle.path().string());
  if (segment.lineage != place.lineage) corrupt(handle.path().string(), "it belongs to another model");
  if (layout_digest(segment.file.layout, segment.file.version) != place.layout_digest) {
    corrupt(handle.path().string(), "its layout is not the agent's");
  }
  if (segment.parent != place.parent) corrupt(handle.path().string(), "it does not follow the segment before it");
  const auto tokens = read_tokens(handle, segment.file);
  if (!std::equal(tokens.begin(), tokens.end(), place.tokens.begin(), place.tokens.end())) {
    corrupt(handle.path().string(), "its tokens are not the agent's");
  }
  if (segment_name(place, segment.variant) != name) {
    corrupt(handle.path().string(), "its name is not that of its contents");
  }
  return {std::move(handle), stat, std::move(segment)};
}

}  // namespace torpor
