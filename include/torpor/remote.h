#pragma once
/// Agents in an object store, which several machines share (docs/fleet.md).
///
///     EngineOptions options;
///     options.model = "…";
///     options.remote = attach_remote({.url = "s3://bucket/prefix", .store = options.store});
///     Engine engine(options);
///
/// Each agent has one owner at a time. Whoever opens an agent that nobody has, or whose owner is gone, becomes it: the
/// store's copy is brought to the last commit, and what is missing read. A turn ends with its commit (RemoteAck).

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "torpor/remote_tier.h"
#include "torpor/store.h"

namespace torpor {

/// When the rows behind an agent's last segment go to the bucket. Its ids and messages go with each commit.
enum class RemoteTail {
  kTurn,   ///< with each commit
  kSleep,  ///< when the worker lets go of it; who takes it over from a worker that died computes them again
};

/// When a turn is over.
enum class RemoteAck {
  kCommit,  ///< when the bucket has it
  /// When the store has it, as durable as `durability` says. Its commit follows, and the agent's next use waits for it.
  /// Until then the turn is lost with the disk, or with the worker if another one takes the agent over. An agent's
  /// first turn, and whatever is no turn, waits for the bucket all the same.
  kLocal,
};

struct RemoteOptions {
  std::string url;  ///< s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX; credentials: docs/fleet.md
  std::filesystem::path store = default_store_root();  ///< the Engine's
  /// Where this worker's agents are asked for ("http://10.0.0.7:8080"), told to who asks elsewhere. Empty: nowhere.
  std::string address;
  /// A worker that can't renew its lease for so long opens and commits nothing any more (RemoteTier::alive). Others take
  /// its agents over a quarter later. All workers of a bucket should have the same.
  std::chrono::milliseconds ttl{10'000};
  Durability durability = Durability::kFull;  ///< of what is written to the store
  DiskLimits disk = {};  ///< the Engine's: what is brought here counts, too
  RemoteTail tail = RemoteTail::kTurn;
  RemoteAck ack = RemoteAck::kCommit;
  /// Prints the key that the bucket is sealed with (docs/fleet.md, "A sealed bucket"): a command of the shell, run once.
  /// Empty: $TORPOR_KEY_COMMAND; where that is empty, too, the bucket is not sealed.
  std::string key_command = {};
  std::function<void()> on_end;  ///< called once, on a thread of the tier's, when it is not alive any more; may be empty
};

/// A worker of its own, with a lease and a thread that renews it. Its destructor, which comes after the Engine's, waits
/// for commits and lets others have its agents. kInvalidArgument: the URL or the environment can't be used, the store's
/// conditional writes don't hold, the bucket is sealed with another key or none, or this build has no client of object
/// stores. kNotFound: no such bucket. kIo.
std::shared_ptr<RemoteTier> attach_remote(const RemoteOptions& options);

}  // namespace torpor
