#pragma once
/// Work on a thread of its own, whose text waits to be fetched. So no thread of the engine's ever needs the GIL, and
/// the thread that waits for text can be interrupted.
///
/// One piece waits here, all others in the engine's queue, whose bound is the only one
/// (EngineOptions::text_queue_bytes). Beyond it the work waits for its reader, and other turns go on. It waits for no
/// reader while a thread waits for its result, nor once it is cancelled. Then pieces are kept here, which are no more
/// than the result's text.

#include <atomic>
#include <chrono>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

#include "base/mutex.h"
#include "bindings.h"
#include "torpor/error.h"

namespace torpor::python {

/// Any method may be called from any Python thread, which holds the GIL; those that wait let go of it. In a process
/// that was forked from the work's own they are kInvalidArgument.
template <class Result, class Piece>
class Running {
 public:
  /// What the work sees of its callers.
  class Control {
   public:
    /// Waits until there is room for one piece.
    void say(Piece piece) {
      MutexLock lock(mutex);
      while (!pieces.empty() && has_reader()) changed.wait(lock);
      pieces.push_back(std::move(piece));
      tell();
    }
    ~Control() {
      for (const int end : pipe) {
        if (end >= 0) close(end);
      }
    }
    std::atomic<bool> cancelled{false}, undone{false};

   private:
    friend class Running;
    /// There is a piece, or the work is over.
    void tell() TORPOR_REQUIRES(mutex) {
      changed.notify_all();
      // A pipe that is full says it, too.
      if (pipe[1] >= 0) static_cast<void>(!write(pipe[1], "", 1));
    }
    Mutex mutex;
    CondVar changed;
    std::deque<Piece> pieces TORPOR_GUARDED_BY(mutex);
    int awaited TORPOR_GUARDED_BY(mutex) = 0;  // threads that wait for the result
    std::optional<Result> result TORPOR_GUARDED_BY(mutex);
    std::exception_ptr error TORPOR_GUARDED_BY(mutex);
    int pipe[2] TORPOR_GUARDED_BY(mutex) = {-1, -1};  // of `fileno`; both are closed with the work

    bool over() const TORPOR_REQUIRES(mutex) { return result || error; }
    /// Whether the work waits until a piece is fetched.
    bool has_reader() const TORPOR_REQUIRES(mutex) { return awaited == 0 && !cancelled && !undone; }
  };
  using Work = std::function<Result(Control&)>;

  explicit Running(Work work) : state_(std::make_unique<State>(std::move(work))) {
    try {
      state_->thread = std::thread([state = state_.get()] { run(*state); });
    } catch (const std::system_error&) {
      throw Error(ErrorCode::kResourceExhausted,
                  "The system refuses another thread; raise its limit or end some processes.");
    }
  }
  /// As `cancel`, and waits.
  ~Running() {
    if (getpid() != state_->process) {
      static_cast<void>(state_.release());  // its thread is in the process that was forked
      return;
    }
    cancel();
    const nanobind::gil_scoped_release release;
    state_->thread.join();
    state_.reset();  // perhaps the last to hold the engine, which waits for its saves
  }

  /// The next piece; nullopt at the end. Waits. Of several threads each gets other pieces. Throws what the work threw,
  /// and what a signal handler of Python's raises meanwhile (the work then goes on).
  std::optional<Piece> next() {
    std::optional<Piece> piece;
    if (wait(&piece)) return piece;
    Control& control = state_->control;
    const MutexLock lock(control.mutex);
    if (control.error) std::rethrow_exception(control.error);
    return std::nullopt;
  }
  /// The next piece if one waits, and whether there is no more to wait for. Does not wait itself, and throws nothing of
  /// the work's. When it gives neither, `fileno` is readable again from the next piece or the end on.
  std::pair<std::optional<Piece>, bool> poll() {
    check_process();
    Control& control = state_->control;
    const MutexLock lock(control.mutex);
    if (!control.pieces.empty()) {
      std::optional<Piece> piece = std::move(control.pieces.front());
      control.pieces.pop_front();
      control.changed.notify_all();
      return {std::move(piece), false};
    }
    if (control.over()) return {std::nullopt, true};
    char said[64];
    while (control.pipe[0] >= 0 && read(control.pipe[0], said, sizeof said) > 0) {
    }
    return {std::nullopt, false};
  }
  /// A file descriptor for an event loop to wait on between calls of `poll`; this object's, and open as long as it is.
  int fileno() {
    check_process();
    Control& control = state_->control;
    const MutexLock lock(control.mutex);
    if (control.pipe[0] < 0) {
      int ends[2];
      if (pipe(ends) != 0) {
        throw Error(ErrorCode::kResourceExhausted, "The system refuses another pipe; raise its limit of open files.");
      }
      for (int i = 0; i < 2; ++i) {
        fcntl(ends[i], F_SETFD, FD_CLOEXEC);
        fcntl(ends[i], F_SETFL, O_NONBLOCK);
        control.pipe[i] = ends[i];
      }
      // What came before this pipe was there.
      if (!control.pieces.empty() || control.over()) control.tell();
    }
    return control.pipe[0];
  }
  /// Ends turns before their next token, with FinishReason::kCancelled. Does not wait.
  void cancel() {
    check_process();
    set(state_->control.cancelled);
  }
  /// Gives the work up, unless it is over. Does not wait. Nothing in a process that was forked.
  void give_up() {
    if (getpid() == state_->process) set(state_->control.undone);
  }
  /// The same, and waits until agents are as they were. It then throws kCancelled.
  void undo() {
    check_process();
    Control& control = state_->control;
    set(control.undone);
    const nanobind::gil_scoped_release release;
    MutexLock lock(control.mutex);
    while (!control.over()) control.changed.wait(lock);
  }
  /// Of work that is over, which this waits for, as `next` does. Pieces that nobody has fetched stay.
  Result result() {
    check_process();
    Control& control = state_->control;
    const auto await = [&control](int by) {
      const MutexLock lock(control.mutex);
      control.awaited += by;
      control.changed.notify_all();
    };
    await(1);
    try {
      wait(nullptr);
    } catch (...) {
      await(-1);
      throw;
    }
    await(-1);
    const MutexLock lock(control.mutex);
    if (control.error) std::rethrow_exception(control.error);
    return *control.result;
  }

 private:
  struct State {
    explicit State(Work given) : work(std::move(given)) {}
    const Work work;
    const pid_t process = getpid();
    Control control;
    std::thread thread;
  };

  static void run(State& state) {
    std::optional<Result> answer;
    std::exception_ptr failed;
    try {
      answer = state.work(state.control);
    } catch (...) {
      failed = std::current_exception();
    }
    const MutexLock lock(state.control.mutex);
    state.control.result = std::move(answer);
    state.control.error = failed;
    state.control.tell();
  }

  void check_process() const {
    if (getpid() == state_->process) return;
    throw Error(ErrorCode::kInvalidArgument, "The turn is in the process that this one was forked from.");
  }
  void set(std::atomic<bool>& flag) {
    const MutexLock lock(state_->control.mutex);
    flag = true;
    state_->control.changed.notify_all();
  }
  /// Waits until the work is over or, with `piece`, until there is one, and takes that. Whether it did.
  bool wait(std::optional<Piece>* piece) {
    // How soon a signal is seen.
    constexpr auto kPatience = std::chrono::milliseconds(50);
    check_process();
    Control& control = state_->control;
    while (true) {
      {
        const nanobind::gil_scoped_release release;
        MutexLock lock(control.mutex);
        const bool has_piece = piece != nullptr && !control.pieces.empty();
        if (!control.over() && !has_piece) control.changed.wait_for(lock, kPatience);
        if (piece != nullptr && !control.pieces.empty()) {
          *piece = std::move(control.pieces.front());
          control.pieces.pop_front();
          control.changed.notify_all();
          return true;
        }
        if (control.over()) return false;
      }
      if (PyErr_CheckSignals() != 0) throw nanobind::python_error();
    }
  }

  std::unique_ptr<State> state_;
};

}  // namespace torpor::python
