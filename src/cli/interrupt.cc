#include "cli/interrupt.h"

#include <fcntl.h>
#include <unistd.h>

#include <csignal>

#include "torpor/error.h"

namespace torpor::cli {
namespace {

std::atomic<bool> g_flag{false};
std::atomic<int> g_signal{0};
std::atomic<int> g_nothing{-1};  // a descriptor of /dev/null, while a signal ends standard input
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);

void on_signal(int signal) {
  g_signal.store(signal);
  g_flag.store(true);
  if (const int nothing = g_nothing.load(); nothing >= 0) dup2(nothing, STDIN_FILENO);
}

void set_handlers(void (*handler)(int)) {
  struct sigaction action {}, before {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESETHAND;  // and no SA_RESTART: a waiting read ends
  sigemptyset(&action.sa_mask);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    if (sigaction(signal, nullptr, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(signal, &action, nullptr);
  }
}

}  // namespace

InterruptScope::InterruptScope() {
  g_flag.store(false);
  g_signal.store(0);
  set_handlers(on_signal);
  std::signal(SIGPIPE, SIG_IGN);
}

InterruptScope::~InterruptScope() { set_handlers(SIG_DFL); }

std::atomic<bool>& InterruptScope::flag() { return g_flag; }
int InterruptScope::signal() const { return g_signal.load(); }

void InterruptScope::rearm() {
  g_flag.store(false);
  g_signal.store(0);
  set_handlers(on_signal);
}

InputEndsOnSignal::InputEndsOnSignal() : nothing_(open("/dev/null", O_RDONLY | O_CLOEXEC)) {
  if (nothing_ < 0) throw Error(ErrorCode::kIo, "can't open /dev/null");
  g_nothing.store(nothing_);
}

InputEndsOnSignal::~InputEndsOnSignal() {
  g_nothing.store(-1);
  close(nothing_);
}

bool InputEndsOnSignal::came() const { return g_signal.load() != 0; }

}  // namespace torpor::cli
