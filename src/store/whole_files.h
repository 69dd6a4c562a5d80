#pragma once
/// An agent's files as they are on disk: taken out of a store, and put into one, every byte of them checked. For who
/// keeps copies elsewhere.
///
/// A file is named by its path in the store without ".safetensors": segments/ab/NAME, states/ab/NAME, parts/UID-NAME.

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "torpor/store.h"

namespace torpor {

/// What an agent file says.
struct AgentContents {
  AgentInfo info;
  std::string checksum;            ///< AgentInfo::hash
  std::vector<std::string> files;  ///< paths of all that it names: segments, states, parts
  int64_t segment_bytes = 0;       ///< about what a segment has
};

/// Checks every byte of an agent file; `name` is what errors call it. kCorruption, kIncompatible.
AgentContents check_agent_file(std::span<const std::byte> bytes, const std::string& name);
/// The checksum of the file that an agent file was made of, where its tail was left out; else its own. Empty: it can't
/// be read.
std::string checksum_of_whole(std::span<const std::byte> bytes);
/// Checks every byte of the file that a store would have at `path`, and that what it holds is what its path says. Gives
/// its checksum. kCorruption, kIncompatible.
std::string check_whole_file(const std::string& path, std::span<const std::byte> bytes, const std::string& name);
/// Whether it is the path of such a file.
bool is_file_path(const std::string& path);

/// Bytes of a file, mapped where that can be had.
struct WholeFile {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;
};

/// Thread-safe. To a store's locks and limits it is as another process: it knows the limits that the store keeps, not
/// those of one Store, and its own.
class WholeFiles {
 public:
  explicit WholeFiles(const Store& store);
  ~WholeFiles();

  /// Store::set_disk_limits, for Arrivals. kInvalidArgument.
  void set_disk_limits(const DiskLimits& limits);
  /// The agent file of the last save, checked. kNotFound, kCorruption.
  std::string agent_file(const std::string& id) const;
  /// As agent_file, without rows behind the last segment: ids and messages of what had them are in it, and who wakes
  /// it computes the rows. States behind that segment are left out. nullopt: there are no such rows, or they can't be
  /// computed from its ids.
  std::optional<std::string> agent_file_without_tail(const std::string& id) const;
  /// Bytes [37, 69) of a file: its checksum as it says it is. kNotFound, kCorruption.
  std::string checksum(const std::string& path) const;
  /// All of it, checked. kNotFound, kCorruption.
  WholeFile read(const std::string& path) const;

  struct Impl;

 private:
  friend class Arrival;
  std::unique_ptr<Impl> impl_;
};

/// An agent on its way into a store. Until `commit` the agent there is as it was; what was put stays for others' use,
/// or for gc. The agent's lock is held. Not thread-safe but for `put`.
class Arrival {
 public:
  /// kBusy: the agent is awake. kInvalidArgument: its name is another's file. kCorruption: the bytes are no agent file,
  /// or another agent's; errors call them `name`.
  Arrival(WholeFiles& files, const std::string& id, std::string agent_file, const std::string& name);
  ~Arrival();

  const AgentContents& contents() const;
  /// Paths of the files that the store lacks. From now on those that it has stay. With `check` they are read, and a
  /// damaged one is missing. kResourceExhausted: there is no room for the rest.
  std::vector<std::string> missing(bool check);
  /// Puts a missing file in place, checked; errors call it `name`. Any thread. kCorruption; kIncompatible: the store
  /// has another one under its name meanwhile.
  void put(const std::string& path, std::span<const std::byte> bytes, const std::string& name, Durability durability);
  /// The agent file's rename is the commit. Files that it names may be missing, as after damage.
  void commit(Durability durability);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace torpor
