#pragma once
/// Teams, each a JSON file with its own checksum (docs/format.md, "Teams"). What the JSON says is src/teams' to know.

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/env.h"
#include "torpor/store.h"

namespace torpor {

/// Thread-safe. kIo, and where it says so kNotFound and kCorruption.
class TeamFiles {
 public:
  /// `env` must outlive it.
  TeamFiles(Env& env, const std::filesystem::path& root) : env_(env), directory_(root / "teams") {}

  const std::filesystem::path& directory() const { return directory_; }
  /// kInvalidArgument for what is no id.
  std::filesystem::path path(const std::string& id) const;
  /// Puts it in place. `durable`: it survives a power cut. `is_new`: kInvalidArgument, with kTeamTaken, when the name
  /// is taken; of several makers at once one succeeds.
  FileStat write(const std::string& id, std::string_view json, bool is_new, bool durable);
  /// The JSON, with its checksum. kNotFound, kCorruption.
  std::string read(const std::string& id) const;
  bool remove(const std::string& id, bool durable);
  /// Ids, sorted.
  std::vector<std::string> list() const;
  std::vector<std::filesystem::path> temporary_files() const;
  /// Names of files in the directory that are the store's.
  std::vector<std::string> files() const;

 private:
  Env& env_;
  const std::filesystem::path directory_;
};

}  // namespace torpor
