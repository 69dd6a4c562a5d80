// Calls of an Engine from callbacks, from other threads in the middle of a turn, and where the system refuses.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <future>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "torpor/engine.h"

namespace torpor {
namespace {

const std::string kModel = TORPOR_SOURCE_DIR "/.models/smollm2-135m";

TurnRequest request(const std::string& agent, const std::string& prompt, int max_tokens = 4) {
  TurnRequest turn;
  turn.agent = agent;
  turn.prompt = prompt;
  turn.raw = true;
  turn.save = SaveMode::kNo;
  turn.generate.max_tokens = max_tokens;
  return turn;
}

ErrorCode code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code();
  }
  throw std::logic_error("nothing was thrown");
}

void until(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

class EngineCalls : public testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/torpor-test-XXXXXX";
    root_ = mkdtemp(pattern);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  EngineOptions options(size_t text_queue_bytes = 1) const {
    EngineOptions options;
    options.model = kModel;
    options.store = root_;
    options.text_queue_bytes = text_queue_bytes;
    return options;
  }
  static AgentStatus status(const Engine& engine, const std::string& id) {
    for (const AgentStatus& status : engine.agents()) {
      if (status.agent == id) return status;
    }
    return {};
  }

  std::string root_;
};

TEST_F(EngineCalls, FromACallbackOfTheSameAgentWhatWouldWaitIsRefusedAndTheRestAnswers) {
  Engine engine(options());
  engine.turn(request("b", "I am b."));
  const std::map<std::string, std::function<void()>> refused = {
      {"turn", [&] { engine.turn(request("a", "again")); }}, {"save", [&] { engine.save("a"); }},
      {"save_all", [&] { engine.save_all(); }},              {"sleep", [&] { engine.sleep("a"); }},
      {"fork", [&] { engine.fork("a", "x"); }},              {"fork over", [&] { engine.fork("b", "a"); }},
      {"rewind", [&] { engine.rewind("a", 1); }},            {"pin", [&] { engine.pin("a"); }},
      {"rename", [&] { engine.rename("a", "z"); }},          {"rename over", [&] { engine.rename("b", "a"); }},
      {"remove", [&] { engine.remove("a"); }},               {"next_logits", [&] { engine.next_logits("a"); }}};
  int heard = 0;
  TurnRequest turn = request("a", "Once upon a time", 6);
  turn.generate.on_text = [&](std::string_view) {
    if (++heard != 2) return;
    for (const auto& [name, call] : refused) EXPECT_EQ(code_of(call), ErrorCode::kInvalidArgument) << name;
    EXPECT_EQ(engine.memory_usage().agents.size(), 2u);
    EXPECT_TRUE(status(engine, "a").in_turn);
    EXPECT_FALSE(status(engine, "b").in_turn);
    EXPECT_FALSE(engine.prefetch("a"));
    EXPECT_NO_THROW(engine.finish_saves());
    EXPECT_EQ(engine.model().architecture, "llama");
    EXPECT_FALSE(engine.store().contains("a"));
  };
  EXPECT_EQ(engine.turn(turn).tokens.generated, 6);
  EXPECT_GE(heard, 2);
  EXPECT_FALSE(status(engine, "a").in_turn);
  EXPECT_NO_THROW(refused.at("save")());
}

TEST_F(EngineCalls, FromACallbackOfAnotherAgentEverythingWorks) {
  Engine engine(options());
  engine.turn(request("b", "I am b."));
  const std::string undisturbed = engine.turn(request("reference", "Once upon a time", 12)).text;
  std::string nested;
  bool done = false;
  TurnRequest turn = request("a", "Once upon a time", 12);
  turn.generate.on_text = [&](std::string_view) {
    if (std::exchange(done, true)) return;
    TurnRequest inner = request("b", "Go on.", 5);
    inner.generate.on_text = [&](std::string_view text) {
      nested += text;
      EXPECT_EQ(code_of([&] { engine.rewind("a", 0); }), ErrorCode::kInvalidArgument);
      EXPECT_EQ(code_of([&] { engine.rewind("b", 0); }), ErrorCode::kInvalidArgument);
    };
    EXPECT_EQ(engine.turn(inner).text, nested);
    EXPECT_EQ(engine.turn(request("", "Nameless.", 3)).tokens.generated, 3);
    EXPECT_GT(engine.save("b").bytes_written, 0);
    engine.sleep("b");
    EXPECT_TRUE(engine.prefetch("b"));
    EXPECT_FALSE(engine.next_logits("b").empty());
    engine.fork("b", "c");
    engine.rewind("c", 3);
    engine.pin("c");
    engine.rename("c", "d");
    EXPECT_EQ(status(engine, "d").tokens, 3);
    engine.remove("d");
    engine.finish_saves();
  };
  EXPECT_EQ(engine.turn(turn).text, undisturbed);
  EXPECT_FALSE(nested.empty());
  EXPECT_EQ(engine.next_logits("a"), engine.next_logits("reference"));
}

TEST_F(EngineCalls, OtherThreadsAreAnsweredInTheMiddleOfATurn) {
  Engine engine(options(1 << 20));
  engine.turn(request("b", "I am b."));
  std::atomic<bool> cancel{false};
  std::atomic<int> heard{0};
  TurnRequest turn = request("a", "Once upon a time", 2000);
  turn.generate.cancel = &cancel;
  turn.generate.on_text = [&](std::string_view) { ++heard; };
  auto talk = std::async(std::launch::async, [&] { return engine.turn(turn); });
  until([&] { return heard > 2; });
  const AgentStatus before = status(engine, "a");
  EXPECT_TRUE(before.in_turn && before.awake && before.tokens > 0 && before.disk_bytes == 0);
  EXPECT_EQ(engine.memory_usage().agents.size(), 2u);
  engine.fork("b", "c", 2);
  engine.pin("c");
  EXPECT_FALSE(engine.next_logits("b").empty());
  engine.sleep("b");
  until([&] { return status(engine, "a").tokens > before.tokens; });
  // What names the agent waits for its turn.
  auto rewound = std::async(std::launch::async, [&] { engine.rewind("a", 2); });
  EXPECT_TRUE(status(engine, "a").in_turn);
  cancel = true;
  EXPECT_EQ(talk.get().finish_reason, FinishReason::kCancelled);
  rewound.get();
  EXPECT_EQ(status(engine, "a").tokens, 2);
}

TEST_F(EngineCalls, ASlowReaderHoldsUpNobodyElse) {
  Engine engine(options());
  const std::string undisturbed = engine.turn(request("reference", "Once upon a time", 12)).text;
  std::promise<void> read;
  std::atomic<bool> reading{false};
  TurnRequest turn = request("slow", "Once upon a time", 12);
  turn.generate.on_text = [&](std::string_view) {
    if (!reading.exchange(true)) read.get_future().wait();
  };
  auto slow = std::async(std::launch::async, [&] { return engine.turn(turn); });
  until([&] { return reading.load(); });
  TurnRequest other = request("b", "Hello", 8);
  other.generate.on_text = [](std::string_view) {};
  EXPECT_EQ(engine.turn(other).tokens.generated, 8);
  EXPECT_TRUE(status(engine, "slow").in_turn);
  read.set_value();
  EXPECT_EQ(slow.get().text, undisturbed);
}

TEST_F(EngineCalls, WhatACallbackThrowsComesOutAsItIsAndTheAgentIsAsItWas) {
  struct Mine {};
  Engine engine(options());
  engine.turn(request("a", "Hello."));
  const std::vector<float> before = engine.next_logits("a");
  TurnRequest turn = request("a", "Once upon a time", 2000);
  turn.generate.on_text = [](std::string_view) { throw Mine(); };
  EXPECT_THROW(engine.turn(turn), Mine);
  EXPECT_EQ(engine.next_logits("a"), before);
  turn.generate.max_tokens = 1;  // all was computed before the callback
  EXPECT_THROW(engine.turn(turn), Mine);
  EXPECT_EQ(engine.next_logits("a"), before);
}

TEST_F(EngineCalls, ATurnIsCancelledOrGivenUpWhereverItIs) {
  Engine engine(options());
  std::string long_prompt;
  for (int i = 0; i < 400; ++i) long_prompt += "word" + std::to_string(i % 13) + " ";
  std::atomic<bool> cancel{false}, give_up{false}, reading{false};
  std::promise<void> read;
  TurnRequest paused = request("a", "Once upon a time", 2000);
  paused.give_up = &give_up;
  paused.generate.on_text = [&](std::string_view) {
    if (!reading.exchange(true)) read.get_future().wait();
  };
  auto first = std::async(std::launch::async, [&] { engine.turn(paused); });
  until([&] { return reading.load(); });

  // In the queue, behind the turn of the same agent.
  for (const bool undo : {false, true}) {
    cancel = false;
    TurnRequest queued = request("a", "More.");
    queued.generate.cancel = &cancel;
    if (undo) queued.give_up = &cancel;
    auto second = std::async(std::launch::async, [&] { return engine.turn(queued); });
    cancel = true;
    if (undo) {
      EXPECT_EQ(code_of([&] { second.get(); }), ErrorCode::kCancelled);
    } else {
      const TurnResult result = second.get();
      EXPECT_EQ(result.finish_reason, FinishReason::kCancelled);
      EXPECT_EQ(result.tokens.generated + result.tokens.prefilled, 0);
    }
  }
  // While it waits for its reader.
  give_up = true;
  until([&] { return engine.agents().empty(); });
  read.set_value();
  EXPECT_EQ(code_of([&] { first.get(); }), ErrorCode::kCancelled);

  // Between two chunks of the prompt.
  give_up = false;
  TurnRequest prefill = request("b", long_prompt);
  prefill.give_up = &give_up;
  int chunks = 0;
  prefill.generate.on_prefill = [&](int, int) { give_up = ++chunks == 2; };
  EXPECT_EQ(code_of([&] { engine.turn(prefill); }), ErrorCode::kCancelled);
  EXPECT_EQ(chunks, 2);
  EXPECT_TRUE(engine.agents().empty());
}

TEST_F(EngineCalls, SaveAllTellsItsProgressOnTheCallersThreadWhichMayCall) {
  Engine engine(options());
  for (const char* id : {"a", "b"}) engine.turn(request(id, "Hello."));
  const auto here = std::this_thread::get_id();
  std::vector<int> told;
  engine.save_all([&](int done, int total) {
    EXPECT_EQ(std::this_thread::get_id(), here);
    EXPECT_EQ(total, 2);
    EXPECT_EQ(engine.memory_usage().agents.size(), 2u);
    told.push_back(done);
  });
  ASSERT_FALSE(told.empty());
  EXPECT_EQ(told.back(), 2);
  EXPECT_FALSE(status(engine, "a").unsaved);
  EXPECT_TRUE(engine.store().contains("b"));
}

TEST_F(EngineCalls, ForkRewindAndPinAreOnDiskWhenTheyReturnUnlessTheCallerWantsThemBehind) {
  Engine engine(options());
  engine.turn(request("a", "Once upon a time there was"));
  engine.save("a");
  engine.fork("a", "b", 3);
  EXPECT_EQ(Store(root_).agent_info("b").cache_size, 3);
  engine.rewind("a", 2);
  EXPECT_EQ(Store(root_).agent_info("a").cache_size, 2);
  engine.pin("a");
  EXPECT_FALSE(status(engine, "a").unsaved);
  engine.rename("a", "z");
  EXPECT_TRUE(Store(root_).contains("z"));

  engine.store().set_disk_limits({.min_free = int64_t(1) << 60});  // from now on no save succeeds
  const std::vector<std::function<void(SaveMode)>> changes = {[&](SaveMode save) { engine.fork("z", save == SaveMode::kWait ? "c" : "d", 1, save); },
                                                              [&](SaveMode save) { engine.rewind("z", save == SaveMode::kWait ? 1 : 0, save); },
                                                              [&](SaveMode save) { engine.pin("z", save != SaveMode::kWait, save); }};
  for (size_t i = 0; i < changes.size(); ++i) {
    EXPECT_EQ(code_of([&] { changes[i](SaveMode::kWait); }), ErrorCode::kResourceExhausted) << i;
    EXPECT_NO_THROW(changes[i](SaveMode::kBehind)) << i;
    EXPECT_EQ(code_of([&] { engine.finish_saves(); }), ErrorCode::kResourceExhausted) << i;
  }
  EXPECT_EQ(status(engine, "c").tokens, 1);  // they stand in memory
  EXPECT_EQ(status(engine, "z").tokens, 0);
}

TEST_F(EngineCalls, AForkedProcessIsToldAtOnce) {
  Engine engine(options());
  engine.turn(request("a", "Hello."));
  const std::vector<std::function<void(Engine&)>> calls = {
      [](Engine& e) { e.turn(request("a", "again")); }, [](Engine& e) { e.prefetch("a"); }, [](Engine& e) { e.save("a"); },
      [](Engine& e) { e.save_all(); },                  [](Engine& e) { e.finish_saves(); }, [](Engine& e) { e.sleep("a"); },
      [](Engine& e) { e.fork("a", "x"); },              [](Engine& e) { e.rewind("a", 1); }, [](Engine& e) { e.pin("a"); },
      [](Engine& e) { e.rename("a", "z"); },            [](Engine& e) { e.remove("a"); },    [](Engine& e) { e.memory_usage(); },
      [](Engine& e) { e.agents(); },                    [](Engine& e) { e.next_logits("a"); }};
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // whoever waits for the engine thread waits for ever
    for (size_t i = 0; i < calls.size(); ++i) {
      try {
        calls[i](engine);
        _exit(int(i) + 1);
      } catch (const Error& error) {
        if (error.code() != ErrorCode::kInvalidArgument) _exit(100 + int(i));
      }
    }
    engine.~Engine();
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << status;
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(engine.turn(request("a", " more")).tokens.generated, 4);
}

#if defined(__GLIBC__)
TEST_F(EngineCalls, AThreadThatTheSystemRefusesIsAnErrorOfTorpors) {
  Engine engine(options());
  TurnRequest turn = request("a", "Hello.");
  turn.save = SaveMode::kWait;
  engine.turn(turn);
  engine.sleep("a");
  pthread_attr_t before, huge;
  ASSERT_EQ(pthread_getattr_default_np(&before), 0);
  pthread_attr_init(&huge);
  ASSERT_EQ(pthread_attr_setstacksize(&huge, size_t(1) << 47), 0);  // no stack of that size can be had
  ASSERT_EQ(pthread_setattr_default_np(&huge), 0);
  EXPECT_FALSE(engine.prefetch("a"));  // nothing was begun
  EXPECT_EQ(code_of([&] { Engine another(options()); }), ErrorCode::kResourceExhausted);
  ASSERT_EQ(pthread_setattr_default_np(&before), 0);
  EXPECT_EQ(engine.turn(request("a", " more")).tokens.generated, 4);
}
#endif

}  // namespace
}  // namespace torpor
