#pragma once
/// Whose an agent is, and how a save is committed.
///
/// An agent's head is the only commit point. Whoever owns an agent replaces the head by compare-and-swap; that is the
/// commit, and so the fence: who has lost the agent can't commit, whatever clocks say. Owning means that the head names
/// one's session. Who takes over raises the epoch.
///
/// What a head names is never missing. The argument, with the sweeper's part of it, is in sweep.h. Here it asks this:
/// 1. A key that is in the pool once is never put again after it was removed: it ends in the generation it was put in.
/// 2. A save names a key of the pool only if (a) the head that it replaces names it, or (b) a head that it has read
///    since it began does, or (c) the key is of the generation that it began in. A save begins with
///    Generations::begin; the lease announces the oldest that is under way.
/// 3. The generation is read after an agent has become one's own, and before the next save of it.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "remote/operation.h"
#include "remote/records.h"

namespace torpor::remote {

/// Where the 32 digits of a store file's checksum begin: after the length, and `{"__metadata__":{"checksum":"`.
inline constexpr uint64_t kChecksumAt = 37, kChecksumDigits = 32;

/// A head, and the tag of the version that this is.
struct HeadVersion {
  Head head;
  std::string tag;
};

/// Which generations a worker's saves began in. Not thread-safe.
class Generations {
 public:
  void learn(int64_t generation) { newest_ = std::max(newest_, generation); }
  int64_t newest() const { return newest_; }
  /// A save begins: the generation that its new keys are of.
  int64_t begin() { return *under_way_.insert(newest_); }
  void end(int64_t generation) { under_way_.erase(under_way_.find(generation)); }
  /// What the lease says.
  int64_t announced() const { return under_way_.empty() ? newest_ : *under_way_.begin(); }

 private:
  int64_t newest_ = 0;
  std::multiset<int64_t> under_way_;
};

/// Whether an owner may be taken over from: LeaseWatch::is_gone, or because the caller knows that the process has
/// ended. False while that is not known.
using IsGone = std::function<bool(const std::string& session)>;

enum class Make {
  kNever,   ///< the agent is to be there
  kAlways,  ///< it is to be new
  kAbsent,  ///< made where it is not there
};

struct Acquired {
  enum class Outcome {
    kOwned,    ///< `version` names this session
    kAbsent,   ///< no such agent
    kTaken,    ///< there is such an agent, or somebody made one just now
    kMoved,    ///< `version.head.owner` has it and is alive
    kUnknown,  ///< no answers came; ask again later
  };
  Outcome outcome = Outcome::kUnknown;
  HeadVersion version;
  int64_t generation = 0;  ///< of kOwned, for Generations::learn: read after the agent was one's own
};

/// Takes an agent that is free, this session's, or of an owner that is gone.
/// `save_id`: 32 hex digits that nobody else draws.
Operation<Acquired> acquire(Exchange& exchange, std::string agent, std::string session, Make make, std::string save_id,
                            IsGone is_gone);

/// An object of the pool that may be in the bucket or not.
struct Upload {
  std::string path;     ///< PoolName::path
  std::string content;  ///< the file's checksum, 32 hex digits
  size_t blob = 0;      ///< the caller's number for its bytes
};

struct SaveRequest {
  std::string agent;
  std::string save_id;             ///< 32 hex digits that nobody else draws
  std::vector<std::string> kept = {};  ///< keys by 2 (a) and (b) above
  std::vector<Upload> uploads = {};
  size_t agent_file = 0;           ///< the caller's number for its bytes
  std::optional<Turn> turn = {};   ///< that the agent ends with: a new one, or the head's; nullopt: it has no id
};

struct Saved {
  enum class Outcome {
    kCommitted,  ///< `version` is the new head
    kMoved,      ///< the head is another one: what is in memory of the agent is old
    kUnknown,    ///< it may stand, or come to stand; what is in memory of the agent may be old
    kVariant,    ///< of `taken`, other bytes are in the bucket under their names; nothing was committed
  };
  Outcome outcome = Outcome::kUnknown;
  HeadVersion version;
  std::vector<std::string> keys;   ///< of kCommitted: `kept`, then those of `uploads`
  std::vector<std::string> taken;  ///< paths
  int64_t uploaded = 0;            ///< uploads that were sent: the others were there
};

/// Looks which uploads are there, puts what is missing, then the save object, then swaps the head. `generation`:
/// Generations::begin's.
Operation<Saved> save(Exchange& exchange, HeadVersion version, SaveRequest request, int64_t generation);

/// A swap of the head that keeps the file. kVariant is never the outcome.
Operation<Saved> release(Exchange& exchange, std::string agent, HeadVersion version, std::string save_id);
/// Leaves a tombstone: the name may be used again, and what it named is swept.
Operation<Saved> remove_agent(Exchange& exchange, std::string agent, HeadVersion version, std::string save_id);

/// An agent as its head says it is.
struct ReadSave {
  HeadVersion version;
  std::vector<std::string> keys;
  std::string agent_file;  ///< bytes
};
/// nullopt: no such agent, or one without a save. The save object may go while it is read: then the head is read again.
/// kCorruption: the object that the head names is missing, or damaged.
Operation<std::optional<ReadSave>> read_save(Exchange& exchange, std::string agent);

enum class TurnCheck {
  kRun,       ///< none that was committed lately
  kAnswered,  ///< it was committed: Head::turn has its result
  kPast,      ///< it was committed, and the agent has changed since: its answer is not the agent's end any more
  kOther,     ///< its id was another request's
};
/// Whether a turn is to run. A client that got no answer asks again with the same id.
TurnCheck check_turn(const Head& head, const std::string& id, const std::string& digest);

}  // namespace torpor::remote
