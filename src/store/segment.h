#pragma once
/// Segments: the rows of 256 consecutive tokens, immutable, shared by every agent with the same prefix.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "store/torpor_file.h"

namespace torpor {

/// Where a run stands: what its segment's name is made of.
struct SegmentPlace {
  std::string identity_digest;
  std::string layout_digest;
  std::string parent;  ///< name of the segment before it; empty for the first
  std::span<const int32_t> tokens;
};

/// Where each of a sequence of segments stands. The digests are of the identity and layout that all share.
struct SegmentChain {
  std::string identity_digest, layout_digest;
  std::span<const std::string> names;
  std::span<const int32_t> tokens;  ///< at least those of all segments
  SegmentPlace place(size_t i) const {
    return {identity_digest, layout_digest, i == 0 ? "" : names[i - 1],
            tokens.subspan(i * kSegmentTokens, kSegmentTokens)};
  }
};

/// `variant` is empty, or the content digest of rows that differ from those already stored under the plain name. That
/// happens only where the same tokens need not give the same bits (Metal, CUDA); there too an agent gets back its own.
std::string segment_name(const SegmentPlace& place, const std::string& variant);

/// Digest of the layer tensors' checksums.
std::string content_digest(const std::vector<std::string>& layer_checksums);

struct SegmentFile {
  TorporFile file;
  std::string parent, identity_digest, variant;
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

class SegmentHeaders;
/// Opens segment `name`, and checks all of it but its rows: header, name, place, tokens. `headers`: one for all segments of a
/// chain. kNotFound, kCorruption, kIo.
OpenedSegment open_segment(Env& env, const std::filesystem::path& path, const std::string& name,
                           const SegmentPlace& place, SegmentHeaders& headers);

std::string encode_segment_header(const SegmentPlace& place, const std::string& variant, const KvLayout& layout,
                                  const std::vector<std::string>& layer_checksums);

}  // namespace torpor
