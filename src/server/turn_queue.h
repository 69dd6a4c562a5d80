#pragma once
/// Places of turns that run or wait: the bound on what clients may have under way.

#include <map>
#include <string>

#include "base/mutex.h"

namespace torpor::server {

/// Any thread. One share has all places where it is alone. Else each share has a place as long as it holds fewer than
/// are free: half of them at most.
class TurnQueue {
 public:
  explicit TurnQueue(int places) : places_(places) {}
  /// Whether there is one share at most.
  void set_alone(bool alone);
  /// Places that are taken.
  int taken() const;

  /// Places of one request, until they are left or this goes. Any thread.
  class Places {
   public:
    /// All `count`, or Failure: kOverloaded, with a time to come again; kInvalid for more than there ever are.
    Places(TurnQueue& queue, std::string share, int count);
    ~Places();
    Places(const Places&) = delete;
    Places& operator=(const Places&) = delete;
    /// Leaves one, or all. Those that were left before count for nothing.
    void leave_one() { leave(1); }
    void leave_all();

   private:
    void leave(int count);

    TurnQueue& queue_;
    const std::string share_;
    int held_;  // guarded by the queue's mutex
  };

 private:
  int sum() const TORPOR_REQUIRES(mutex_);

  const int places_;
  mutable Mutex mutex_;
  bool alone_ TORPOR_GUARDED_BY(mutex_) = true;
  std::map<std::string, int> taken_ TORPOR_GUARDED_BY(mutex_);  // by share; none is 0
};

}  // namespace torpor::server
