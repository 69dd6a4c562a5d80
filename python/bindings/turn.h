#pragma once
/// A turn on a thread of its own, whose text waits to be fetched. So no thread of the engine's ever needs the GIL, and
/// the thread that waits for text can be interrupted.
///
/// One piece waits here, all others in the engine's queue, whose bound is the only one
/// (EngineOptions::text_queue_bytes). Beyond it the turn waits for its reader, and other turns go on. It waits for no
/// reader while a thread waits for its result, nor once it is cancelled. Then pieces are kept here, which are no more
/// than the result's text.

#include <atomic>
#include <deque>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

#include <unistd.h>

#include "base/mutex.h"
#include "torpor/engine.h"

namespace torpor::python {

/// Any method may be called from any Python thread, which holds the GIL; those that wait let go of it. In a process
/// that was forked from the turn's own they are kInvalidArgument.
class RunningTurn {
 public:
  RunningTurn(std::shared_ptr<Engine> engine, TurnRequest request);
  /// As `cancel`, and waits.
  ~RunningTurn();

  /// The next piece of text; nullopt at the end. Waits. Of several threads each gets other pieces. Throws what the turn
  /// threw, and what a signal handler of Python's raises meanwhile (the turn then goes on).
  std::optional<std::string> next();
  /// Ends the turn before its next token, with FinishReason::kCancelled. Does not wait.
  void cancel();
  /// Gives the turn up, unless it is over, and waits until the agent is as it was. The turn then throws kCancelled.
  void undo();
  /// Of a turn that is over, which this waits for, as `next` does. Pieces that nobody has fetched stay.
  TurnResult result();

 private:
  struct State {
    std::shared_ptr<Engine> engine;
    TurnRequest request;
    const pid_t process = getpid();
    std::atomic<bool> cancelled{false}, undone{false};
    Mutex mutex;
    CondVar changed;
    std::deque<std::string> pieces TORPOR_GUARDED_BY(mutex);
    int awaited TORPOR_GUARDED_BY(mutex) = 0;  // threads that wait for the result
    std::optional<TurnResult> result TORPOR_GUARDED_BY(mutex);
    std::exception_ptr error TORPOR_GUARDED_BY(mutex);
    std::thread thread;

    bool over() const TORPOR_REQUIRES(mutex) { return result || error; }
    /// Whether the turn waits until a piece is fetched.
    bool has_reader() const TORPOR_REQUIRES(mutex) { return awaited == 0 && !cancelled && !undone; }
    void say(std::string_view text);
    void run();
  };

  void check_process() const;
  void set(std::atomic<bool>& flag);
  /// Waits until the turn is over or, with `piece`, until there is text, and takes that. Whether it did.
  bool wait(std::optional<std::string>* piece);

  std::unique_ptr<State> state_;
};

}  // namespace torpor::python
