#pragma once
/// Agents between a store on disk and a bucket, which has the same files (docs/format.md, "A bucket").
///
/// Nothing is half there. In the bucket the head's swap is the commit, on disk the agent file's rename. Every byte is
/// checked before it is sent and before it is put in place: a flipped one is in nobody's store.

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "remote/driver.h"
#include "remote/ownership.h"
#include "remote/session.h"
#include "store/whole_files.h"
#include "torpor/store.h"

namespace torpor::remote {

/// A bucket that counts what is asked of another one. Thread-safe.
class CountedStore final : public ObjectStore {
 public:
  struct Counts {
    int64_t puts = 0, gets = 0, lists = 0, removals = 0, bytes_sent = 0, bytes_received = 0;
  };
  explicit CountedStore(ObjectStore& store) : store_(store) {}
  PutResult put(const std::string& key, std::span<const std::byte> bytes, const Condition& condition,
                const ObjectMetadata& metadata = {}) override;
  std::optional<Object> get(const std::string& key, std::uint64_t most_bytes) override;
  std::optional<ObjectInfo> head(const std::string& key) override;
  void read(const std::string& key, std::uint64_t offset, std::span<std::byte> out) override;
  std::vector<ObjectInfo> list(const std::string& prefix) override;
  void remove(const std::string& key) override;
  Counts counts() const;

 private:
  ObjectStore& store_;
  std::atomic<int64_t> puts_ = 0, gets_ = 0, lists_ = 0, removals_ = 0, sent_ = 0, received_ = 0;
};

/// The checksum of an agent file as it says it is: AgentInfo::hash. Empty: it is too short.
std::string hash_of(const std::string& agent_file);
/// Whether `checksum` is an agent file's, or that of the file which it was made of without the tail.
bool is_copy(const std::string& checksum, const std::string& agent_file);
/// Those that have a head, of a list of "agents/".
std::vector<std::string> agents_of(const std::vector<ObjectInfo>& objects);

/// One object that is damaged or missing, or a name that stands for none.
struct BucketProblem {
  std::string key;
  std::string problem;  ///< one sentence
};

struct Pulled {
  HeadVersion version;
  std::vector<std::string> keys;          ///< of the head's save, for the next one
  int64_t objects = 0, bytes = 0;         ///< that were read and put in place
  int64_t dropped = 0;                    ///< files that an archived agent is without
  /// Objects that could not be used. The agent is there without them: who wakes it goes on from what is intact, and
  /// computes the rest. Its next push puts good ones in their place.
  std::vector<BucketProblem> damaged;
};

struct PullOptions {
  Durability durability = Durability::kFull;
  bool check = false;  ///< files that the store has are read, and damaged ones replaced
};

struct PushOptions {
  std::optional<Turn> turn = {};  ///< SaveRequest::turn
  /// Keys of objects that a pull found damaged: they are put again.
  std::vector<std::string> damaged = {};
  bool tail = true;  ///< false: without rows behind the last segment, where they can be computed (whole_files.h)
};

struct Pushed : Saved {
  bool without_tail = false;
};

struct Archived {
  enum class Outcome { kDone, kNothing, kAbsent, kBusy } outcome = Outcome::kBusy;
  int64_t dropped = 0;  ///< objects that the agent names no more
};

struct BucketReport {
  int64_t agents = 0, objects = 0, bytes = 0;  ///< looked at
  int64_t unneeded = 0, unneeded_bytes = 0;    ///< that no head names: a sweep's to judge
  std::vector<BucketProblem> problems;
};

/// What a store's copy of an agent is to a bucket's: as it was pulled or pushed last.
struct Mark {
  std::string save;                  ///< Head::file
  std::string checksum;              ///< AgentInfo::hash of the store's copy then
  std::vector<std::string> damaged;  ///< Pulled::damaged
};

/// Thread-safe; two threads don't work on one agent.
class Tier {
 public:
  /// All outlive the tier. `url` names the bucket, for marks and errors.
  Tier(Driver& driver, Store& store, std::string url);

  /// Of what is put into the store, beside the limits that it keeps. Before other calls. kInvalidArgument.
  void set_disk_limits(const DiskLimits& limits) { files_.set_disk_limits(limits); }

  // ---- of an agent whose head is at hand; a worker's steps

  /// Commits the store's copy under a head that is one's own. `keys`: of that head's save; `generation`: of a save that
  /// began after the head was read (Session::Saving). No lock is taken; a save of the agent meanwhile may fail it.
  /// kVariant is an Error (kIncompatible) unless what is in the way is damaged, and then replaced.
  Pushed push_save(const std::string& agent, const HeadVersion& version, const std::vector<std::string>& keys,
                   int64_t generation, const PushOptions& options = {});
  /// Puts a save in place of the store's copy, with all files that the store lacks. Takes the agent's lock: kBusy.
  /// kCorruption: the agent file, or the part that has its first ids, can't be used. kNotFound: what it names was swept, for the head is another now.
  Pulled pull_save(const std::string& agent, const ReadSave& save, const PullOptions& options = {});

  // ---- whole; a person's

  /// Acquires, commits, releases. kBusy: another worker has the agent. kInvalidArgument: the bucket's state is not what
  /// the store's copy goes on from; `force` replaces it all the same.
  Saved push(Session& session, const std::string& agent, bool force);
  /// kNotFound: the bucket has none. kInvalidArgument: the store's copy has what the bucket's lacks; `force` drops it.
  Pulled pull(const std::string& agent, bool force, const PullOptions& options = {});
  /// Reads every object that a head names. `told` hears of each agent before it is looked at.
  BucketReport verify(const std::function<void(const std::string& agent)>& told = {});
  /// Drops an agent's rows from the bucket and keeps its ids and messages: who wakes it computes again. kBusy outcome:
  /// a worker has it.
  Archived archive(Session& session, const std::string& agent);
  /// Agents that have a save in the bucket, and when it was written (milliseconds since 1970, by the store's clock).
  std::vector<std::pair<std::string, int64_t>> agents();

  std::optional<Mark> read_mark(const std::string& agent) const;
  void keep_mark(const std::string& agent, const Mark& mark);

 private:
  Acquired own(Session& session, const std::string& agent, Make make);
  void let_go(const std::string& agent, const HeadVersion& version);
  /// After an error.
  void give_back(const std::string& agent, const HeadVersion& version) noexcept;
  std::vector<BucketProblem> check_objects(const std::vector<std::string>& keys, int64_t& bytes);
  void mend(const std::string& key, const std::string& path);
  std::string where(const std::string& key) const { return url_ + "/" + key; }

  Driver& driver_;
  Store& store_;
  const std::string url_;
  WholeFiles files_;
};

}  // namespace torpor::remote
