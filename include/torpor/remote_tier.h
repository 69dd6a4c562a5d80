#pragma once
/// Where an Engine's agents have their state beyond this machine. An Engine asks before it opens an agent, and after
/// each save. torpor/remote.h makes one of an object store.
///
/// A tier moves agents into and out of the store that the Engine works on. That store is its cache: what is there of an
/// agent between `open` and `done` is what was committed, or goes on from it.
///
/// Thread-safe. Calls may wait for a network, and are never made on the engine thread, but for `owns`, `alive` and
/// `answered`.

#include <memory>
#include <optional>
#include <string>

namespace torpor {

/// Error::field of the kBusy of an agent that another worker has; Error::found is where to ask it, or empty.
inline constexpr const char* kAgentElsewhere = "owner";
/// Error::field of the kBusy of an agent whose last change may be committed or not. A turn with an id may be asked for
/// again. The agent is then as its last commit left it.
inline constexpr const char* kUncommitted = "commit";

/// A turn as a tier knows it again.
struct KnownTurn {
  std::string id;      ///< the client's, at most 256 bytes of UTF-8; empty: it has none
  std::string digest;  ///< of what was asked, 32 hex digits
  std::string result;  ///< of a turn that is over: at most 512 bytes of UTF-8, the Engine's own form
};

class RemoteTier {
 public:
  virtual ~RemoteTier() = default;

  /// Whether the agent is this worker's as far as it knows: memory may hold it. False after a commit that failed.
  virtual bool owns(const std::string& agent) const = 0;
  /// Makes the agent this worker's, and brings the store's copy to the last commit; nobody has the agent awake. Nothing
  /// is asked of the network where it is this worker's. False: there is none, and with `make` none was begun. Each call
  /// that gives true is followed by one of `done`. kBusy: it is awake elsewhere (kAgentElsewhere), or locked here.
  /// kIncompatible: the store has an agent of that name that the tier knows nothing of. kIo, kCorruption.
  virtual bool open(const std::string& agent, bool make) = 0;
  /// The end of a use.
  virtual void done(const std::string& agent) noexcept = 0;
  /// Between open and done: the result of the turn, if it was committed. kBusy: the agent is not this worker's any more.
  /// kInvalidArgument: its id was another request's, or the agent has changed since.
  virtual std::optional<std::string> answered(const std::string& agent, const KnownTurn& turn) const = 0;
  /// Between open and done: what the store has of the agent is committed, and with `turn`, which it ends with, that the
  /// turn was. A tier may commit a turn later: before the next `open` returns. kBusy: it was not committed, or nobody
  /// knows (kAgentElsewhere, kUncommitted).
  virtual void commit(const std::string& agent, const std::optional<KnownTurn>& turn) = 0;
  /// Between open and done: from now on there is no such agent. The caller then removes the store's copy.
  virtual void remove(const std::string& agent) = 0;
  /// Whether it may open and commit. Once false it stays so, and everything is kBusy: others may have its agents.
  virtual bool alive() const = 0;
  /// Lets another worker have the agent, unless somebody uses it. It is not awake. One that was begun and never
  /// committed goes. Errors are told to the log.
  virtual void close(const std::string& agent) noexcept = 0;
  /// For lack of room on the disk: removes the store's copy of an agent that nobody uses and that has been committed as
  /// it is, the one that was saved first. False: there is none, or the store can't be read.
  virtual bool make_room() noexcept = 0;
};

}  // namespace torpor
