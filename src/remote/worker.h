#pragma once
/// A worker: the RemoteTier of a bucket. It has a session, and the agents that it has made its own since it began.
/// torpor/remote.h says what embedders need to know.

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/held_note.h"
#include "base/mutex.h"
#include "remote/custody.h"
#include "remote/driver.h"
#include "remote/object_store.h"
#include "remote/ownership.h"
#include "remote/session.h"
#include "remote/tier.h"
#include "torpor/remote.h"

namespace torpor::remote {

class Worker final : public RemoteTier {
 public:
  /// `leases` is the bucket again, for the session's requests, which must fail before its TTL is over.
  Worker(std::shared_ptr<ObjectStore> bucket, std::shared_ptr<ObjectStore> leases, const RemoteOptions& options);
  /// Waits for commits, and lets others have the agents.
  ~Worker() override;
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  bool owns(const std::string& agent) const override;
  bool open(const std::string& agent, bool make) override;
  void done(const std::string& agent) noexcept override;
  std::optional<std::string> answered(const std::string& agent, const KnownTurn& turn) const override;
  void commit(const std::string& agent, const std::optional<KnownTurn>& turn) override;
  void remove(const std::string& agent) override;
  bool alive() const override;
  void close(const std::string& agent) noexcept override;
  bool make_room() noexcept override;

 private:
  /// What is known of an agent that is this worker's.
  struct Custody {
    HeadVersion version;               ///< the last one
    std::vector<std::string> keys;     ///< of its save
    std::vector<std::string> damaged;  ///< of these, the ones that the next save puts again
    std::string checksum;              ///< of the store's agent file then; empty: none was committed
    bool owes_tail = false;            ///< the save is without the tail that the store's copy has
  };
  struct Agent {
    int uses = 0;       ///< those that wait count, too
    bool busy = false;  ///< somebody asks the bucket about it
    std::optional<Custody> custody;  ///< none: it isn't this worker's
  };
  /// A turn that is over, and whose commit comes now (RemoteAck::kLocal). Its agent is busy until then.
  struct Due {
    std::string id;
    Custody custody;
    KnownTurn turn;
  };

  /// Waits until nobody asks about the agent, and asks about it from now on. nullopt, and nobody asks: it isn't this
  /// worker's, or with `idle` somebody uses it.
  std::optional<Custody> begin(const std::string& id, bool idle = false);
  /// As begin, of one that isn't this worker's and that nobody uses. False: it is, or somebody does.
  bool begin_unused(const std::string& id);
  void finish(const std::string& id, std::optional<Custody> custody);
  /// It isn't this worker's any more as far as is known, but its head may still name the session.
  void finish_in_doubt(const std::string& id);
  /// Begins with an agent that was left so and that nobody uses. False: it is none.
  bool begin_doubtful(const std::string& id);

  // While this thread asks about the agent.
  /// Makes it this worker's, and brings the store's copy to the last commit. nullopt: there is none.
  std::optional<Custody> take(const std::string& id, bool make);
  void bring(const std::string& id, Custody& custody);
  /// Fills in what the head's save says.
  std::optional<ReadSave> read_commit(const std::string& id, Custody& custody);
  Custody commit_copy(const std::string& id, Custody custody, const std::optional<KnownTurn>& turn);
  /// After a commit that may stand or not: the agent as the bucket has it. A turn that is over and not there is
  /// committed now. nullopt: it isn't this worker's.
  std::optional<Custody> commit_again(const std::string& id);
  /// Notes that the store's copy ends with a turn that is over, and goes on from the last commit.
  void note_due(const std::string& id, const Custody& custody, const KnownTurn& turn);
  /// The turn that was noted, if the copy is as it was and the head's save is that which it goes on from.
  std::optional<KnownTurn> due_turn(const std::string& id, const Head& head) const;
  void commit_due_turns();
  void settle(const Due& due) noexcept;
  void end_committers() noexcept;
  /// Commits the tail that the last save is without.
  Custody send_tail(const std::string& id, Custody custody);
  void let_go(const std::string& id, const Custody& custody) noexcept;
  /// So that others need not wait for the lease's end, if the head names this session.
  void free_head(const std::string& id) noexcept;
  /// A worker that was killed, and had this one's store, is gone: nobody waits for its lease.
  void end_predecessors() noexcept;
  /// Waits until the owner is known to be gone. kBusy: it is alive.
  void wait_for_owner(const std::string& id, const std::string& owner);

  void require_alive(const std::string& id) const;
  std::optional<std::string> checksum_of_copy(const std::string& id) const;
  CopyStep judge(const std::string& id, const std::optional<std::string>& committed) const;
  /// What says that a worker has the agent (judge_copy).
  Record use_of(const std::string& id) const;
  bool is_in_use(const std::string& id) const;
  void set_in_use(const std::string& id);

  const RemoteOptions options_;
  const std::shared_ptr<ObjectStore> bucket_, leases_;
  mutable Store store_;
  Driver driver_, lease_driver_;
  Tier tier_;

  mutable Mutex mutex_;
  CondVar changed_;
  std::map<std::string, Agent> agents_ TORPOR_GUARDED_BY(mutex_);
  std::set<std::string> doubtful_ TORPOR_GUARDED_BY(mutex_);  // after commits that failed
  std::map<std::string, Instant> first_seen_ TORPOR_GUARDED_BY(mutex_);  // judge_owner
  std::deque<Due> due_ TORPOR_GUARDED_BY(mutex_);
  bool ending_ TORPOR_GUARDED_BY(mutex_) = false;

  std::optional<HeldNote> note_;  // goes after the lease
  mutable Session session_;  // its threads call back
  std::vector<std::thread> committers_;  // of RemoteAck::kLocal
};

}  // namespace torpor::remote
