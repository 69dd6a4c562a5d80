#pragma once
/// A process forked from the test, which shares what the test had open.

#include <cstdlib>
#include <exception>
#include <functional>

#include <sys/wait.h>
#include <unistd.h>

namespace torpor::testing {

/// Runs `first` in a child, which then lives until `end`. A child that throws ends with status 1.
class ForkedChild {
 public:
  explicit ForkedChild(const std::function<void()>& first) {
    if (::pipe(done_) != 0 || ::pipe(go_) != 0) std::abort();
    pid_ = ::fork();
    if (pid_ != 0) {
      ::close(done_[1]), ::close(go_[0]);
      return;
    }
    ::close(done_[0]), ::close(go_[1]);
    char status = 0;
    try {
      first();
    } catch (const std::exception&) {
      status = 1;
    }
    if (::write(done_[1], &status, 1) != 1) ::_exit(2);
    char ignored;
    if (::read(go_[0], &ignored, 1) < 0) ::_exit(2);
    ::_exit(status);
  }
  ~ForkedChild() {
    end();
    ::close(done_[0]);
  }

  /// Waits until `first` has run; 0 when it has thrown nothing.
  int first_part() {
    char status = 3;
    return ::read(done_[0], &status, 1) == 1 ? status : 3;
  }
  int end() {
    if (pid_ <= 0) return status_;
    // A byte, for closing is not enough: later children have this end too.
    int status = ::write(go_[1], "", 1) == 1 ? 0 : 4;
    ::close(go_[1]);
    ::waitpid(pid_, &status, 0);
    pid_ = 0;
    return status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 4;
  }

 private:
  int done_[2], go_[2], status_ = 0;
  pid_t pid_;
};

}  // namespace torpor::testing
