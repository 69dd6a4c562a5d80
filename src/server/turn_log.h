#pragma once
/// Turns under way, and those that ended last: what /torpor/v1/now and /torpor/v1/requests tell. In memory alone, and
/// without any text of a request or an answer.

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "base/mutex.h"

namespace torpor::server {

struct TurnRecord {
  enum class State { kWaiting, kReading, kAnswering, kEnded };

  uint64_t id = 0;        ///< counts the server's turns from 1
  std::string tenant;
  std::string agent;      ///< as its tenant knows it; empty: none with a name
  int64_t begun_at = 0;   ///< milliseconds since the epoch
  State state = State::kWaiting;
  int prompt_tokens = 0, cached_tokens = 0;  ///< known once it reads
  int done = 0, total = 0;                   ///< tokens of the prompt that are computed, of those to compute
  int generated_tokens = 0;                  ///< known at its end
  double waited_ms = 0;   ///< until its first tokens were read: the queue and the wake
  double read_ms = 0;     ///< from there to the first piece of the answer
  double answered_ms = 0; ///< from there to its end, the save included
  std::string reason;     ///< of its end, as metrics name it
  std::string missed;     ///< "message 3": the first that is not what the agent holds; empty: none
};

/// Any thread.
class TurnLog {
 public:
  static constexpr size_t kKept = 512;  ///< of turns that have ended

  /// One turn, from its construction to its destruction, which ends it with `reason` "error" unless `end` came before.
  class Turn {
   public:
    Turn(TurnLog& log, const std::string& tenant, const std::string& agent);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    void starts(int prompt_tokens, int cached_tokens);
    void reads(int done, int total);
    void answers();
    /// `agent`: that answered, by its tenant's name; empty: as it was.
    void end(const std::string& reason, int generated_tokens, const std::string& missed = {},
             const std::string& agent = {});

   private:
    using Clock = std::chrono::steady_clock;
    /// What has passed since the last call, in milliseconds.
    double lap();

    TurnLog& log_;
    uint64_t id_ = 0;
    Clock::time_point since_ = Clock::now();
    bool ended_ = false;
  };

  /// Those of a tenant that are under way, the oldest first.
  std::vector<TurnRecord> running(const std::string& tenant) const;
  /// Those of all tenants.
  size_t running() const;
  /// Those of a tenant that have ended, the newest first.
  std::vector<TurnRecord> ended(const std::string& tenant) const;

 private:
  template <typename Change>
  void change(uint64_t id, Change change);

  mutable Mutex mutex_;
  uint64_t last_ TORPOR_GUARDED_BY(mutex_) = 0;
  std::map<uint64_t, TurnRecord> running_ TORPOR_GUARDED_BY(mutex_);
  std::deque<TurnRecord> ended_ TORPOR_GUARDED_BY(mutex_);
};

}  // namespace torpor::server
