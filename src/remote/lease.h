#pragma once
/// Leases: a worker's sign of life, and what others make of it.
///
/// No two clocks are compared. A worker renews its lease every third of its TTL, and each renewal changes the tag. It
/// counts its own TTL from when it sent the last renewal that stood: then it stops answering, for good. An observer
/// counts from when it first saw a tag. A tag that is the same a quarter longer than the TTL is of a dead worker. So
/// whoever takes over comes after the owner has stopped, as long as their clocks' rates differ by less than a fifth.
///
/// A commit needs none of this: the swap of the head decides. Leases decide what the swap can't see: who answers from
/// memory, and when waiting for an owner has an end.

#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "remote/operation.h"
#include "remote/ownership.h"
#include "remote/records.h"

namespace torpor::remote {

/// A worker's own lease. One for each process, never for each agent. Not thread-safe.
class LeaseKeeper {
 public:
  /// `lease` names a session that no other process ever has. `generations` outlives the keeper.
  LeaseKeeper(Lease lease, Generations& generations) : lease_(std::move(lease)), generations_(&generations) {}

  /// To be run before the first agent is acquired, and then every third of the TTL; one at a time. True: the lease
  /// stands. False: it could not be renewed this time, or never can be again. The keeper outlives the operation.
  Operation<bool> renew(Exchange& exchange);

  /// Whether the worker may answer and acquire. Once false it stays so: others may have its agents. The process ends,
  /// or goes on under another session without any agent in memory.
  bool may_answer(Instant now);
  /// Until when it may, unless it is renewed before.
  Instant ends() const { return renewed_ + std::chrono::milliseconds(lease_.ttl_ms); }
  const Lease& lease() const { return lease_; }
  void set_room(int64_t bytes) { lease_.room = bytes; }

 private:
  Lease lease_;  ///< as written last
  Generations* generations_;
  std::string tag_;
  Instant renewed_{0};
  bool stands_ = false, over_ = false;
};

/// What a worker knows of the others' leases. Not thread-safe.
class LeaseWatch {
 public:
  /// To be run every third of a TTL: one listing shows all tags. `read_all` reads each lease that has changed, too;
  /// else only new ones. False: it could not look this time. The watch outlives the operation.
  Operation<bool> look(Exchange& exchange, bool read_all = false);

  /// A lease that has not changed for its TTL and a quarter; or none, in a look after the session was first asked
  /// about; or `has_ended` was told so.
  /// (Who owns an agent had a lease before. One that an earlier look did not see may be new.)
  bool is_gone(const std::string& session);
  /// The caller knows that the session's process has ended, whatever its lease says.
  void has_ended(const std::string& session) { gone_.insert(session); }
  /// As of the last look; nullptr: no lease.
  const Lease* lease(const std::string& session) const;
  struct Seen {
    Lease lease;        ///< as read last
    std::string tag, read_tag;  ///< listed last; listed when the lease was read
    Instant since{0};   ///< when an answer first had this tag
    Instant asked{0};   ///< when the last look was sent that had it
    bool is_gone() const { return asked - since >= std::chrono::milliseconds(lease.ttl_ms) * 5 / 4; }
  };
  const std::map<std::string, Seen>& seen() const { return seen_; }

 private:
  std::map<std::string, Seen> seen_;
  std::set<std::string> sought_;  ///< asked about
  std::set<std::string> gone_;    ///< of these, that a later look did not see, and sessions that have ended
};

}  // namespace torpor::remote
