#pragma once
/// Ctrl-C and SIGTERM during a turn: the turn ends cleanly and is saved.

#include <atomic>

namespace torpor::cli {

/// While one lives, the first SIGINT or SIGTERM sets `flag()`; a second one of the same kind kills the process, as usual.
/// A closed standard output does not kill. Only one may live at a time.
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

}  // namespace torpor::cli
