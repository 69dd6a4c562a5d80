#pragma once
/// Agents loaded ahead of their turn, each by a thread of its own. Any thread.

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "cache/ledger.h"
#include "torpor/store.h"

namespace torpor {

struct PrefetchOptions {
  size_t slots = 4;  ///< agents at a time: each keeps pages, a tail and its lock
  /// How long an agent that nobody wakes stays: then it is let go of at the manager's next call, or for another one's sake.
  std::chrono::milliseconds patience{30000};
};

class Prefetcher {
 public:
  struct Ready {
    std::unique_ptr<AgentLock> lock;
    LoadedAgent loaded;
    std::vector<KvLedger::Share> shares;  ///< its memory, counted from when it was loaded
  };
  using Load = std::function<LoadedAgent(const std::string& id)>;

  /// `store` outlives it. `load` is called on other threads.
  Prefetcher(Store& store, std::shared_ptr<KvLedger> ledger, Load load, PrefetchOptions options);
  /// Waits for loads under way.
  ~Prefetcher() = default;

  /// False when nothing was begun: the agent is awake or has a slot, all slots are taken, or no thread could be started.
  bool begin(const std::string& id);
  /// The agent, waiting until it is loaded; nullopt when it has no slot, or its load failed.
  std::optional<Ready> take(const std::string& id);
  void drop(const std::string& id) { take(id); }
  /// Lets go of the one that has been loaded for longest, or when none is, waits for one that is being loaded. False when
  /// there is none.
  bool let_one_go();
  /// Lets go of loads that failed, and of agents that nobody woke for too long.
  void let_stale_go();
  /// An agent that is awake, or about to be, is not prefetched.
  void set_awake(const std::string& id, bool awake);

 private:
  using Clock = std::chrono::steady_clock;
  struct Slot {
    std::future<Ready> future;
    std::shared_ptr<std::atomic<bool>> failed;
    Clock::time_point begun;
    bool over() const { return future.wait_for(std::chrono::seconds(0)) == std::future_status::ready; }
  };
  /// Takes those slots out whose load failed or that have been there for too long.
  std::vector<Slot> stale() TORPOR_REQUIRES(mutex_);

  Store& store_;
  const std::shared_ptr<KvLedger> ledger_;
  const Load load_;
  const PrefetchOptions options_;
  Mutex mutex_;
  std::set<std::string> awake_ TORPOR_GUARDED_BY(mutex_);
  std::map<std::string, Slot> slots_ TORPOR_GUARDED_BY(mutex_);
};

}  // namespace torpor
