// The engine thread: who runs when, what a slow or failing caller does to its own turn, and calls from callbacks. No model.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "engine/scheduler.h"
#include "torpor/error.h"

namespace torpor {
namespace {

/// What happened on the engine thread, in order.
class Diary {
 public:
  void add(const std::string& line) {
    const std::lock_guard lock(mutex_);
    lines_.push_back(line);
  }
  std::vector<std::string> lines() const {
    const std::lock_guard lock(mutex_);
    return lines_;
  }
  bool has(const std::string& line) const {
    const std::lock_guard lock(mutex_);
    return std::find(lines_.begin(), lines_.end(), line) != lines_.end();
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> lines_;
};

/// Waits for what another thread is about to bring about.
void until(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

/// A turn that is stepped by itself.
struct OwnTurn : Scheduler::Turn {
  /// Whether something is left to compute.
  virtual bool step() = 0;
  bool let_go() noexcept override { return true; }
};

void step_each(std::span<Scheduler::Step> steps, std::span<Scheduler::Turn* const>) {
  for (Scheduler::Step& step : steps) {
    try {
      step.computed = !static_cast<OwnTurn*>(step.turn)->step();
    } catch (...) {
      step.error = std::current_exception();
    }
  }
}

/// Says a letter in each of `steps` steps.
class Chatter : public OwnTurn {
 public:
  Chatter(Diary& diary, std::string name, int steps, Scheduler::Listener& listener, std::function<void(int)> in_step = {})
      : diary_(diary), name_(std::move(name)), steps_(steps), listener_(listener), in_step_(std::move(in_step)) {
    diary_.add(name_ + " begins");
  }
  ~Chatter() override { diary_.add(name_ + (committed_ ? " ends" : " is undone")); }
  bool step() override {
    if (in_step_) in_step_(done_);
    listener_.say("x");
    diary_.add(name_ + " steps");
    return ++done_ < steps_;
  }
  void commit() override {
    diary_.add(name_ + " commits");
    committed_ = true;
  }

 private:
  Diary& diary_;
  const std::string name_;
  const int steps_;
  Scheduler::Listener& listener_;
  const std::function<void(int)> in_step_;
  int done_ = 0;
  bool committed_ = false;
};

constexpr int kEndless = 1 << 30;

struct SchedulerTest : testing::Test {
  Scheduler::TurnCall chat(const std::string& agent, int steps, std::function<void(std::string_view)> on_text = {},
                           std::function<void(int)> in_step = {}) {
    return {.agent = agent, .on_text = std::move(on_text), .begin = [=, this](Scheduler::Listener& listener) {
              return std::make_unique<Chatter>(diary, agent, steps, listener, in_step);
            }};
  }
  static ErrorCode code_of(const std::function<void()>& work) {
    try {
      work();
    } catch (const Error& error) {
      return error.code();
    }
    throw std::logic_error("nothing was thrown");
  }

  Diary diary;
  Scheduler scheduler{1, step_each};  // whoever has said something waits until it was heard
};

TEST_F(SchedulerTest, CallsRunOnOneThreadInOrderAndCarryErrors) {
  const auto id = scheduler.call({}, [] { return std::this_thread::get_id(); });
  EXPECT_NE(id, std::this_thread::get_id());
  EXPECT_EQ(id, scheduler.call({"a"}, [] { return std::this_thread::get_id(); }));
  EXPECT_EQ(scheduler.call({}, [] { return 7; }), 7);
  EXPECT_EQ(code_of([&] { scheduler.call({}, []() -> int { throw Error(ErrorCode::kBusy, "x"); }); }), ErrorCode::kBusy);
}

TEST_F(SchedulerTest, WhatACallerWaitsForAfterItsTurnHoldsUpOnlyWhatNamesTheSameAgent) {
  std::promise<void> saved;
  std::atomic<bool> saving{false};
  const auto wait = [&] {
    saving = true;
    saved.get_future().wait();
    diary.add("a is saved");
  };
  Scheduler::TurnCall turn = chat("a", 2);
  turn.after = wait;
  auto a = std::async(std::launch::async, [&] { return scheduler.turn(turn); });
  until([&] { return saving.load(); });
  EXPECT_TRUE(diary.has("a ends"));
  EXPECT_EQ(scheduler.in_turn(), std::vector<std::string>{"a"});
  auto again = std::async(std::launch::async, [&] { scheduler.call({"a"}, [&] { diary.add("a is cut"); }); });
  until([&] { return scheduler.waiting() == 2; });
  EXPECT_EQ(scheduler.turn(chat("b", 2)), Scheduler::Ended::kCommitted);
  EXPECT_FALSE(diary.has("a is cut"));
  saved.set_value();
  EXPECT_EQ(a.get(), Scheduler::Ended::kCommitted);
  again.get();
  const std::vector<std::string> lines = diary.lines();
  EXPECT_EQ((std::vector<std::string>{lines.end() - 2, lines.end()}), (std::vector<std::string>{"a is saved", "a is cut"}));
}

TEST_F(SchedulerTest, NothingComesAfterATurnOrCallThatFailed) {
  bool waited = false;
  const auto wait = [&] { waited = true; };
  EXPECT_EQ(code_of([&] { scheduler.call({"a"}, [] { throw Error(ErrorCode::kBusy, "x"); }, wait); }), ErrorCode::kBusy);
  Scheduler::TurnCall turn = chat("a", 2, {}, [](int) { throw Error(ErrorCode::kIo, "x"); });
  turn.after = wait;
  EXPECT_EQ(code_of([&] { scheduler.turn(turn); }), ErrorCode::kIo);
  EXPECT_FALSE(waited);
  // What is thrown there ends the wait of others all the same.
  EXPECT_EQ(code_of([&] { scheduler.call({"a"}, [] {}, [] { throw Error(ErrorCode::kIo, "x"); }); }), ErrorCode::kIo);
  EXPECT_NO_THROW(scheduler.call({"a"}, [] {}, wait));
  EXPECT_TRUE(waited);
}

TEST_F(SchedulerTest, WhateverIsThrownOnTheEngineThreadComesOutAsATorporError) {
  const auto code = [&](auto error) { return code_of([&] { scheduler.call({}, [&] { throw error; }); }); };
  EXPECT_EQ(code(std::bad_alloc()), ErrorCode::kResourceExhausted);
  EXPECT_EQ(code(std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again))), ErrorCode::kResourceExhausted);
  EXPECT_EQ(code(std::system_error(std::make_error_code(std::errc::io_error))), ErrorCode::kIo);
  EXPECT_EQ(code(std::runtime_error("x")), ErrorCode::kInternal);
  EXPECT_EQ(code_of([&] { scheduler.turn(chat("a", 3, {}, [](int) { throw std::bad_alloc(); })); }), ErrorCode::kResourceExhausted);
  EXPECT_TRUE(diary.has("a is undone"));
}

TEST_F(SchedulerTest, ATurnIsCommittedWhenAllWasHeardOnTheCallersThread) {
  int heard = 0;
  const auto here = std::this_thread::get_id();
  EXPECT_EQ(scheduler.turn(chat("a", 3, [&](std::string_view text) {
              EXPECT_EQ(text, "x");
              EXPECT_EQ(std::this_thread::get_id(), here);
              EXPECT_FALSE(diary.has("a commits"));
              ++heard;
            })), Scheduler::Ended::kCommitted);
  EXPECT_EQ(heard, 3);
  EXPECT_EQ(diary.lines(), (std::vector<std::string>{"a begins", "a steps", "a steps", "a steps", "a commits", "a ends"}));
}

TEST_F(SchedulerTest, CallsOnOthersRunBetweenStepsAndThoseOnTheSameAgentAfterTheTurn) {
  std::atomic<bool> cancel{false}, stepped{false};
  Scheduler::TurnCall call = chat("a", kEndless, {}, [&](int) {
    stepped = true;
    if (cancel) throw Error(ErrorCode::kCancelled, "enough");
  });
  std::thread talker([&] { EXPECT_EQ(code_of([&] { scheduler.turn(call); }), ErrorCode::kCancelled); });
  until([&] { return stepped.load(); });
  EXPECT_EQ(scheduler.call({}, [] { return 1; }), 1);
  EXPECT_EQ(scheduler.call({"b"}, [] { return 2; }), 2);
  EXPECT_EQ(scheduler.in_turn(), std::vector<std::string>{"a"});
  auto same = std::async(std::launch::async, [&] { scheduler.call({"b", "a"}, [&] { diary.add("call"); }); });
  // What names an agent of the call that waits waits behind it.
  auto behind = std::async(std::launch::async, [&] {
    until([&] { return scheduler.waiting() == 2; });
    scheduler.call({"b"}, [&] { diary.add("behind"); });
  });
  until([&] { return scheduler.waiting() == 3; });
  EXPECT_FALSE(diary.has("call"));
  cancel = true;
  talker.join();
  same.get();
  behind.get();
  const std::vector<std::string> lines = diary.lines();
  EXPECT_EQ(std::vector<std::string>(lines.end() - 3, lines.end()), (std::vector<std::string>{"a is undone", "call", "behind"}));
}

TEST_F(SchedulerTest, TurnsAreSteppedTogetherInTheOrderInWhichTheyCame) {
  std::thread others[2];
  const auto talk = [&](int which, const char* name, size_t waiting) {
    others[which] = std::thread([this, name] { scheduler.turn(chat(name, 3)); });
    until([&] { return scheduler.waiting() == waiting; });
  };
  scheduler.turn(chat("a", 4, {}, [&](int done) {
    if (done != 0) return;
    talk(0, "b", 2);
    talk(1, "c", 3);
  }));
  for (std::thread& other : others) other.join();
  const std::vector<std::string> lines = diary.lines();
  const std::vector<std::string> first{"a begins", "a steps", "b begins", "c begins", "a steps", "b steps", "c steps", "a steps"};
  EXPECT_EQ((std::vector<std::string>{lines.begin(), lines.begin() + 8}), first);
}

TEST_F(SchedulerTest, AStepThatFailsForOneTurnEndsThatTurnOnly) {
  std::thread other;
  scheduler.turn(chat("a", 4, {}, [&](int done) {
    if (done != 0) return;
    other = std::thread([this] {
      EXPECT_EQ(code_of([&] { scheduler.turn(chat("b", 9, {}, [](int n) { if (n == 1) throw Error(ErrorCode::kIo, "x"); })); }),
                ErrorCode::kIo);
    });
    until([&] { return scheduler.waiting() == 2; });
  }));
  other.join();
  EXPECT_TRUE(diary.has("b is undone"));
  EXPECT_TRUE(diary.has("a ends"));
}

TEST_F(SchedulerTest, OnlySoManyTurnsAreAtWorkAtOnce) {
  constexpr int kMore = 5;
  std::vector<std::thread> others;
  int begun_at_most = 0;
  scheduler.turn(chat("first", 20, {}, [&](int done) {
    for (int i = 0; done == 0 && i < Scheduler::kMostTurns + kMore; ++i) {
      others.emplace_back([this, i] { scheduler.turn(chat("other" + std::to_string(i), 3)); });
    }
    if (done == 0) until([&] { return scheduler.waiting() == size_t(Scheduler::kMostTurns) + kMore + 1; });
    begun_at_most = std::max(begun_at_most, int(scheduler.in_turn().size()));
  }));
  for (std::thread& other : others) other.join();
  EXPECT_EQ(begun_at_most, Scheduler::kMostTurns);
}

TEST_F(SchedulerTest, ATurnOfAShareThatHasNoneNeedsNoPlaceAndBeginsBeforeThoseThatWait) {
  std::vector<std::thread> others;
  const auto talk = [&](const std::string& name, const std::string& share) {
    Scheduler::TurnCall call = chat(name, 3);
    call.share = share;
    const size_t before = scheduler.waiting();
    others.emplace_back([this, call] { scheduler.turn(call); });
    until([&] { return scheduler.waiting() > before; });
  };
  std::vector<size_t> at_work;
  scheduler.turn(chat("first", 4, {}, [&](int done) {
    at_work.push_back(scheduler.in_turn().size());
    if (done == 0) {
      for (int i = 1; i < Scheduler::kMostTurns; ++i) talk("a" + std::to_string(i), "");
    } else if (done == 1) {  // all places are taken
      talk("late", ""), talk("b1", "b"), talk("b2", "b"), talk("c", "c");
    }
  }));
  for (std::thread& other : others) other.join();
  const size_t most = Scheduler::kMostTurns;
  EXPECT_EQ(at_work, (std::vector<size_t>{1, most, most + 2, most + 2}));
  const std::vector<std::string> lines = diary.lines();
  const auto place = [&](const char* line) { return std::find(lines.begin(), lines.end(), line) - lines.begin(); };
  EXPECT_LT(place("b1 begins"), place("c begins"));
  EXPECT_LT(place("c begins"), place("late begins"));
  EXPECT_LT(place("c begins"), place("b2 begins"));
}

TEST_F(SchedulerTest, SharesTakeTurnsAtWhatIsComputedWhoeverCameFirstAndHoweverMany) {
  // A row a step, of the turn whose rank says so.
  std::vector<std::string> rows;
  struct Counter : Scheduler::Turn {
    Counter(std::string name, int left) : name(std::move(name)), left(left) {}
    bool let_go() noexcept override { return true; }
    void commit() override {}
    const std::string name;
    int left;
  };
  std::function<void()> at_first;
  Scheduler shared(1, [&](std::span<Scheduler::Step> steps, std::span<Scheduler::Turn* const>) {
    if (const auto work = std::exchange(at_first, {})) work();
    Scheduler::Step& first = *std::ranges::min_element(steps, {}, &Scheduler::Step::rank);
    Counter& turn = static_cast<Counter&>(*first.turn);
    rows.push_back(turn.name);
    first.rows = 1;
    first.computed = --turn.left == 0;
  });
  std::vector<std::thread> threads;
  const auto turn_of = [](const std::string& name, int left, bool background) {
    return Scheduler::TurnCall{.agent = name, .share = name.substr(0, 1), .background = background,
                               .begin = [name, left](Scheduler::Listener&) { return std::make_unique<Counter>(name, left); }};
  };
  const auto count = [&](const std::string& name, int left, bool background = false) {
    const size_t before = shared.waiting();
    threads.emplace_back([&shared, call = turn_of(name, left, background)] { shared.turn(call); });
    until([&] { return shared.waiting() > before; });
  };
  at_first = [&] {
    for (int i = 2; i <= 20; ++i) count("a" + std::to_string(i), 3);
    count("c", 2, true);
    count("b1", 3), count("b2", 2);
  };
  shared.turn(turn_of("a1", 3, false));
  for (std::thread& thread : threads) thread.join();
  // Within a share those that came first are first.
  const std::vector<std::string> first{"a1", "b1", "a1", "b1", "a1", "b1", "a2", "b2", "a2", "b2", "a2", "a3"};
  ASSERT_EQ(rows.size(), 20 * 3 + 5 + 2u);
  EXPECT_EQ((std::vector<std::string>{rows.begin(), rows.begin() + 12}), first);
  EXPECT_EQ((std::vector<std::string>{rows.end() - 3, rows.end()}), (std::vector<std::string>{"a20", "c", "c"}));
}

TEST_F(SchedulerTest, ASlowReaderPausesItsOwnTurnOnly) {
  std::promise<void> read;
  std::atomic<bool> reading{false};
  std::thread slow([&] {
    scheduler.turn(chat("slow", 3, [&](std::string_view) {
      if (!reading.exchange(true)) read.get_future().wait();
    }));
  });
  until([&] { return reading.load(); });
  scheduler.turn(chat("b", 5, [](std::string_view) {}));
  const std::vector<std::string> lines = diary.lines();
  EXPECT_EQ(std::count(lines.begin(), lines.end(), "slow steps"), 1);
  EXPECT_EQ(std::count(lines.begin(), lines.end(), "b steps"), 5);
  read.set_value();
  slow.join();
  EXPECT_TRUE(diary.has("slow ends"));
}

/// Takes so much of what there is at its first step, and holds it to its end.
class Hoarder : public Chatter {
 public:
  Hoarder(int& free, int needs, Diary& diary, std::string name, int steps, Scheduler::Listener& listener)
      : Chatter(diary, name, steps, listener), free_(free), needs_(needs), diary_(diary), name_(std::move(name)) {}
  ~Hoarder() override { give(); }
  bool step() override {
    if (!std::exchange(holds_, true)) {
      if (free_ < needs_) {
        holds_ = false;
        throw Error(ErrorCode::kResourceExhausted, "x").with_field("EngineOptions::memory_budget");
      }
      free_ -= needs_;
      diary_.add(name_ + " takes");
    }
    return Chatter::step();
  }
  bool let_go() noexcept override {
    diary_.add(name_ + " lets go");
    give();
    return true;
  }

 private:
  void give() {
    if (std::exchange(holds_, false)) free_ += needs_;
  }

  int& free_;
  const int needs_;
  Diary& diary_;
  const std::string name_;
  bool holds_ = false;
};

TEST_F(SchedulerTest, ATurnThatFindsNoRoomTakesThatOfOneWhoseReaderIsSlowWhichGoesOnLater) {
  int free = 5;
  const auto hoard = [&](const std::string& name, int needs, std::function<void(std::string_view)> on_text) {
    return Scheduler::TurnCall{.agent = name, .on_text = std::move(on_text), .begin = [&, name, needs](Scheduler::Listener& listener) {
                                 return std::make_unique<Hoarder>(free, needs, diary, name, 3, listener);
                               }};
  };
  std::promise<void> read;
  std::atomic<bool> reading{false};
  int heard = 0;
  auto slow = std::async(std::launch::async, [&] {
    return scheduler.turn(hoard("slow", 3, [&](std::string_view) {
      if (++heard == 1 && !reading.exchange(true)) read.get_future().wait();
    }));
  });
  until([&] { return reading.load(); });
  // It does not fit alone, whatever others let go of.
  EXPECT_EQ(code_of([&] { scheduler.turn(hoard("huge", 6, {})); }), ErrorCode::kResourceExhausted);
  EXPECT_NO_THROW(scheduler.turn(hoard("b", 4, {})));
  read.set_value();
  EXPECT_EQ(slow.get(), Scheduler::Ended::kCommitted);
  EXPECT_EQ(heard, 3);
  EXPECT_EQ(free, 5);
  EXPECT_TRUE(diary.has("slow lets go"));
  EXPECT_FALSE(diary.has("b lets go"));
  const std::vector<std::string> lines = diary.lines();
  EXPECT_EQ(std::count(lines.begin(), lines.end(), "slow takes"), 2);
}

TEST_F(SchedulerTest, ATurnInTheBackgroundGivesItsRoomToAllOthersAndBeginsAfterThem) {
  int free = 3;
  const auto hoard = [&](const std::string& name, bool background) {
    return Scheduler::TurnCall{.agent = name, .background = background, .begin = [&, name](Scheduler::Listener& listener) {
                                 return std::make_unique<Hoarder>(free, 3, diary, name, 3, listener);
                               }};
  };
  std::vector<std::thread> others;
  const auto talk = [&](const std::string& name, bool background) {
    others.emplace_back([this, call = hoard(name, background)] { scheduler.turn(call); });
    until([&] { return scheduler.waiting() == others.size() + 1; });
  };
  Scheduler::TurnCall first = hoard("bg", true);
  first.begin = [&](Scheduler::Listener& listener) {
    struct Talks : Hoarder {
      using Hoarder::Hoarder;
      bool step() override {
        const bool more = Hoarder::step();
        if (auto work = std::exchange(after, {})) work();
        return more;
      }
      std::function<void()> after;
    };
    auto turn = std::make_unique<Talks>(free, 3, diary, "bg", 3, listener);
    turn->after = [&] { talk("bg2", true), talk("f1", false), talk("f2", false); };
    return turn;
  };
  scheduler.turn(first);
  for (std::thread& other : others) other.join();
  EXPECT_EQ(free, 3);
  const std::vector<std::string> lines = diary.lines();
  const auto place = [&](const char* line) { return std::find(lines.begin(), lines.end(), line) - lines.begin(); };
  EXPECT_LT(place("f2 begins"), place("bg2 begins"));
  EXPECT_LT(place("bg lets go"), place("f1 takes"));
  EXPECT_LT(place("f2 ends"), place("bg ends"));
  EXPECT_LT(place("bg ends"), place("bg2 takes"));
  EXPECT_EQ(std::count(lines.begin(), lines.end(), "bg steps"), 3);
  EXPECT_FALSE(diary.has("f1 lets go"));
}

TEST_F(SchedulerTest, ACallThatFindsNoRoomIsMadeAgainWhenATurnHasEnded) {
  int free = 1, tries = 0;
  const auto take = [&] {
    ++tries;
    if (free == 0) throw Error(ErrorCode::kResourceExhausted, "x").with_field("EngineOptions::memory_budget");
    diary.add("the call is made");
  };
  std::thread caller;
  struct Calls : Hoarder {
    using Hoarder::Hoarder;
    bool step() override {
      const bool more = Hoarder::step();
      if (auto work = std::exchange(at_first, {})) work();
      return more;
    }
    std::function<void()> at_first;
  };
  scheduler.turn({.agent = "a", .begin = [&](Scheduler::Listener& listener) {
                    auto turn = std::make_unique<Calls>(free, 1, diary, "a", 20, listener);
                    turn->at_first = [&] {
                      caller = std::thread([&] { scheduler.call({}, take); });
                      until([&] { return scheduler.waiting() == 2; });
                    };
                    return turn;
                  }});
  caller.join();
  EXPECT_EQ(tries, 2);  // refused once, and not asked again before there is room
  const std::vector<std::string> lines = diary.lines();
  EXPECT_EQ(lines.back(), "the call is made");
  EXPECT_FALSE(diary.has("a lets go"));
  free = 0;
  EXPECT_EQ(code_of([&] { scheduler.call({}, take); }), ErrorCode::kResourceExhausted);  // nobody holds any
}

TEST_F(SchedulerTest, ATurnThatGrowsTakesTheRoomOfTheOneThatCameLastWhichGoesOnBeforeLaterOnes) {
  // Each takes one of three when it begins to step, and "a" another one in its third step.
  struct Grower : Hoarder {
    Grower(int& free, Diary& diary, std::string name, int steps, Scheduler::Listener& listener)
        : Hoarder(free, 1, diary, name, steps, listener), free(free), diary(diary), name(name) {}
    ~Grower() override { free += more; }
    bool step() override {
      if (name == "a" && ++calls >= 3 && more == 0) {
        if (free == 0) throw Error(ErrorCode::kResourceExhausted, "x").with_field("EngineOptions::memory_budget");
        --free, ++more;
        diary.add("a grows");
      }
      return Hoarder::step();
    }
    int& free;
    Diary& diary;
    const std::string name;
    int calls = 0, more = 0;
  };
  int free = 3;
  const auto call = [&](const std::string& name, int steps, std::function<void()> at_first = {}) {
    return Scheduler::TurnCall{.agent = name, .begin = [&, name, steps, at_first](Scheduler::Listener& listener) {
                                 if (at_first) at_first();
                                 return std::make_unique<Grower>(free, diary, name, steps, listener);
                               }};
  };
  std::vector<std::thread> others;
  const auto talk = [&](const char* name) {
    others.emplace_back([&, name] { scheduler.turn(call(name, 5)); });
    until([&] { return scheduler.waiting() == others.size() + 1; });
  };
  scheduler.turn(call("a", 5, [&] { talk("b"), talk("c"), talk("d"); }));
  for (std::thread& other : others) other.join();
  const std::vector<std::string> lines = diary.lines();
  const auto place = [&](const char* line) { return std::find(lines.begin(), lines.end(), line) - lines.begin(); };
  EXPECT_EQ(free, 3);
  EXPECT_LT(place("c lets go"), place("a grows"));  // "d" holds nothing: it was refused
  EXPECT_FALSE(diary.has("b lets go"));
  EXPECT_EQ(std::count(lines.begin(), lines.end(), "c takes"), 2);
  EXPECT_EQ(std::count(lines.begin(), lines.end(), "c steps"), 5);
  EXPECT_LT(std::find(lines.begin() + place("c lets go"), lines.end(), "c takes") - lines.begin(), place("d takes"));
}

TEST_F(SchedulerTest, TheNextStepWaitsForTheProgressOfThePrefillToBeHeard) {
  struct Prefill : OwnTurn {
    explicit Prefill(Scheduler::Listener& listener) : listener(listener) {}
    bool step() override {
      listener.read(++done, 10);
      return done < 10;
    }
    void commit() override {}
    Scheduler::Listener& listener;
    int done = 0;
  };
  Scheduler roomy(1 << 20, step_each);
  std::atomic<bool> give_up{false};
  int heard = 0;
  Scheduler::TurnCall call{.agent = "a", .on_prefill = [&](int done, int) { heard = done; give_up = done == 3; },
                           .give_up = &give_up, .begin = [](Scheduler::Listener& l) { return std::make_unique<Prefill>(l); }};
  EXPECT_EQ(roomy.turn(call), Scheduler::Ended::kGivenUp);
  EXPECT_EQ(heard, 3);
}

TEST_F(SchedulerTest, WhatACallbackThrowsUndoesTheTurnAndComesOutAsItIs) {
  struct Mine {};
  for (const int nth : {1, 3}) {  // the first piece, and the last, when all is computed
    int heard = 0;
    EXPECT_THROW(scheduler.turn(chat("a", 3, [&](std::string_view) {
                   if (++heard == nth) throw Mine();
                 })), Mine);
    EXPECT_EQ(diary.lines().back(), "a is undone");
  }
  EXPECT_FALSE(diary.has("a commits"));
}

TEST_F(SchedulerTest, ATurnIsGivenUpInTheQueueWhilePausedAndAtWork) {
  std::atomic<bool> give_up{false}, cancel{false}, reading{false};
  std::promise<void> read;
  Scheduler::TurnCall paused = chat("a", kEndless, [&](std::string_view) {
    reading = true;
    read.get_future().wait();
  });
  paused.give_up = &give_up;
  auto first = std::async(std::launch::async, [&] { return scheduler.turn(paused); });
  until([&] { return reading.load(); });
  Scheduler::TurnCall queued = chat("a", 1);
  queued.cancel = &cancel;
  auto second = std::async(std::launch::async, [&] { return scheduler.turn(queued); });
  until([&] { return scheduler.waiting() == 2; });
  cancel = true;
  EXPECT_EQ(second.get(), Scheduler::Ended::kNotBegun);
  EXPECT_EQ(diary.lines(), (std::vector<std::string>{"a begins", "a steps"}));
  give_up = true;
  until([&] { return diary.has("a is undone"); });
  read.set_value();
  EXPECT_EQ(first.get(), Scheduler::Ended::kGivenUp);

  give_up = false;
  Scheduler::TurnCall at_work = chat("b", kEndless, {}, [&](int done) { give_up = done == 5; });
  at_work.give_up = &give_up;
  EXPECT_EQ(scheduler.turn(at_work), Scheduler::Ended::kGivenUp);
}

TEST_F(SchedulerTest, ACallbackMayCallForAnythingButWhatWaitsForItsOwnTurn) {
  int heard = 0;
  scheduler.turn(chat("a", 2, [&](std::string_view) {
    if (++heard == 2) return;
    EXPECT_EQ(scheduler.call({}, [] { return 1; }), 1);
    EXPECT_EQ(scheduler.call({"b"}, [] { return 2; }), 2);
    EXPECT_EQ(code_of([&] { scheduler.call({"a"}, [] {}); }), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of([&] { scheduler.call({"b", "a"}, [] {}); }), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of([&] { scheduler.turn(chat("a", 1)); }), ErrorCode::kInvalidArgument);
    EXPECT_EQ(code_of([&] { scheduler.refuse_in_callbacks(); }), ErrorCode::kInvalidArgument);
    // A turn of another agent, from whose callback both are out of reach.
    EXPECT_EQ(scheduler.turn(chat("b", 2, [&](std::string_view) {
                EXPECT_EQ(code_of([&] { scheduler.call({"a"}, [] {}); }), ErrorCode::kInvalidArgument);
                EXPECT_EQ(code_of([&] { scheduler.call({"b"}, [] {}); }), ErrorCode::kInvalidArgument);
                EXPECT_EQ(scheduler.call({"c"}, [] { return 3; }), 3);
              })), Scheduler::Ended::kCommitted);
    Scheduler another(1, step_each);
    EXPECT_EQ(another.call({"a"}, [] { return 4; }), 4);
  }));
  EXPECT_NO_THROW(scheduler.refuse_in_callbacks());
  EXPECT_NO_THROW(scheduler.call({"a"}, [] {}));
}

TEST_F(SchedulerTest, OfTwoCallbacksThatWouldWaitForEachOtherOneIsTold) {
  std::atomic<int> in_callback{0}, refused{0};
  const auto talk = [&](const char* own, const char* other) {
    scheduler.turn(chat(own, 1, [&, other](std::string_view) {
      ++in_callback;
      until([&] { return in_callback == 2; });
      try {
        scheduler.call({other}, [] {});
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        ++refused;
      }
    }));
  };
  std::thread one([&] { talk("a", "b"); });
  talk("b", "a");
  one.join();
  EXPECT_EQ(refused, 1);
}

TEST_F(SchedulerTest, AFloodOfCallsStopsNoTurn) {
  std::atomic<bool> over{false};
  std::vector<std::thread> monitors;
  for (int i = 0; i < 3; ++i) {
    monitors.emplace_back([&] {
      // Each call ends when another waits, so that there is always one to run.
      while (!over) scheduler.call({}, [&] { until([&] { return over || scheduler.waiting() >= 3; }); });
    });
  }
  until([&] { return scheduler.waiting() == 3; });
  scheduler.turn(chat("a", 50));
  over = true;
  for (std::thread& monitor : monitors) monitor.join();
}

TEST_F(SchedulerTest, ManyThreadsManyAgents) {
  std::vector<std::thread> threads;
  std::atomic<int> heard{0};
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] {
      const std::string own = "agent" + std::to_string(i % 4), other = "agent" + std::to_string((i + 1) % 4);
      for (int turn = 0; turn < 30; ++turn) {
        scheduler.turn(chat(own, 3, [&](std::string_view) {
          ++heard;
          try {
            scheduler.call({other}, [] {});
          } catch (const Error& error) {
            EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
          }
        }));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(heard, 6 * 30 * 3);
}

}  // namespace
}  // namespace torpor
