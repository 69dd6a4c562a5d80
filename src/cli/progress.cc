#include "cli/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>

namespace torpor::cli {
namespace {

constexpr int kWorthWatching = 256;  // tokens
constexpr int kWidth = 30;

}  // namespace

ProgressBar::ProgressBar() : terminal_(isatty(STDERR_FILENO) != 0), start_(std::chrono::steady_clock::now()) {}

void ProgressBar::update(int done, int total) {
  if (!terminal_ || total < kWorthWatching) return;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const int filled = std::clamp(int(int64_t(kWidth) * done / total), 0, kWidth);
  std::fprintf(stderr, "\rreading [%s%s] %d/%d tokens, %.0f/s\033[K", std::string(filled, '#').c_str(),
               std::string(kWidth - filled, '.').c_str(), done, total, seconds > 0 ? done / seconds : 0.0);
  std::fflush(stderr);
  drawn_ = true;
}

void ProgressBar::clear() {
  if (!drawn_) return;
  std::fputs("\r\033[K", stderr);
  std::fflush(stderr);
  drawn_ = false;
}

}  // namespace torpor::cli
