#pragma once
/// The sealed runs of a snapshot on their way to disk.

#include <map>
#include <optional>
#include <vector>

#include "store/planned_file.h"
#include "store/segment_headers.h"
#include "store/store_impl.h"
#include "store/writing.h"

namespace torpor {

class SegmentWriter {
 public:
  /// Gives every sealed run its name, and finds out which are on disk already. `rows`: where they are when they are not the
  /// snapshot's; else nullptr. Both must outlive the writer.
  SegmentWriter(Store::Impl& store, const KvSnapshot& snapshot, const BorrowedRows* rows);

  /// Looks again what is on disk.
  void plan();
  /// Those that are, as they were when they were looked at.
  std::vector<StoredFile> found() const { return stored_files(segments_, false); }
  /// Bytes of the files that are missing.
  int64_t bytes_to_write() const { return missing_bytes_of(segments_); }
  /// Bytes of all of them, those to be written included.
  int64_t bytes() const { return bytes_of(segments_); }
  std::vector<std::string> names() const { return names_of(segments_); }
  /// The snapshot's, those that stood for unknown ones replaced where they are sealed.
  std::span<const int32_t> tokens() const { return tokens_; }
  /// Writes what is missing, when `writing` has claimed all names; with `durable` all segments are on the disk when this returns. Names may change: another save
  /// may have taken one meanwhile, for the same tokens and other rows.
  void write_missing(bool durable, Writing& writing, SaveResult& result);

 private:
  struct Planned : PlannedFile {
    std::shared_ptr<const SealedRun> run;          ///< nullptr: the rows are borrowed
    const BorrowedRows::Run* borrowed = nullptr;   ///< else nullptr
    std::vector<std::span<const std::byte>> rows;  ///< either's bytes
    SegmentPlace place;
    std::shared_ptr<const SealedRun::Segment> origin;  ///< where the rows came from, or went to before
  };

  std::vector<std::span<const std::byte>> rows_of(size_t i) const;
  void name_unknown_tokens();
  size_t header_size(const Planned& segment);
  void choose_name(Planned& segment);
  /// Whether the caller's own word for the segment that the rows are can be taken.
  bool take_hint(Planned& segment);
  FoundFile look_up(Planned& segment);
  /// Tells the run where its rows are.
  void remember(const Planned& segment, const std::string& content);
  const std::vector<std::string>& checksums_of(Planned& segment);
  std::string content_of(Planned& segment) { return content_digest(checksums_of(segment)); }
  /// False when a name was taken meanwhile: from there on nothing was put in place.
  bool put_missing(bool durable, SaveResult& result);
  TemporaryFile write(Planned& segment, bool durable);

  Store::Impl& store_;
  const KvSnapshot& snapshot_;
  const KvLayout together_;  ///< the tensors that segments hold
  const BorrowedRows* const borrowed_;
  std::vector<int32_t> tokens_;
  std::vector<std::vector<std::string>> checksums_;  ///< of the sealed runs
  SegmentHeaders headers_;
  std::map<std::pair<size_t, size_t>, size_t> header_sizes_;  ///< by the lengths of parent and variant
  std::vector<Planned> segments_;
};

}  // namespace torpor
