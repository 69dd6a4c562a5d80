#include "cli/interrupt.h"

#include <csignal>

namespace torpor::cli {
namespace {

std::atomic<bool> g_flag{false};
std::atomic<int> g_signal{0};
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);

void on_signal(int signal) {
  g_signal.store(signal);
  g_flag.store(true);
}

void listen() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESETHAND;  // and no SA_RESTART: a waiting read ends
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

}  // namespace

InterruptScope::InterruptScope() {
  g_flag.store(false);
  g_signal.store(0);
  listen();
  std::signal(SIGPIPE, SIG_IGN);
}

InterruptScope::~InterruptScope() {
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
}

std::atomic<bool>& InterruptScope::flag() { return g_flag; }
int InterruptScope::signal() const { return g_signal.load(); }

void InterruptScope::rearm() {
  g_flag.store(false);
  g_signal.store(0);
  listen();
}

}  // namespace torpor::cli
