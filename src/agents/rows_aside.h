#pragma once
/// The rows of a turn that somebody else needs the memory of, in a file until the turn goes on.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/env.h"
#include "cache/ledger.h"
#include "torpor/cache.h"

namespace torpor {

/// The file has no name, so it is gone with this object and with the process. It is not flushed: its rows are of no use to another
/// process. Checksums stay in memory, and nothing is given back that differs. Pages of segment files are not written again.
/// Engine thread only.
class RowsAside {
 public:
  /// Writes the cache's rows. kIo, or kResourceExhausted when the disk is full.
  RowsAside(Env& env, const std::filesystem::path& directory, const KvCache& cache);

  int length() const noexcept { return int(snapshot_.tokens.size()); }
  const std::vector<int32_t>& tokens() const noexcept { return snapshot_.tokens; }
  /// Bytes of memory that `restore` takes. `ledger` tells which runs others hold.
  size_t bytes(const KvLedger& ledger, Backend backend) const;
  /// The cache as it was. kCorruption when the file holds something else by now. May be called again.
  std::unique_ptr<KvCache> restore(Backend backend) const;

 private:
  struct Run {
    uint64_t offset = 0;
    size_t size = 0;
    std::string checksum;
    std::weak_ptr<const SealedRun> run;  ///< as long as another cache has it, it is shared again
    TensorMask checked;
    std::shared_ptr<const SealedRun::Segment> segment;
  };

  std::shared_ptr<std::byte> read(const Run& run, size_t size, const BufferAllocator& allocate) const;

  struct State {
    int64_t position = 0;
    Run stored;
    std::weak_ptr<const StateCheckpoint> state;  ///< likewise
    std::string file;
  };

  KvSnapshot snapshot_;     ///< runs that are in the file are nullptr, and no states
  bool keeps_state_ = false;  ///< KvCache::keeps_state
  std::vector<State> states_;
  std::vector<Run> runs_;   ///< one per run of the snapshot, the tail last; of no meaning for mapped ones
  size_t tail_bytes_ = 0;
  std::unique_ptr<File> file_;
};

}  // namespace torpor
