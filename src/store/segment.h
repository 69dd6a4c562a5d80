#pragma once
/// Segments: the rows of 256 consecutive tokens, immutable, shared by every agent with the same prefix.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "store/torpor_file.h"

namespace torpor {

/// Where a run stands: what its segment's name is made of.
struct SegmentPlace {
  bool old_names = false;     ///< as in format versions 1 and 2, and so are the files (Lineage::old_names)
  std::string lineage;        ///< lineage_digest
  std::string layout_digest;
  std::string parent;         ///< name of the segment before it; empty for the first
  std::span<const int32_t> tokens;
};

/// Digest of what the names of segments depend on beside layout and ids, for one that begins at `position`.
std::string lineage_digest(const Identity& identity, const Lineage& lineage, int64_t position);

/// Where each of a sequence of segments stands.
class SegmentChain {
 public:
  /// All must outlive the chain. `tokens`: at least those of all segments, or none: then places have none.
  SegmentChain(const Identity& identity, const Lineage& lineage, const KvLayout& layout, std::span<const std::string> names,
               std::span<const int32_t> tokens);
  std::span<const std::string> names;
  std::span<const int32_t> tokens;
  SegmentPlace place(size_t i) const { return place(i, i == 0 ? std::string() : names[i - 1]); }
  /// The same of one whose parent has no place in `names` yet.
  SegmentPlace place(size_t i, std::string parent) const;

 private:
  bool old_names_;
  std::string layout_digest_;
  std::vector<std::pair<int64_t, std::string>> lineages_;  ///< from which position on
};

/// `variant` is empty, or the content digest of rows that differ from those already stored under the plain name. That
/// happens only where the same tokens need not give the same bits (Metal, CUDA); there too an agent gets back its own.
std::string segment_name(const SegmentPlace& place, const std::string& variant);

/// Digest of the layer tensors' checksums.
std::string content_digest(const std::vector<std::string>& layer_checksums);

struct SegmentFile {
  TorporFile file;
  std::string parent, lineage, variant;
  std::string content() const;
  const std::string& last() const { return file.checksums[file.checksums.size() - 2]; }
};

/// Every rule that can be checked without the data.
SegmentFile parse_segment_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);

struct OpenedSegment {
  File handle;
  FileStat stat;
  SegmentFile segment;
};

std::string encode_segment_header(const SegmentPlace& place, const std::string& variant, const KvLayout& layout,
                                  const std::vector<std::string>& layer_checksums);

}  // namespace torpor
