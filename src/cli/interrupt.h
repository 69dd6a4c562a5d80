#pragma once
/// Ctrl-C, SIGTERM and a terminal that is closed during a turn: the turn ends cleanly and is saved.

#include <atomic>

namespace torpor::cli {

/// While one lives, the first SIGINT, SIGTERM or SIGHUP sets `flag()`; a second one of the same kind kills the process, as usual.
/// One that was ignored when the process started (nohup) stays ignored. A closed standard output and a file that may grow no
/// further do not kill: the write fails. Only one may live at a time.
class InterruptScope {
 public:
  InterruptScope();
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

  std::atomic<bool>& flag();
  /// The signal that came, or 0.
  int signal() const;
  /// Forgets the signal and listens for the next one.
  void rearm();
};

/// While one lives beside an InterruptScope, a signal that this handles takes standard input away, as /dev/null does:
/// for a reader
/// that goes on after a signal. Who reads must have a copy of the descriptor. kIo where there is no /dev/null.
class InputEndsOnSignal {
 public:
  InputEndsOnSignal();
  ~InputEndsOnSignal();
  InputEndsOnSignal(const InputEndsOnSignal&) = delete;
  InputEndsOnSignal& operator=(const InputEndsOnSignal&) = delete;

  /// Whether a signal came since the InterruptScope was made or armed again.
  bool came() const;

 private:
  const int nothing_;
};

}  // namespace torpor::cli
