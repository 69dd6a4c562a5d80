#pragma once
/// The one thread that creates, evaluates and destroys MLX arrays, and what is to be done on it, in which order.
///
/// There are *turns*, which take many steps, and *calls*, which take one. A step is one of all turns that may be stepped, at
/// once: the Stepper decides how much it computes of each. Calls and the beginnings of turns come between steps. What names the
/// same agent runs in the order it came: a call waits for the turns and calls on its agents that came before it, and for no others.
///
/// A save is waited for by the caller (`after`). Other steps go on meanwhile; what names the same agent comes later.
///
/// A turn that finds no room in memory takes that of turns whose readers are slow, and of those that came later. Where there are
/// none it lets go of its own and waits. A turn without memory keeps its place: no later turn begins before it goes on, which
/// it does when a turn has ended, or no other can be stepped, and its reader has heard all. A call that finds no room waits
/// likewise, and is made again. Only what does not fit alone fails.
///
/// Turns are shared out fairly: of those that wait, one whose *share* has fewest turns at work begins first, and a share that has none
/// needs no place. Prompts are read in the order of what the shares have had (Step::rank). Turns in the *background* come after
/// all others, and are the first to give up their memory.
///
/// A turn talks to its caller through a bounded queue (Listener), whose callbacks run on the caller's thread and may call
/// back. While the queue is full the turn is skipped and others are stepped. It is committed when its caller has heard all.
/// A call made from a callback that would wait, however indirectly, for that callback's own turn is kInvalidArgument.

#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/mutex.h"

namespace torpor {

/// Runs `work` and lets only torpor::Error out: kResourceExhausted for memory or threads that the system refuses, else kInternal.
/// For every wall that foreign exceptions meet.
void translate_errors(const std::function<void()>& work);

class Scheduler {
 public:
  /// Where a turn says what its caller is to hear. Engine thread; never waits.
  class Listener {
   public:
    virtual void say(std::string_view text) = 0;
    virtual void read(int done, int total) = 0;

   protected:
    ~Listener() = default;
  };

  /// A turn at work: made, used and destroyed on the engine thread. The destructor undoes what was not committed.
  class Turn {
   public:
    virtual ~Turn() = default;
    /// Lets go of the memory that it holds; its next step takes it again. False when it can't, and nothing has changed.
    virtual bool let_go() noexcept = 0;
    /// After the last step, when the caller has heard everything.
    virtual void commit() = 0;
  };

  /// One of the turns that may be stepped, and what its step came to.
  struct Step {
    Turn* turn = nullptr;
    int rank = 0;              ///< the lower, the sooner its prompt is read: the turn of the share that has had least is 0
    int64_t rows = 0;          ///< that were computed, told by the Stepper: what its share has had
    bool computed = false;     ///< nothing is left to compute
    std::exception_ptr error;  ///< ends the turn; or is_lack_of_room, and the turn is as it was
  };
  /// Steps turns, given in the order they came, those in the background last: at least one of them, the first unless there is a reason. `resting` turns hold
  /// their rows, but can't be stepped now: a callback of theirs runs, or they are computed. Throws nothing but what ends them all.
  using Stepper = std::function<void(std::span<Step>, std::span<Turn* const> resting)>;

  /// What a caller asks for.
  struct TurnCall {
    std::string agent;
    std::string share;                                      ///< whose share of the engine it takes
    bool background = false;                                ///< it can wait for all that are not
    std::function<void(std::string_view)> on_text;          ///< may be empty
    std::function<void(int done, int total)> on_prefill;    ///< may be empty; the next step waits until it has returned
    const std::atomic<bool>* cancel = nullptr;              ///< ends the turn in its own way; one that has not begun is given up
    const std::atomic<bool>* give_up = nullptr;             ///< ends the turn without a commit
    std::function<std::unique_ptr<Turn>(Listener&)> begin;  ///< its first step, on the engine thread
    std::function<void()> after;                            ///< may be empty; on the caller's thread, once it is committed
  };
  enum class Ended {
    kCommitted,
    kNotBegun,  ///< cancelled before its first step
    kGivenUp,   ///< undone
  };

  /// Turns that may be at work at once, those not counted whose readers are slow. Others wait, but for the first of a share.
  static constexpr int kMostTurns = 32;

  /// `text_queue_bytes`: text that may wait for each turn's caller. `stepper` runs on the engine thread.
  Scheduler(size_t text_queue_bytes, Stepper stepper);
  /// As finish.
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;

  /// Runs a turn to its end. Throws what its steps threw, and, when the turn has been undone, what a callback threw.
  Ended turn(const TurnCall& call);

  /// Runs `work` on the engine thread, once nothing that names one of `agents` is before it, and gives back what it returns.
  /// Throws torpor::Error, whatever it throws. `after` may be empty; it runs on the calling thread once `work` is done.
  /// `give_up` may be nullptr; set while the call waits, it makes it kCancelled.
  template <class F>
  auto call(std::vector<std::string> agents, F work, const std::function<void()>& after = nullptr,
            const std::atomic<bool>* give_up = nullptr) -> std::invoke_result_t<F> {
    using Result = std::invoke_result_t<F>;
    if constexpr (std::is_void_v<Result>) {
      run_call(std::move(agents), work, after, give_up);
    } else {
      std::optional<Result> result;
      run_call(std::move(agents), [&] { result.emplace(work()); }, after, give_up);
      return std::move(*result);
    }
  }
  /// Waits until nothing is left to do, then runs `work`, which throws nothing, and ends the thread.
  void finish(const std::function<void()>& work);

  /// Agents whose turns have begun.
  std::vector<std::string> in_turn() const;
  /// Turns and calls that are not over.
  size_t waiting() const;
  /// kInvalidArgument when the caller is a callback of one of the turns: for calls that wait for every turn.
  void refuse_in_callbacks() const;

 private:
  class Task;
  /// Those whose turns take the same part of the engine.
  struct Share {
    int64_t rows = 0;  ///< computed for it; at first what the share has had that had least
    int turns = 0;     ///< that are not over
  };
  enum class Action { kNothing, kCall, kBegin, kStep, kCommit, kUndo };

  void run_call(std::vector<std::string> agents, const std::function<void()>& work, const std::function<void()>& after,
                const std::atomic<bool>* give_up);
  void enqueue(Task& task) TORPOR_REQUIRES(mutex_);
  /// The share of that name, with a turn more.
  Share& enter(const std::string& name) TORPOR_REQUIRES(mutex_);
  /// On its caller's thread, for a task that is over: what comes after it, and the end of what waits for it.
  void leave(Task& task) TORPOR_REQUIRES(mutex_);
  /// Whether `task`, in the list, can't begin before one of `own` is over.
  bool waits_for(const Task& task, const std::vector<const Task*>& own) const TORPOR_REQUIRES(mutex_);
  void hear(Task& task) TORPOR_REQUIRES(mutex_);

  void run();
  /// What comes next. With kStep: a step of all that may be stepped.
  std::pair<Task*, Action> next() const TORPOR_REQUIRES(mutex_);
  bool blocked(const Task& task) const TORPOR_REQUIRES(mutex_);
  /// Whether nothing but room keeps a turn from being stepped.
  bool may_step(const Task& task) const;
  /// Whether a turn without memory may try to take it again.
  bool may_return(const Task& task) const TORPOR_REQUIRES(mutex_);
  std::vector<Task*> steppable() const TORPOR_REQUIRES(mutex_);
  /// All tasks in the order in which they may have memory: as they came, turns in the background last.
  std::vector<Task*> in_order() const TORPOR_REQUIRES(mutex_);
  /// Turns of its share that have begun and have something left to compute.
  int at_work(const Task& task) const TORPOR_REQUIRES(mutex_);
  /// Of two turns that wait: whether `a` begins before `b`, which came later.
  bool begins_before(const Task& a, const Task& b) const TORPOR_REQUIRES(mutex_);
  /// A turn that was refused room: whether others hold some. Then one of them, or this one, has let go of it.
  /// `held`: it had its own, and needs more.
  bool make_room(Task& task, bool held) TORPOR_REQUIRES(mutex_);
  bool let_go(Task& task) TORPOR_REQUIRES(mutex_);
  void act(Task& task, Action action) TORPOR_REQUIRES(mutex_);
  /// Waits a little for the callbacks of the last step's progress.
  void hear_out(MutexLock& lock) TORPOR_REQUIRES(mutex_);
  void step() TORPOR_REQUIRES(mutex_);
  /// What a beginning or a step of a turn came to.
  void settle(Task& task, bool held, bool computed, std::exception_ptr error) TORPOR_REQUIRES(mutex_);
  /// Nothing is left for the engine thread; the turn itself is gone.
  void end(Task& task, std::exception_ptr error) TORPOR_REQUIRES(mutex_);

  const size_t text_queue_bytes_;
  const Stepper stepper_;
  mutable Mutex mutex_;  // of tasks, too
  CondVar wake_;         // the engine thread
  std::list<Task*> tasks_ TORPOR_GUARDED_BY(mutex_);  // in the order they came; owned by their callers, who wait
  std::map<std::string, Share> shares_ TORPOR_GUARDED_BY(mutex_);  // of turns that are not over
  uint64_t numbers_ TORPOR_GUARDED_BY(mutex_) = 0;
  uint64_t due_ TORPOR_GUARDED_BY(mutex_) = 0;    // calls and turns up to this number come before the next step
  uint64_t freed_ TORPOR_GUARDED_BY(mutex_) = 0;  // how often a turn that held memory has ended
  const std::function<void()>* last_ TORPOR_GUARDED_BY(mutex_) = nullptr;
  bool closing_ TORPOR_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace torpor
