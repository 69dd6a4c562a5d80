#include "engine/scheduler.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <utility>

#include "agents/manager.h"
#include "base/foreign_error.h"

namespace torpor {
namespace {

/// How soon the flags of a turn that can't be stepped are seen.
constexpr auto kPatience = std::chrono::milliseconds(20);

/// How long a step waits for the callbacks of the last one's progress, which usually return at once. Their turns would miss the step.
constexpr auto kHearing = std::chrono::milliseconds(10);

constexpr const char* kWork = "The engine's work";

bool is_set(const std::atomic<bool>* flag) { return flag != nullptr && flag->load(); }

}  // namespace

void translate_errors(const std::function<void()>& work) {
  try {
    work();
  } catch (...) {
    throw to_error(std::current_exception(), kWork);
  }
}

/// Something to be done, in its caller's frame. A turn's is the engine thread's end of its queue, too.
class Scheduler::Task final : public Scheduler::Listener {
 public:
  explicit Task(Scheduler& scheduler) : scheduler_(scheduler) {}

  // All under the scheduler's lock, but for what says otherwise.
  std::vector<std::string> agents;
  std::vector<const Task*> holds_up;  // turns whose callbacks wait for this one
  uint64_t number = 0;
  bool over = false;                            // nothing is left for the engine thread
  const std::function<void()>* after = nullptr; // its caller's, before it is off the list
  std::exception_ptr error;
  CondVar changed;  // its caller waits for it

  const std::function<void()>* work = nullptr;  // of a call
  const std::atomic<bool>* give_up = nullptr;   // of a call

  const TurnCall* turn_call = nullptr;          // of a turn
  Share* share = nullptr;                       // of a turn
  std::unique_ptr<Turn> turn;                   // the engine thread's alone; none before it has begun and once it is over
  bool begun = false, computed = false;         // its beginning was made, or tried; its last step
  bool out = false;                             // it was refused room and holds none, or has let go of its own
  uint64_t out_since = 0;                       // Scheduler::freed_ then
  bool deaf = false;                            // a callback has thrown
  Ended ended = Ended::kCommitted;
  struct Said {
    std::string text;
    int done = 0, total = 0;  // of the prefill, where `total` is set
  };
  std::deque<Said> said;
  int unheard = 0;            // of what was said, until its callback has returned
  size_t bytes = 0;           // of that
  bool reading = false;       // a prefill's progress is among it
  bool fresh = false;         // no step has waited for that yet

  bool is_turn() const { return turn_call != nullptr; }
  bool background() const { return is_turn() && turn_call->background; }
  bool holds_memory() const { return is_turn() && turn != nullptr && !out; }
  bool given_up() const {
    if (!is_turn()) return is_set(give_up);
    return deaf || is_set(turn_call->give_up) || (!begun && is_set(turn_call->cancel));
  }
  /// Whether flags of its caller's have to be looked at, which are set without a word.
  bool can_be_given_up() const { return !over && (is_turn() || give_up != nullptr); }
  bool overlaps(const Task& other) const {
    return std::any_of(agents.begin(), agents.end(), [&](const std::string& agent) {
      return std::find(other.agents.begin(), other.agents.end(), agent) != other.agents.end();
    });
  }

  void say(std::string_view text) override {
    if (turn_call->on_text && !text.empty()) push({.text = std::string(text)});
  }
  void read(int done, int total) override {
    if (turn_call->on_prefill) push({.done = done, .total = total});
  }

 private:
  void push(Said news) {
    const MutexLock lock(scheduler_.mutex_);
    ++unheard;
    bytes += news.text.size();
    if (news.total > 0) reading = fresh = true;
    said.push_back(std::move(news));
    changed.notify_one();
  }

  Scheduler& scheduler_;
};

namespace {

/// Turns whose callbacks run on this thread, of any scheduler, the innermost last.
thread_local std::vector<const void*> turns_of_this_thread;

}  // namespace

Scheduler::Scheduler(size_t text_queue_bytes, Stepper stepper)
    : text_queue_bytes_(std::max<size_t>(text_queue_bytes, 1)), stepper_(std::move(stepper)), thread_([this] { run(); }) {}

Scheduler::~Scheduler() {
  if (thread_.joinable()) finish([] {});
}

// ---- callers

bool Scheduler::waits_for(const Task& task, const std::vector<const Task*>& own) const {
  for (const Task* earlier : tasks_) {
    if (earlier == &task) return false;
    if (!earlier->overlaps(task)) continue;
    if (std::find(own.begin(), own.end(), earlier) != own.end() || waits_for(*earlier, own)) return true;
    // A turn whose callback waits for something waits for it too.
    for (const Task* other : tasks_) {
      const std::vector<const Task*>& held_up = other->holds_up;
      if (std::find(held_up.begin(), held_up.end(), earlier) != held_up.end() && waits_for(*other, own)) return true;
    }
  }
  return false;
}

void Scheduler::enqueue(Task& task) {
  for (const void* turn : turns_of_this_thread) {
    const auto found = std::find(tasks_.begin(), tasks_.end(), turn);
    if (found != tasks_.end()) task.holds_up.push_back(*found);
  }
  tasks_.push_back(&task);
  if (!task.holds_up.empty() && waits_for(task, task.holds_up)) {
    tasks_.pop_back();
    throw Error(ErrorCode::kInvalidArgument, "This call would wait for the turn of agent '" + task.holds_up.back()->agents.front() +
                                             "', from whose callback it is made; make it when that turn is over.");
  }
  task.number = ++numbers_;
  wake_.notify_one();
}

void Scheduler::run_call(std::vector<std::string> agents, const std::function<void()>& work,
                         const std::function<void()>& after, const std::atomic<bool>* give_up) {
  Task task(*this);
  task.agents = std::move(agents);
  task.work = &work;
  task.give_up = give_up;
  if (after) task.after = &after;
  MutexLock lock(mutex_);
  enqueue(task);
  while (!task.over) task.changed.wait(lock);
  leave(task);
  if (task.error) std::rethrow_exception(task.error);
}

void Scheduler::leave(Task& task) {
  if (task.after == nullptr) return;
  try {
    const MutexUnlock unlocked(mutex_);
    (*task.after)();
  } catch (...) {
    task.error = std::current_exception();
  }
  tasks_.remove(&task);
  wake_.notify_one();
}

Scheduler::Ended Scheduler::turn(const TurnCall& call) {
  Task task(*this);
  task.turn_call = &call;
  if (!call.agent.empty()) task.agents = {call.agent};  // one without a name is nobody else's
  if (call.after) task.after = &call.after;
  MutexLock lock(mutex_);
  enqueue(task);
  task.share = &enter(call.share);
  std::exception_ptr thrown;
  while (true) {
    while (!task.over && (task.said.empty() || task.deaf)) task.changed.wait(lock);
    if (task.over) break;
    try {
      hear(task);
    } catch (...) {
      thrown = std::current_exception();
      task.deaf = true;  // now the engine thread undoes the turn
      wake_.notify_one();
    }
  }
  leave(task);
  if (--task.share->turns == 0) shares_.erase(call.share);
  if (thrown) std::rethrow_exception(thrown);
  if (task.error) std::rethrow_exception(task.error);
  return task.ended;
}

Scheduler::Share& Scheduler::enter(const std::string& name) {
  const auto least = std::min_element(shares_.begin(), shares_.end(), [](const auto& a, const auto& b) {
    return a.second.rows < b.second.rows;
  });
  // One that was away has saved nothing up.
  const int64_t rows = least == shares_.end() ? 0 : least->second.rows;
  Share& share = shares_.try_emplace(name, Share{rows}).first->second;
  ++share.turns;
  return share;
}

void Scheduler::hear(Task& task) {
  const Task::Said said = std::move(task.said.front());
  task.said.pop_front();
  {
    const MutexUnlock unlocked(mutex_);
    turns_of_this_thread.push_back(&task);
    try {
      said.total > 0 ? task.turn_call->on_prefill(said.done, said.total) : task.turn_call->on_text(said.text);
    } catch (...) {
      turns_of_this_thread.pop_back();
      throw;
    }
    turns_of_this_thread.pop_back();
  }
  --task.unheard;
  task.bytes -= said.text.size();
  if (said.total > 0) task.reading = false;
  wake_.notify_one();
}

void Scheduler::finish(const std::function<void()>& work) {
  MutexLock lock(mutex_);
  last_ = &work;
  closing_ = true;
  wake_.notify_one();
  lock.unlock();
  thread_.join();
}

std::vector<std::string> Scheduler::in_turn() const {
  const MutexLock lock(mutex_);
  std::vector<std::string> agents;
  for (const Task* task : tasks_) {
    if (task->is_turn() && task->begun) agents.insert(agents.end(), task->agents.begin(), task->agents.end());
  }
  return agents;
}

size_t Scheduler::waiting() const {
  const MutexLock lock(mutex_);
  return tasks_.size();
}

void Scheduler::refuse_in_callbacks() const {
  const MutexLock lock(mutex_);
  for (const void* turn : turns_of_this_thread) {
    const auto found = std::find(tasks_.begin(), tasks_.end(), turn);
    if (found == tasks_.end()) continue;
    throw Error(ErrorCode::kInvalidArgument, "This call waits for every turn, and so for the one from whose callback it is made; "
                                             "make it when that turn is over.");
  }
}

// ---- the engine thread

bool Scheduler::blocked(const Task& task) const {
  for (const Task* earlier : tasks_) {
    if (earlier == &task) return false;
    if (earlier->overlaps(task)) return true;
  }
  return false;
}

bool Scheduler::may_step(const Task& task) const {
  // One that is cancelled ends soon, and what it still says is little.
  return !task.computed && !task.reading && (task.bytes < text_queue_bytes_ || is_set(task.turn_call->cancel));
}

bool Scheduler::may_return(const Task& task) const {
  if (task.unheard > 0) return false;
  return task.out_since != freed_ || std::none_of(tasks_.begin(), tasks_.end(), [&](const Task* other) {
    return other->holds_memory() && may_step(*other);
  });
}

std::vector<Scheduler::Task*> Scheduler::in_order() const {
  std::vector<Task*> tasks(tasks_.begin(), tasks_.end());
  std::stable_partition(tasks.begin(), tasks.end(), [](const Task* task) { return !task->background(); });
  return tasks;
}

std::vector<Scheduler::Task*> Scheduler::steppable() const {
  std::vector<Task*> tasks;
  for (Task* task : in_order()) {
    if (task->is_turn() && task->turn != nullptr && may_step(*task) && (!task->out || may_return(*task))) tasks.push_back(task);
  }
  return tasks;
}

int Scheduler::at_work(const Task& task) const {
  return int(std::count_if(tasks_.begin(), tasks_.end(), [&](const Task* other) {
    return other->share == task.share && other->turn != nullptr && !other->computed;
  }));
}

bool Scheduler::begins_before(const Task& a, const Task& b) const {
  if (a.background() != b.background()) return b.background();
  return at_work(a) <= at_work(b);
}

std::pair<Scheduler::Task*, Scheduler::Action> Scheduler::next() const {
  std::pair<Task*, Action> later{nullptr, Action::kNothing};  // what came since the last step
  const std::vector<Task*> steps = steppable();
  Task* begins = nullptr;  // of the turns that may begin, the one whose turn it is
  bool may_begin = true;
  for (Task* task : in_order()) {
    if (task->over) continue;
    if (task->given_up()) return {task, Action::kUndo};  // whatever is before it
    if (task->is_turn() && task->turn != nullptr) {
      if (task->computed && task->unheard == 0) return {task, Action::kCommit};
      if (task->out && task->unheard == 0) may_begin = false;
      continue;
    }
    if (blocked(*task)) continue;
    if (task->out && !may_return(*task)) may_begin = false;  // nor do turns after it
    if (!may_begin && (task->out || task->is_turn())) continue;
    if (task->is_turn()) {
      const bool has_place = steps.size() < size_t(kMostTurns) || (!task->background() && at_work(*task) == 0);
      if (has_place && (begins == nullptr || !begins_before(*begins, *task))) begins = task;
    } else if (task->number <= due_) {
      return {task, Action::kCall};
    } else if (later.first == nullptr) {
      later = {task, Action::kCall};
    }
  }
  if (begins != nullptr && begins->number <= due_) return {begins, Action::kBegin};
  if (begins != nullptr && (later.first == nullptr || begins->number < later.first->number)) later = {begins, Action::kBegin};
  return steps.empty() ? later : std::pair{steps.front(), Action::kStep};
}

bool Scheduler::let_go(Task& task) {
  {
    const MutexUnlock unlocked(mutex_);
    if (task.turn != nullptr && !task.turn->let_go()) return false;
  }
  task.out = true;
  task.out_since = freed_;
  task.computed = false;
  return true;
}

bool Scheduler::make_room(Task& task, bool held) {
  std::vector<Task*> give;  // that may have to
  bool later = false, others = false;
  for (Task* other : in_order()) {
    later |= other == &task;
    if (other == &task || !other->holds_memory()) continue;
    const bool ends = other->computed && other->unheard == 0;  // it is about to be committed
    if (!ends && ((later && held) || !may_step(*other) || (other->background() && !task.background()))) {
      give.push_back(other);
    } else {
      others = true;
    }
  }
  for (auto victim = give.rbegin(); victim != give.rend(); ++victim) {
    if (let_go(**victim)) return true;
  }
  return others && let_go(task);
}

void Scheduler::end(Task& task, std::exception_ptr error) {
  task.error = error;
  task.over = true;
  if (error) task.after = nullptr;
  if (task.after == nullptr) tasks_.remove(&task);
  task.changed.notify_one();  // under the lock: the task is gone once its caller has it
}

void Scheduler::settle(Task& task, bool held, bool computed, std::exception_ptr error) {
  const bool refused = error && is_lack_of_room(to_error(error, ""));
  if (task.out && (refused || !error)) return;  // it has just given its room to an earlier one, and is to be stepped again
  if (refused && make_room(task, held)) {
    task.begun = task.turn != nullptr;
    return;
  }
  task.computed = computed;
  if (!error) return;
  {
    const MutexUnlock unlocked(mutex_);
    task.turn.reset();
  }
  ++freed_;
  end(task, std::make_exception_ptr(to_error(error, kWork)));
}

void Scheduler::act(Task& task, Action action) {
  if (action == Action::kStep) return step();
  const bool begun = std::exchange(task.begun, true);
  task.out = false;
  std::exception_ptr error;
  {
    const MutexUnlock unlocked(mutex_);
    try {
      translate_errors([&] {
        switch (action) {
          case Action::kBegin: task.turn = task.turn_call->begin(task); break;
          case Action::kCall: (*task.work)(); break;
          case Action::kCommit: task.turn->commit(); break;
          default: break;
        }
      });
    } catch (...) {
      error = std::current_exception();
    }
    if (action != Action::kBegin) task.turn.reset();
  }
  if (action == Action::kBegin || action == Action::kCall) {
    settle(task, false, false, error);
    if (action == Action::kCall && !error) end(task, nullptr);
    return;
  }
  if (action == Action::kUndo && !task.is_turn()) {
    const Error given_up(ErrorCode::kCancelled, "The call was given up while it waited; nothing has happened.");
    error = std::make_exception_ptr(given_up);
  } else if (action == Action::kUndo) {
    task.ended = begun ? Ended::kGivenUp : Ended::kNotBegun;
    task.after = nullptr;
  }
  freed_ += task.is_turn() ? 1 : 0;
  end(task, error);
}

void Scheduler::hear_out(MutexLock& lock) {
  using Clock = std::chrono::steady_clock;
  const auto fresh = [](const Task* task) { return task->reading && task->fresh; };
  const auto until = Clock::now() + kHearing;
  while (std::any_of(tasks_.begin(), tasks_.end(), fresh) && Clock::now() < until) wake_.wait_for(lock, until - Clock::now());
  for (Task* task : tasks_) task->fresh = false;
}

void Scheduler::step() {
  const std::vector<Task*> tasks = steppable();
  std::vector<Step> steps;
  std::vector<bool> held;
  for (Task* task : tasks) {
    steps.push_back({.turn = task->turn.get()});
    held.push_back(!std::exchange(task->out, false));
  }
  std::vector<size_t> ranked(tasks.size());
  std::iota(ranked.begin(), ranked.end(), size_t(0));
  std::stable_sort(ranked.begin(), ranked.end(), [&](size_t a, size_t b) {
    if (tasks[a]->background() != tasks[b]->background()) return tasks[b]->background();
    return tasks[a]->share->rows < tasks[b]->share->rows;
  });
  for (size_t i = 0; i < ranked.size(); ++i) steps[ranked[i]].rank = int(i);
  std::vector<Turn*> resting;
  for (Task* task : tasks_) {
    if (task->holds_memory() && std::find(tasks.begin(), tasks.end(), task) == tasks.end()) resting.push_back(task->turn.get());
  }
  try {
    const MutexUnlock unlocked(mutex_);
    translate_errors([&] { stepper_(steps, resting); });
  } catch (...) {
    for (Step& step : steps) step.error = std::current_exception();
  }
  due_ = numbers_;
  for (size_t i = 0; i < tasks.size(); ++i) tasks[i]->share->rows += steps[i].rows;
  for (size_t i = 0; i < tasks.size(); ++i) settle(*tasks[i], held[i], steps[i].computed, steps[i].error);
}

void Scheduler::run() {
  MutexLock lock(mutex_);
  while (true) {
    if (const auto [task, action] = next(); task != nullptr) {
      if (action == Action::kStep) hear_out(lock);
      act(*task, action);
    } else if (closing_ && tasks_.empty()) {
      break;
    } else if (std::any_of(tasks_.begin(), tasks_.end(), [](const Task* task) { return task->can_be_given_up(); })) {
      wake_.wait_for(lock, kPatience);
    } else {
      wake_.wait(lock);
    }
  }
  const std::function<void()>* last = last_;
  lock.unlock();
  if (last != nullptr) (*last)();
}

}  // namespace torpor
