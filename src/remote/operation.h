#pragma once
/// The protocol's steps without I/O. An Operation is a coroutine that asks for requests to be made and goes on with
/// their answers. Who makes them is its driver's matter: a real store and a real clock (driver.h), or a simulated one
/// (tests/test_remote_simulation.cc).
///
///     Exchange exchange;
///     Operation<Saved> operation = save(exchange, ...);
///     operation.start();
///     while (!operation.done()) exchange.answer(make_all(exchange.requests()));
///     Saved saved = operation.result();
///
/// The requests of one exchange may be made in any order, or side by side. An Operation may be destroyed between any
/// two of them: that is a crash. Not thread-safe.

#include <chrono>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "remote/object_store.h"
#include "remote/records.h"

namespace torpor::remote {

/// Time of the driver's own clock. It never goes back, goes on while the machine sleeps, and is compared with no other.
using Instant = std::chrono::nanoseconds;

struct Request {
  enum class Kind { kPut, kGet, kRead, kList, kRemove, kWait };
  Kind kind = Kind::kGet;
  std::string key;              ///< of kList a prefix
  Condition condition;          ///< of kPut
  std::string text;             ///< of kPut: the bytes
  std::optional<size_t> blob;   ///< of kPut: bytes of the caller's, by its number, that follow `text`
  uint64_t offset = 0;          ///< of kRead
  uint64_t bytes = 0;           ///< of kRead; of kGet the most that the object may have
  Instant wait{0};              ///< of kWait: answered after so long
};

Request put_request(std::string key, std::string text, Condition condition = {}, std::optional<size_t> blob = {});
/// Refused with kCorruption: the object is longer.
Request get_request(std::string key, uint64_t most_bytes = kMostRecordBytes);
Request read_request(std::string key, uint64_t offset, uint64_t bytes);
Request list_request(std::string prefix);
Request remove_request(std::string key);
Request wait_request(Instant time);

struct Answer {
  enum class Status {
    kDone,
    kPrecondition,  ///< PutStatus::kPrecondition
    kAbsent,        ///< of kGet and kRead: no such object
    kDamaged,       ///< of kRead: the object is there, and is damaged or ends before
    kLost,          ///< LostAnswer
    kRefused,       ///< any other Error
  };
  Status status = Status::kDone;
  std::string tag;                  ///< of kPut and kGet
  std::string text;                 ///< of kGet and kRead: the bytes
  std::vector<ObjectInfo> objects;  ///< of kList
  std::exception_ptr error;         ///< of kDamaged, kLost and kRefused
  Instant sent{0}, received{0};     ///< the request was made at or after `sent`, and answered at or before `received`

  bool done() const { return status == Status::kDone; }
};

/// Where an Operation and its driver meet.
class Exchange {
 public:
  Exchange() = default;
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  /// What the operation waits for.
  const std::vector<Request>& requests() const { return requests_; }
  /// Gives one answer for each request, in their order, and lets the operation go on.
  void answer(std::vector<Answer> answers) {
    answers_ = std::move(answers);
    requests_.clear();
    std::exchange(waiting_, nullptr).resume();
  }

  struct AskAll {
    Exchange& exchange;
    bool await_ready() const noexcept { return exchange.requests_.empty(); }
    void await_suspend(std::coroutine_handle<> waiting) noexcept { exchange.waiting_ = waiting; }
    std::vector<Answer> await_resume() { return std::exchange(exchange.answers_, {}); }
  };
  struct AskOne {
    Exchange& exchange;
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiting) noexcept { exchange.waiting_ = waiting; }
    Answer await_resume() { return std::move(std::exchange(exchange.answers_, {}).front()); }
  };
  /// For operations: all of `requests`, answered in their order.
  AskAll ask_all(std::vector<Request> requests) {
    requests_ = std::move(requests);
    return {*this};
  }
  AskOne ask(Request request) {
    requests_.clear();
    requests_.push_back(std::move(request));
    return {*this};
  }

 private:
  std::vector<Request> requests_;
  std::vector<Answer> answers_;
  std::coroutine_handle<> waiting_;
};

/// A coroutine that ends with a `T`, or an Error. Another operation of the same Exchange may `co_await` it.
template <typename T>
class [[nodiscard]] Operation {
 public:
  struct promise_type {
    std::optional<T> value;
    std::exception_ptr error;
    std::coroutine_handle<> caller;

    struct End {
      bool await_ready() const noexcept { return false; }
      std::coroutine_handle<> await_suspend(std::coroutine_handle<promise_type> ended) noexcept {
        return ended.promise().caller ? ended.promise().caller : std::noop_coroutine();
      }
      void await_resume() const noexcept {}
    };
    Operation get_return_object() { return Operation(std::coroutine_handle<promise_type>::from_promise(*this)); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    End final_suspend() noexcept { return {}; }
    void return_value(T result) { value = std::move(result); }
    void unhandled_exception() noexcept { error = std::current_exception(); }
  };

  Operation(Operation&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Operation& operator=(Operation&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Operation() {
    if (handle_) handle_.destroy();
  }

  /// Runs up to the first request.
  void start() { handle_.resume(); }
  bool done() const { return handle_.done(); }
  /// Once, when it is done. Throws what the operation threw.
  T result() {
    promise_type& promise = handle_.promise();
    if (promise.error) std::rethrow_exception(promise.error);
    return std::move(*promise.value);
  }

  struct Nested {
    std::coroutine_handle<promise_type> handle;
    bool await_ready() const noexcept { return false; }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> caller) noexcept {
      handle.promise().caller = caller;
      return handle;
    }
    T await_resume() {
      if (handle.promise().error) std::rethrow_exception(handle.promise().error);
      return std::move(*handle.promise().value);
    }
  };
  Nested operator co_await() && noexcept { return {handle_}; }

 private:
  explicit Operation(std::coroutine_handle<promise_type> handle) : handle_(handle) {}

  std::coroutine_handle<promise_type> handle_;
};

/// What a compare-and-swap came to.
struct Swap {
  enum class Outcome {
    kDone,     ///< the text stands, or stood: its tag is `tag`
    kOther,    ///< something else is there: `tag` and `text`; nullopt: nothing is
    kUnknown,  ///< no answer told; the text may stand, or may yet come to stand
  };
  Outcome outcome = Outcome::kUnknown;
  std::string tag;
  std::optional<std::string> text;
};

/// Puts `text` under `key` if `condition` holds. No two calls have one text: each holds a save id, or a count, of its
/// own. So a precondition that failed, and an answer that was lost, are resolved by reading what is there.
Operation<Swap> swap(Exchange& exchange, std::string key, Condition condition, std::string text);

/// Asks again while answers are lost, a few times, each later than the one before. Never kLost; throws what was
/// refused, the last LostAnswer, and that an object is damaged unless `damaged_too`.
Operation<Answer> ask_firmly(Exchange& exchange, Request request);
Operation<std::vector<Answer>> ask_all_firmly(Exchange& exchange, std::vector<Request> requests,
                                              bool damaged_too = false);

}  // namespace torpor::remote
