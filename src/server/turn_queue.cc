#include "server/turn_queue.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "server/chat.h"

namespace torpor::server {

void TurnQueue::set_alone(bool alone) {
  const MutexLock lock(mutex_);
  alone_ = alone;
}

int TurnQueue::sum() const {
  return std::accumulate(taken_.begin(), taken_.end(), 0, [](int sum, const auto& own) { return sum + own.second; });
}

int TurnQueue::taken() const {
  const MutexLock lock(mutex_);
  return sum();
}

TurnQueue::Places::Places(TurnQueue& queue, std::string share, int count)
    : queue_(queue), share_(std::move(share)), held_(count) {
  if (count == 0) return;
  const MutexLock lock(queue_.mutex_);
  const auto found = queue_.taken_.find(share_);
  const int own = found == queue_.taken_.end() ? 0 : found->second;
  const bool alone = queue_.alone_;
  // As if the places were taken one after the other: the last one has to be free, too.
  const auto has_room = [&](int free, int own_before) {
    return free >= count && (alone || own_before + count - 1 < free - (count - 1));
  };
  if (!has_room(queue_.places_, 0)) {
    throw Failure(Failure::Kind::kInvalid, "This needs " + std::to_string(count) +
                                               " turns at a time, and the server's queue has no place for so many.");
  }
  if (!has_room(queue_.places_ - queue_.sum(), own)) {
    Failure full(Failure::Kind::kOverloaded, "The server's queue is full; try again later.");
    full.retry_after = 5;
    throw full;
  }
  queue_.taken_[share_] = own + count;
}

TurnQueue::Places::~Places() { leave_all(); }

void TurnQueue::Places::leave_all() { leave(std::numeric_limits<int>::max()); }

void TurnQueue::Places::leave(int count) {
  const MutexLock lock(queue_.mutex_);
  const int left = std::min(count, held_);
  if (left == 0) return;
  held_ -= left;
  const auto own = queue_.taken_.find(share_);
  own->second -= left;
  if (own->second == 0) queue_.taken_.erase(own);
}

}  // namespace torpor::server
