#pragma once
/// A turn on a thread of its own, whose text waits to be fetched. So no thread of the engine's ever needs the GIL, and the
/// thread that waits for text can be interrupted.

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include <unistd.h>

#include "torpor/engine.h"

namespace torpor::python {

/// Any method may be called from any Python thread, which holds the GIL; those that wait let go of it. In a process that
/// was forked from the turn's own they are kInvalidArgument.
class RunningTurn {
 public:
  RunningTurn(std::shared_ptr<Engine> engine, TurnRequest request);
  /// As `cancel`, and waits.
  ~RunningTurn();

  /// The next piece of text; nullopt at the end. Waits. Of several threads each gets other pieces. Throws what the turn threw,
  /// and what a signal handler of Python's raises meanwhile (the turn then goes on).
  std::optional<std::string> next();
  /// Ends the turn before its next token, with FinishReason::kCancelled. Does not wait.
  void cancel() { state_->cancelled = true; }
  /// Gives the turn up, unless it is over, and waits until the agent is as it was. The turn then throws kCancelled.
  void undo();
  /// Of a turn that is over, which this waits for, as `next` does.
  TurnResult result();

 private:
  struct State {
    std::shared_ptr<Engine> engine;
    TurnRequest request;
    const pid_t process = getpid();
    std::atomic<bool> cancelled{false}, undone{false};
    std::mutex mutex;  // of what follows
    std::condition_variable changed;
    std::deque<std::string> pieces;
    std::optional<TurnResult> result;
    std::exception_ptr error;
    std::thread thread;

    bool over() const { return result || error; }
    void run();
  };

  void check_process() const;
  /// Waits until the turn is over or, with `piece`, until there is text, and takes that. Whether it did.
  bool wait(std::optional<std::string>* piece);

  std::unique_ptr<State> state_;
};

}  // namespace torpor::python
