#pragma once
/// A process's lease in a bucket, a thread that renews it, and what is known of the others'. Thread-safe.

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <thread>

#include "base/mutex.h"
#include "remote/driver.h"
#include "remote/lease.h"
#include "remote/sweep.h"

namespace torpor::remote {

/// TTL of a session that does nothing but sweep. It renews its lease four times a second and owns no agent. If another
/// sweeper takes it for dead while it is not, its work is done by that one.
inline constexpr std::chrono::milliseconds kSweeperTtl{2'000};

struct SessionOptions {
  std::string address;                     ///< Lease::address
  std::chrono::milliseconds ttl{10'000};
  /// Called once, on a thread of the session's, when it may not answer any more. It waits for no answer of the bucket.
  std::function<void()> on_end;
};

class Session {
 public:
  /// Writes the lease. `driver` outlives the session. kIo and what else a request can throw: it could not be written.
  explicit Session(Driver& driver, SessionOptions options = {});
  ~Session() { close(); }
  /// Ends the thread and removes the lease, so that nobody waits for it: the session's saves are over, and its agents
  /// free or others'. Once more it does nothing.
  void close();

  /// As heads name it; no other process ever has it.
  const std::string& name() const { return name_; }
  bool may_answer();
  /// LeaseWatch::is_gone, as of the last look.
  bool is_gone(const std::string& session);
  /// LeaseWatch::has_ended.
  void has_ended(const std::string& session);
  /// Whether it is gone: looks until that is known, at most for two of its TTLs. False: it is alive.
  bool wait_until_gone(const std::string& session);
  /// As of the last look: the address in its lease; nullopt: no lease.
  std::optional<std::string> address_of(const std::string& session);
  /// What the last look saw of its lease; nullopt: no lease.
  std::optional<LeaseWatch::Seen> seen(const std::string& session);
  /// Looks at the others' leases now; it is also done every third of the TTL. False: no answer came. Threads that wait
  /// for another one's look to end share the next: however many wait for owners, one asks. A look that began `since`
  /// or later will do.
  bool look(Instant since = Instant::max());
  /// Generations::learn.
  void learn(int64_t generation);

  /// A save under way: while it lives, the lease announces no later generation than its own.
  class Saving {
   public:
    explicit Saving(Session& session);
    ~Saving();
    Saving(const Saving&) = delete;
    Saving& operator=(const Saving&) = delete;
    int64_t generation() const { return generation_; }

   private:
    Session& session_;
    const int64_t generation_;
  };

  /// Removes what no agent needs (sweep.h). Gives up after a minute of saves that began before; until then it looks
  /// every `look_every`, and renews its lease as often.
  Swept sweep_bucket(Instant look_every = std::chrono::milliseconds(500));

 private:
  void renew_until_closed();
  void wait_for_end();

  Driver& driver_;
  const SessionOptions options_;
  const std::string name_;
  Mutex mutex_;
  CondVar changed_;
  bool closed_ TORPOR_GUARDED_BY(mutex_) = false;
  int64_t looks_begun_ TORPOR_GUARDED_BY(mutex_) = 0, looks_ended_ TORPOR_GUARDED_BY(mutex_) = 0;
  bool looked_ TORPOR_GUARDED_BY(mutex_) = false;  ///< what the last look was
  Instant look_began_ TORPOR_GUARDED_BY(mutex_){0};
  Instant renew_every_ TORPOR_GUARDED_BY(mutex_);
  Generations generations_;  ///< this and the next two: of `mutex_`, also while operations of them run
  LeaseKeeper keeper_;
  LeaseWatch watch_;
  std::thread thread_, ender_;
};

}  // namespace torpor::remote
