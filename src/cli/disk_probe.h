#pragma once
/// What a directory's file system does for a store, tried and measured with files that are removed again.

#include <cstdint>
#include <filesystem>
#include <string>

#include "base/env.h"

namespace torpor::cli {

struct DiskProbe {
  bool writable = false;
  std::string problem;           ///< a sentence: what could not be done; what follows is then unknown
  bool measured = false;         ///< there was room to measure the rates
  double write_bytes_per_s = 0;  ///< to the disk: a flush counts
  double read_bytes_per_s = 0;   ///< from the disk, as far as the system lets go of its copy
  double flush_ms = 0;           ///< median of appending 4 KiB and flushing them
  bool locks = false;            ///< flock keeps a second owner out
  bool tells_case = false;       ///< `A` and `a` are two files
  bool remote = false;           ///< over a network, or served by a program (FUSE)
};

/// Takes about a second on a disk of 100 MB/s. Its file has the name of a temporary one: a store's gc removes what a
/// killed process left. Throws nothing for what the file system can't do.
DiskProbe probe_disk(Env& env, const std::filesystem::path& directory);

}  // namespace torpor::cli
