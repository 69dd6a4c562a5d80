#pragma once
/// Runs Operations (operation.h) on a real store, by a real clock: what is one exchange is asked on several threads.

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/mutex.h"
#include "remote/object_store.h"
#include "remote/operation.h"

namespace torpor::remote {

/// The clock of a Driver's answers.
Instant clock_now();

/// Bytes that a request speaks of by number. `owner` keeps them.
struct Blob {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;
};
/// Gives them when they are sent, on the driver's threads, several at a time. An Error of it is the request's refusal.
using Blobs = std::function<Blob(size_t number)>;

/// Thread-safe: operations run side by side, each on the thread that calls `run`.
class Driver {
 public:
  /// `store` outlives the driver. `most_at_once`: requests that one operation has under way.
  explicit Driver(ObjectStore& store, size_t most_at_once = 8) : store_(store), most_at_once_(most_at_once) {}

  /// Runs `start(exchange)`, an Operation, to its end, and gives its result or throws what it threw. kCancelled: what
  /// requests on their way do is not known then, as after a crash. `guard` is held while the operation's own code runs,
  /// never while a request is made: for what operations of several threads share.
  template <typename Start>
  auto run(const Start& start, const Blobs& blobs = {}, Mutex* guard = nullptr) {
    const auto guarded = [guard](const auto& step) {
      std::optional<MutexLock> lock;
      if (guard != nullptr) lock.emplace(*guard);
      return step();
    };
    Exchange exchange;
    std::optional<decltype(start(exchange))> operation;
    guarded([&] { operation.emplace(start(exchange)).start(); });
    while (!operation->done()) {
      std::vector<Answer> answers = answer_all(exchange.requests(), blobs);
      guarded([&] { exchange.answer(std::move(answers)); });
    }
    return guarded([&] { return operation->result(); });
  }

  /// From now on `run` throws kCancelled before its next request; waits end. Requests on their way are the store's to
  /// cancel (CloudStore::cancel). Any thread.
  void cancel() noexcept;

 private:
  std::vector<Answer> answer_all(const std::vector<Request>& requests, const Blobs& blobs);
  Answer answer(const Request& request, const Blobs& blobs);
  void make(const Request& request, const Blobs& blobs, Answer& answer);
  void wait(Instant time);
  void throw_if_cancelled() const;

  ObjectStore& store_;
  const size_t most_at_once_;
  std::atomic<bool> cancelled_ = false;
  Mutex mutex_;
  CondVar changed_;
};

}  // namespace torpor::remote
