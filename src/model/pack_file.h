#pragma once
/// Packed weights on disk, so that the next start neither packs nor holds in memory of its own what it can map.
///
/// A file `packed/KEY.weights` in cache_directory(): the pieces in the order in which a model packs them, each at a
/// multiple of 64; an index, JSON `{"pieces": [[fingerprint, offset, size, checksum], ...], "of": [[path, size, mtime],
/// ...]}` with the files of the model; and 80 bytes at the end, KEY and the index's offset, size and checksum. A
/// checksum is the XXH3-128 of those of each 4 MiB. KEY is made of the model's identity and of how its weights are packed. There
/// is one file for each model: a new one takes the place of others of the same files.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/weight_memory.h"

namespace torpor::model {

/// One thread at a time.
class PackFile {
 public:
  /// The file of KEY if there is one; else a new one, unless `bytes`, about what it will take, are more than half of
  /// the disk's free space. nullptr when neither can be had: weights are packed in memory then, and a log handler is told.
  static std::unique_ptr<PackFile> open(const std::string& key, const std::vector<std::filesystem::path>& of,
                                        uint64_t bytes);
  virtual ~PackFile() = default;
  /// Reads all of the file of KEY. A sentence when it is not as it was written, empty when it is; nullopt: there is
  /// none.
  static std::optional<std::string> check(const std::string& key);

  /// Weights that every token reads: in memory, in large pages.
  virtual kernels::WeightMemory& resident() = 0;
  /// Weights of which a token reads few: pages of the file, which the system drops and reads again as it needs room.
  virtual kernels::WeightMemory& mapped() = 0;
  /// All weights have been packed: the memories are used no more. A new file is written, flushed and put in place on a
  /// thread of its own. The end of the process waits for it. A file that is destroyed without this is not kept.
  static void finish(std::unique_ptr<PackFile> file);

 private:
  virtual void complete() = 0;
};

}  // namespace torpor::model
