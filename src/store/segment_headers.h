#pragma once
/// Headers of segments that are read one after another.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "store/file_pool.h"
#include "store/segment.h"

namespace torpor {

/// Parses segment files' headers as parse_segment_file does. The segments of one agent differ in four values of a known
/// length. If a header equals the first one but for these values, the first one's parse is used again. Thread-safe.
class SegmentHeaders {
 public:
  SegmentFile parse(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);

 private:
  /// The text of a value in the header.
  struct Value {
    size_t begin = 0, size = 0;
  };
  struct Parsed {
    std::string header;
    uint64_t file_size = 0;
    std::vector<Value> values;  ///< `checksum`, `parent`, `variant`, `checksums`: in the order of the file
    SegmentFile segment;
  };
  static std::shared_ptr<const Parsed> remember(std::string_view header, uint64_t file_size, const SegmentFile& segment);
  static bool alike(const Parsed& parsed, std::string_view header);

  Mutex mutex_;
  std::shared_ptr<const Parsed> parsed_ TORPOR_GUARDED_BY(mutex_);
};

/// Opens a segment and checks all of it but its rows: header, name, place, tokens. `headers`: one for all of a chain.
/// kNotFound, kCorruption.
OpenedSegment open_segment(const FilePool& pool, const std::string& name, const SegmentPlace& place,
                           SegmentHeaders& headers);

}  // namespace torpor
