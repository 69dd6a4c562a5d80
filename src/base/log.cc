#include "torpor/log.h"

#include <atomic>
#include <memory>
#include <utility>

#include "base/mutex.h"
#include "torpor/error.h"

namespace torpor {
namespace {

/// A handler and how many threads are in it.
struct Listener {
  LogHandler handler;
  int running = 0;
};

struct Log {
  Mutex mutex;
  CondVar left;  // a thread has left a handler
  std::shared_ptr<Listener> listener TORPOR_GUARDED_BY(mutex);  // and its `running`
  std::atomic<bool> wanted{false};
};

Log& shared_log() {
  static Log& log = *new Log;  // threads may still speak while the process exits
  return log;
}

thread_local bool in_handler = false;

}  // namespace

const char* log_level_name(LogLevel level) noexcept {
  return level == LogLevel::kDebug ? "debug" : level == LogLevel::kInfo ? "info" : "warning";
}

void set_log_handler(LogHandler handler) {
  if (in_handler)
    throw Error(ErrorCode::kInvalidArgument, "A log handler can't be replaced by itself; do it on another thread.");
  auto next = handler ? std::make_shared<Listener>(Listener{std::move(handler)}) : nullptr;
  Log& log = shared_log();
  MutexLock lock(log.mutex);
  std::swap(log.listener, next);
  log.wanted.store(log.listener != nullptr, std::memory_order_release);
  while (next && next->running != 0) log.left.wait(lock);
}

bool log_wanted() noexcept { return shared_log().wanted.load(std::memory_order_acquire) && !in_handler; }

void log(LogLevel level, std::string_view sentence) noexcept {
  if (!log_wanted()) return;
  Log& log = shared_log();
  std::shared_ptr<Listener> listener;
  {
    const MutexLock lock(log.mutex);
    listener = log.listener;
    if (!listener) return;
    ++listener->running;
  }
  in_handler = true;
  try {
    listener->handler(level, sentence);
  } catch (...) {
    // Whoever listens can't make the library fail.
  }
  in_handler = false;
  {
    const MutexLock lock(log.mutex);
    --listener->running;
  }
  log.left.notify_all();
}

}  // namespace torpor
