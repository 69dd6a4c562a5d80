#pragma once
/// What programs keep beside the agents, each a file whose name says when it expires (docs/format.md, "Records").

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/env.h"
#include "store/sweep.h"
#include "torpor/store.h"

namespace torpor {

/// Thread-safe. kIo, and where it says so kNotFound and kCorruption.
class Records {
 public:
  /// `env` must outlive it.
  Records(Env& env, const std::filesystem::path& root) : env_(env), directory_(root / "records") {}

  const std::filesystem::path& directory() const { return directory_; }
  /// Bytes of a file beside its record's.
  static constexpr int64_t kHeader = 33;

  /// kInvalidArgument for what is no name.
  std::filesystem::path path(const Record& record) const;
  /// Puts it in place. `durable`: it survives a power cut.
  FileStat write(const Record& record, std::string_view bytes, bool durable);
  /// kNotFound, kCorruption.
  std::string read(const Record& record) const;
  bool remove(const Record& record, bool durable);
  /// All, the oldest first.
  std::vector<Record> list() const;
  /// Those that have expired.
  std::vector<Removable> expired() const;
  std::vector<std::filesystem::path> temporary_files() const;
  /// Names of files in the directory that are the store's.
  std::vector<std::string> files() const;

 private:
  Env& env_;
  const std::filesystem::path directory_;
};

}  // namespace torpor
