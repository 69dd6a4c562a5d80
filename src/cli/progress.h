#pragma once
/// The bar that a long prefill draws on a terminal.

#include <chrono>

namespace torpor::cli {

/// Draws on standard error, and only when that is a terminal and the work is long enough to be watched. It is wiped in the end,
/// so that no error is glued to it.
class ProgressBar {
 public:
  ProgressBar();
  ~ProgressBar() { clear(); }
  ProgressBar(const ProgressBar&) = delete;
  void update(int done, int total);
  /// Wipes the bar, if there is one.
  void clear();

 private:
  bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace torpor::cli
