#include "agents/prefetcher.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor {
namespace {

/// Bytes of run `i` that the agent can still attend: what its cache will count.
size_t attended_bytes(const KvSnapshot& snapshot, size_t i) {
  size_t bytes = 0;
  for (const KvTensorSpec& tensor : snapshot.layout.tensors) {
    const int n = snapshot.run_capacity(i);
    if (KvLayout::attended(tensor, int64_t(i) * kSegmentTokens, n, int64_t(snapshot.tokens.size())))
      bytes += tensor.bytes_per_token() * size_t(n);
  }
  return bytes;
}

}  // namespace

Prefetcher::Prefetcher(Store& store, std::shared_ptr<KvLedger> ledger, Load load, PrefetchOptions options)
    : store_(store), ledger_(std::move(ledger)), load_(std::move(load)), options_(options) {}

std::vector<Prefetcher::Slot> Prefetcher::stale() {
  std::vector<Slot> gone;
  for (auto at = slots_.begin(); at != slots_.end();) {
    Slot& slot = at->second;
    const bool late = Clock::now() - slot.begun >= options_.patience;
    if (slot.over() && (*slot.failed || late)) {
      gone.push_back(std::move(slot));
      at = slots_.erase(at);
    } else {
      ++at;
    }
  }
  return gone;
}

bool Prefetcher::begin(const std::string& id) {
  std::vector<Slot> gone;  // destroyed after the mutex is let go of
  const MutexLock lock(mutex_);
  gone = stale();
  if (awake_.count(id) != 0 || slots_.count(id) != 0 || slots_.size() >= options_.slots) return false;
  const auto failed = std::make_shared<std::atomic<bool>>(false);
  try {
    slots_[id] = {std::async(std::launch::async,
                             [this, id, failed] {
                               try {
                                 // In this order: once the lock is held the file can't change any more.
                                 Ready ready;
                                 ready.lock = store_.lock_agent(id);
                                 ready.loaded = load_(id);
                                 const KvSnapshot& snapshot = ready.loaded.snapshot;
                                 std::vector<KvLedger::Buffer> buffers;
                                 for (size_t i = 0; i < snapshot.n_runs(); ++i) {
                                   const bool mapped = i < snapshot.sealed.size() && snapshot.sealed[i]->mapped();
                                   buffers.push_back(
                                       {snapshot.run_bytes(i).data(), attended_bytes(snapshot, i), mapped});
                                 }
                                 for (const auto& state : snapshot.states) {
                                   buffers.push_back({state->bytes().data(), state->bytes().size(), false});
                                 }
                                 auto shares = ledger_->share_within_budget(buffers);
                                 if (!shares) {
                                   throw Error(ErrorCode::kResourceExhausted,
                                               "The memory budget has no room for agent '" + id + "'.");
                                 }
                                 ready.shares = std::move(*shares);
                                 return ready;
                               } catch (...) {
                                 *failed = true;
                                 throw;
                               }
                             }),
                  failed, Clock::now()};
  } catch (const std::system_error&) {
    slots_.erase(id);
    return false;
  }
  return true;
}

std::optional<Prefetcher::Ready> Prefetcher::take(const std::string& id) {
  Slot slot;
  {
    const MutexLock lock(mutex_);
    const auto found = slots_.find(id);
    if (found == slots_.end()) return std::nullopt;
    slot = std::move(found->second);
    slots_.erase(found);
  }
  try {
    return slot.future.get();
  } catch (const std::exception& error) {
    // The wake that comes now finds out why, and says it.
    log(LogLevel::kInfo, "Agent '" + id + "' could not be loaded ahead: " + error.what());
    return std::nullopt;
  }
}

bool Prefetcher::let_one_go() {
  Slot gone;  // whose load is waited for, after the mutex is let go of
  const MutexLock lock(mutex_);
  const auto first = [](const auto& a, const auto& b) {
    return std::pair(!a.second.over(), a.second.begun) < std::pair(!b.second.over(), b.second.begun);
  };
  const auto oldest = std::min_element(slots_.begin(), slots_.end(), first);
  if (oldest == slots_.end()) return false;
  gone = std::move(oldest->second);
  slots_.erase(oldest);
  return true;
}

void Prefetcher::let_stale_go() {
  std::vector<Slot> gone;
  const MutexLock lock(mutex_);
  gone = stale();
}

void Prefetcher::set_awake(const std::string& id, bool awake) {
  const MutexLock lock(mutex_);
  if (awake) {
    awake_.insert(id);
  } else {
    awake_.erase(id);
  }
}

}  // namespace torpor
