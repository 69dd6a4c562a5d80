#pragma once
/// The states of a snapshot on their way to disk, and those that are there.

#include <optional>
#include <string>
#include <vector>

#include "store/planned_file.h"
#include "store/state_file.h"
#include "store/store_impl.h"
#include "store/writing.h"

namespace torpor {

/// Of a layout with tensors kept apart: gives the snapshot, as states to be written, the rows that the windows of its
/// last token see, where it has them and `kept` has no file of them that is there.
void add_windows(Store::Impl& store, KvSnapshot& snapshot, std::span<const StateRef> kept);

class StateWriter {
 public:
  /// `kept`: states of the agent on disk, beside the snapshot's. All must outlive the writer.
  StateWriter(Store::Impl& store, const KvSnapshot& snapshot, std::span<const StateRef> kept);

  /// Gives each state its name, and finds out which are on disk. `segments`: names of all that hold `tokens`.
  void plan(std::span<const int32_t> tokens, std::vector<std::string> segments);
  /// Those that are, as they were when they were looked at.
  std::vector<StoredFile> found() const { return stored_files(states_, false); }
  /// Bytes of the files that are missing, and of all.
  int64_t bytes_to_write() const { return missing_bytes_of(states_); }
  int64_t bytes() const { return bytes_of(states_); }
  /// All of them by position. nullopt: the snapshot is of a model without recurrent layers.
  std::optional<std::vector<StateRef>> refs() const;
  /// Writes what is missing when `writing` has claimed all names, and all segments are in place; with `durable` all are
  /// on the disk when this returns. Names may change, as SegmentWriter's.
  void write_missing(bool durable, Writing& writing, SaveResult& result);

 private:
  struct Planned : PlannedFile {
    std::shared_ptr<const StateCheckpoint> state;  ///< nullptr: one of `kept`
    int64_t position = 0;
    StatePlace place;
  };

  void choose_name(Planned& planned, const StateChain& chain);
  FoundFile look_up(Planned& planned, const StateChain& chain);
  const std::vector<std::string>& checksums_of(Planned& planned);
  std::string header_of(Planned& planned);
  bool put_missing(bool durable, SaveResult& result);

  Store::Impl& store_;
  const KvSnapshot& snapshot_;
  const std::span<const StateRef> kept_;
  const std::string state_digest_;
  std::span<const int32_t> tokens_;
  std::vector<std::string> segments_;
  std::vector<std::vector<std::string>> checksums_;  ///< of the snapshot's states
  std::vector<Planned> states_;                      ///< by position
};

}  // namespace torpor
