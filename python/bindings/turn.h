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

#include "torpor/engine.h"

namespace torpor::python {

/// Any method may be called from any Python thread, which holds the GIL; those that wait let go of it.
class RunningTurn {
 public:
  RunningTurn(std::shared_ptr<Engine> engine, TurnRequest request);
  /// As `cancel`, and waits.
  ~RunningTurn();

  /// The next piece of text; nullopt at the end. Waits. Throws what the turn threw, and what a signal handler of Python's
  /// raises meanwhile (the turn then goes on).
  std::optional<std::string> next();
  /// Ends the turn before its next token, with FinishReason::kCancelled. Does not wait.
  void cancel() { cancelled_ = true; }
  /// Gives the turn up, unless it is over, and waits until the agent is as it was. The turn then throws kCancelled.
  void undo();
  /// Of a turn that is over, which this waits for, as `next` does.
  TurnResult result();

 private:
  void run();
  void check_undone() const;
  /// Waits until there is text or, with `text` false, until the turn is over.
  void wait(bool text);

  const std::shared_ptr<Engine> engine_;
  TurnRequest request_;
  std::atomic<bool> cancelled_{false}, undone_{false};
  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::deque<std::string> pieces_;
  std::optional<TurnResult> result_;
  std::exception_ptr error_;
  std::thread thread_;
};

}  // namespace torpor::python
