// A turn is committed with its answer, or leaves no trace. Rows are made up; tokenizer and template are a real model's.

#include <gtest/gtest.h>

#include "agents/turn_transaction.h"
#include "manager_fixture.h"

namespace torpor {
namespace {

const std::string kModel = TORPOR_SOURCE_DIR "/.models/smollm2-135m";

class Turns : public Manager {
 protected:
  TurnInput input(const std::string& prompt, bool raw = true) const {
    return {.prompt = prompt, .raw = raw, .tokenizer = tokenizer_, .chat_template = template_};
  }
  static void append(AgentManager& manager, TurnTransaction& turn, std::span<const int32_t> tokens) {
    const Growth growth{&turn.cache(), int(tokens.size())};
    manager.reserve({&growth, 1});
    compute(turn.cache(), tokens);
  }
  /// A whole turn, with an answer of `answered` tokens.
  void answer(AgentManager& manager, const std::string& id, const TurnInput& input, int answered = 5) const {
    TurnTransaction turn(manager, manager.wake(id), input);
    append(manager, turn, turn.pending());
    append(manager, turn, ids(answered, 9));
    turn.commit({"assistant", "answer"}, true);
    EXPECT_FALSE(turn.save(SaveMode::kNo).valid());
  }
  static std::string words(int n, const std::string& word = " lamp") {
    std::string text;
    for (int i = 0; i < n; ++i) text += word;
    return text;
  }

  const std::shared_ptr<const Tokenizer> tokenizer_ = Tokenizer::load(kModel);
  const std::shared_ptr<const ChatTemplate> template_ = ChatTemplate::load(kModel);
};

INSTANTIATE_TEST_SUITE_P(Windows, Turns, ::testing::Values(0, 300, -300));

TEST_P(Turns, ACommittedTurnIsHistoryAndMessages) {
  auto manager = make();
  TurnInput first = input("Hello.", false);
  first.system = "Be brief.";
  answer(*manager, "a", first);
  const AgentHold agent = manager->wake("a");
  ASSERT_EQ(agent->messages.size(), 3u);
  EXPECT_EQ(agent->messages[0].role, "system");
  EXPECT_EQ(agent->messages[1].content, "Hello.");
  EXPECT_EQ(agent->messages[2].content, "answer");
  EXPECT_EQ(agent->messages[2].end, agent->cache->length());
  EXPECT_EQ(agent->history, agent->cache->tokens());
  EXPECT_TRUE(agent->dirty());
  TurnTransaction turn(*manager, manager->wake("a"), input("And now?", false));
  EXPECT_EQ(turn.reused(), agent->cache->length());
  append(*manager, turn, turn.pending());
  turn.commit({"assistant", "answer"}, true);
  EXPECT_GT(turn.save(SaveMode::kWait).get().bytes_written, 0);
  manager->tell_errors();
  EXPECT_FALSE(agent->dirty());
}

TEST_P(Turns, ATurnThatIsNotCommittedLeavesTheAgentAsItWas) {
  for (const bool saved : {false, true}) {
    auto manager = make();
    const std::string id = saved ? "saved" : "unsaved";
    answer(*manager, id, input(words(800)));
    if (saved) {
      manager->sleep(id);
      manager->wake(id);
    }
    const AgentHold agent = manager->wake(id);
    const std::vector<int32_t> tokens = agent->cache->tokens();
    const uint64_t version = agent->version;
    const std::vector<std::string> segments = agent->segments;
    for (const int computed : {0, 1, 300, 700}) {
      {
        TurnTransaction turn(*manager, manager->wake(id), input(words(900, " sea")));
        append(*manager, turn, turn.pending().first(size_t(computed)));
      }
      EXPECT_EQ(agent->cache->tokens(), tokens) << computed;
      EXPECT_EQ(agent->history, tokens);
      EXPECT_EQ(agent->version, version);
      EXPECT_EQ(agent->messages.size(), 2u);
      EXPECT_EQ(agent->segments, segments);
      EXPECT_EQ(agent->dirty(), !saved);
      expect_sound(*agent->cache);
    }
  }
}

TEST_P(Turns, RowsThatATurnBeganByCuttingComeBack) {
  auto manager = make();
  answer(*manager, "a", input(words(300)));
  {
    // Cancelled in the prefill: its rows stay for when it is asked again.
    TurnTransaction turn(*manager, manager->wake("a"), input(words(700, " sea")));
    append(*manager, turn, turn.pending().first(600));
    turn.commit({"assistant", ""}, false);
  }
  const AgentHold agent = manager->wake("a");
  const std::vector<int32_t> tokens = agent->cache->tokens();
  const uint64_t version = agent->version;
  EXPECT_EQ(agent->history.size() + 600, tokens.size());
  {
    TurnTransaction turn(*manager, manager->wake("a"), input(words(700, " sea") + words(10)));
    EXPECT_EQ(turn.reused(), int(tokens.size()));
  }
  {
    TurnTransaction turn(*manager, manager->wake("a"), input(words(100, " wind")));
    EXPECT_EQ(turn.reused(), int(agent->history.size()));
    append(*manager, turn, turn.pending());
  }
  EXPECT_EQ(agent->cache->tokens(), tokens);
  EXPECT_EQ(agent->version, version);
  expect_sound(*agent->cache);
}

TEST_P(Turns, ACancelledTurnThatPartsFromTheHistoryChangesNothing) {
  auto manager = make();
  const auto by_messages = [&](const std::vector<Message>& messages) {
    TurnInput given = input("", false);
    given.messages = messages;
    return given;
  };
  const std::vector<Message> first = {{"user", words(300)}}, other = {{"user", words(100) + words(700, " sea")}};
  answer(*manager, "a", by_messages(first));
  EXPECT_GT(manager->begin_save(*manager->wake("a")).get().bytes_written, 0);
  manager->wait_for_writes();
  std::vector<int32_t> tokens;
  int computed = 0;
  for (const int rows : {0, 50, 400}) {  // fewer than the history has, and more
    const AgentHold agent = manager->wake("a");
    tokens = agent->cache->tokens();
    const uint64_t version = agent->version;
    {
      TurnTransaction turn(*manager, manager->wake("a"), by_messages(other));
      computed = turn.reused() + rows;
      append(*manager, turn, turn.pending().first(size_t(rows)));
      turn.commit({"assistant", ""}, false);
      turn.save(SaveMode::kNo);
    }
    EXPECT_EQ(agent->cache->tokens(), tokens) << rows;
    EXPECT_EQ(agent->history, tokens);
    EXPECT_EQ(agent->messages.size(), 2u);
    EXPECT_EQ(agent->version, version);
    EXPECT_FALSE(agent->in_turn);
    expect_sound(*agent->cache);
  }
  {
    TurnTransaction again(*manager, manager->wake("a"), by_messages(other));
    EXPECT_EQ(again.reused(), computed) << "its rows are kept a while";
  }
  manager->sleep("a");
  EXPECT_EQ(manager->wake("a")->cache->tokens(), tokens);
}

TEST_P(Turns, OfAPromptThatIsCutAfterEachChunkNoRowIsComputedTwice) {
  constexpr int kFirst = 250, kChunk = 16, kCuts = 10;
  int which = 0;
  for (const bool named : {true, false}) {
    for (const bool aside : {false, true}) {
      auto manager = make();
      const TurnInput prompt = input(words(800, std::vector{" lamp", " sea", " wind", " rain"}[size_t(which++)]));
      const auto hold = [&] { return named ? manager->wake("a") : manager->stateless(""); };
      int computed = 0;
      int64_t kept = 0;
      for (int cut = 0; cut < kCuts; ++cut) {
        TurnTransaction turn(*manager, hold(), prompt);
        ASSERT_EQ(turn.reused(), computed);
        const int chunk = cut == 0 ? kFirst : kChunk;
        append(*manager, turn, turn.pending().first(size_t(chunk)));
        computed += chunk;
        if (aside) turn.put_aside();
        turn.keep_for_retry(true);
        if (aside || cut == 0) continue;
        // What was kept before is a part of it, and is let go of.
        const int64_t bytes = manager->memory_usage().kv_bytes;
        if (cut == 1) kept = bytes;
        EXPECT_EQ(bytes, kept);
      }
      TurnTransaction turn(*manager, hold(), prompt);
      EXPECT_EQ(turn.reused(), kFirst + (kCuts - 1) * kChunk);
      expect_sound(turn.cache());
    }
  }
}

TEST_P(Turns, AnAgentThatOnlyAFailedTurnWokeGoesBackToSleep) {
  auto manager = make();
  answer(*manager, "a", input(words(300)));
  manager->sleep("a");
  for (const char* id : {"a", "new"}) {
    {
      TurnTransaction turn(*manager, manager->wake(id), input(words(50, " sea")));
      append(*manager, turn, turn.pending());
    }
    EXPECT_FALSE(manager->is_awake(id));
  }
  EXPECT_FALSE(store_.contains("new"));
  TurnInput other = input("Hello.", false);
  other.system = "Be brief.";
  EXPECT_EQ(testing::code_of([&] { TurnTransaction(*manager, manager->wake("a"), other); }), ErrorCode::kInvalidArgument);
  EXPECT_FALSE(manager->is_awake("a"));
}

TEST_P(Turns, OneTurnOfAnAgentAtATime) {
  auto manager = make();
  TurnTransaction turn(*manager, manager->wake("a"), input("Hello."));
  EXPECT_EQ(testing::code_of([&] { TurnTransaction(*manager, manager->wake("a"), input("Hello.")); }), ErrorCode::kBusy);
  EXPECT_EQ(testing::code_of([&] { manager->sleep("a"); }), ErrorCode::kBusy);
  append(*manager, turn, turn.pending());
  turn.commit({"assistant", "answer"}, true);
  EXPECT_EQ(turn.agent().messages.size(), 2u);
}

TEST_P(Turns, ARollBackAtTheEdgeOfTheBudgetSucceeds) {
  auto manager = make(4 * run_bytes());
  answer(*manager, "a", input(words(300)), 20);
  const AgentHold agent = manager->wake("a");
  const std::vector<int32_t> tokens = agent->cache->tokens();
  {
    TurnTransaction turn(*manager, manager->wake("a"), input(words(800, " sea")));
    append(*manager, turn, turn.pending().first(1024 - tokens.size()));
    EXPECT_EQ(manager->memory_usage().kv_bytes, int64_t(4 * run_bytes()));
  }
  EXPECT_EQ(agent->cache->tokens(), tokens);
  EXPECT_EQ(manager->memory_usage().kv_bytes, int64_t(2 * run_bytes()));
  expect_sound(*agent->cache);
}

}  // namespace
}  // namespace torpor
