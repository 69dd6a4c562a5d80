// What a turn does with the states of recurrent layers. Rows and states are made up; the tokenizer is a real model's.

#include <gtest/gtest.h>

#include "agents/checkpoints.h"
#include "agents/turn_transaction.h"
#include "manager_fixture.h"

namespace torpor {
namespace {

const std::string kModel = TORPOR_SOURCE_DIR "/.models/smollm2-135m";

class TurnStates : public ::testing::Test {
 protected:
  std::unique_ptr<AgentManager> make(size_t budget = 0, const std::string& numerics = "a") {
    return std::make_unique<AgentManager>(
        store_, ManagerOptions{.model_name = "m", .identity = testing::test_identity(), .numerics = numerics,
                               .layout = layout_of(0), .state_layout = testing::small_state_layout(),
                               .durability = Durability::kRename, .memory_budget = budget});
  }
  TurnInput input(const std::string& prompt) const {
    return {.prompt = prompt, .raw = true, .tokenizer = tokenizer_, .chat_template = nullptr};
  }
  /// As the engine does: in steps that end where a state is to be kept.
  static void append(AgentManager& manager, TurnTransaction& turn, std::span<const int32_t> tokens) {
    while (!tokens.empty()) {
      const int64_t length = turn.cache().length();
      const auto stop = std::ranges::upper_bound(turn.stops(), length);
      const size_t most = stop == turn.stops().end() ? tokens.size() : size_t(*stop - length);
      const auto step = tokens.first(std::min(tokens.size(), most));
      const Growth growth{&turn.cache(), int(step.size())};
      manager.reserve({&growth, 1});
      const std::span<std::byte> state = turn.cache().next_state();
      std::memset(state.data(), int(length) + int(step.size()), state.size());
      compute(turn.cache(), step);
      turn.keep_due_state();
      tokens = tokens.subspan(step.size());
    }
  }
  void answer(AgentManager& manager, const std::string& id, const std::string& prompt) const {
    TurnTransaction turn(manager, manager.wake(id), input(prompt));
    append(manager, turn, turn.pending());
    append(manager, turn, ids(5, 9));
    turn.commit({"assistant", "answer"}, true);
  }
  static std::vector<int64_t> positions(const KvCache& cache) {
    std::vector<int64_t> found;
    for (const auto& state : cache.states()) found.push_back(state->position());
    return found;
  }
  static bool holds(const KvCache& cache, int64_t position) {
    return std::ranges::count(positions(cache), position) == 1;
  }
  static std::string words(int n, const std::string& word = " lamp") {
    std::string text;
    for (int i = 0; i < n; ++i) text += word;
    return text;
  }

  testing::TemporaryDirectory directory_;
  Store store_{directory_.path() / "store"};
  const std::shared_ptr<const Tokenizer> tokenizer_ = Tokenizer::load(kModel);
};

TEST_F(TurnStates, ATurnThatWasPutAsideCanStillBeTakenBack) {
  auto manager = make();
  answer(*manager, "a", words(300));
  const std::vector<int32_t> tokens = manager->wake("a")->cache->tokens();
  {
    TurnTransaction turn(*manager, manager->wake("a"), input(words(200, " sea")));
    turn.put_aside();
    turn.bring_back();
    append(*manager, turn, turn.pending().first(100));
    EXPECT_TRUE(holds(turn.cache(), ssize(tokens)));
  }
  const AgentHold agent = manager->wake("a");
  EXPECT_EQ(agent->cache->tokens(), tokens);
  EXPECT_TRUE(agent->whole());
}

TEST_F(TurnStates, WhereATurnGoesOnFromAnotherOnesRowsAStateStays) {
  auto manager = make();
  TurnTransaction first(*manager, manager->wake("a"), input(words(600)));
  append(*manager, first, first.pending().first(400));
  for (const bool late : {false, true}) {
    TurnTransaction second(*manager, manager->wake("b"), input(words(700)));
    if (late) {
      append(*manager, first, first.pending().first(50));
      second.share_rows(first, first.cache().length());
    }
    const int from = second.reused();
    EXPECT_EQ(from, first.cache().length());
    append(*manager, second, second.pending().first(20));
    EXPECT_TRUE(holds(second.cache(), from)) << late;
  }
}

TEST_F(TurnStates, WhoWaitsForRowsGetsThemToTheToken) {
  auto manager = make();
  TurnTransaction first(*manager, manager->wake("a"), input(words(1500)));
  append(*manager, first, first.pending().first(200));
  TurnTransaction second(*manager, manager->wake("b"), input(words(777) + words(600, " sea")));
  first.stop_at(777);
  first.stop_at(777);
  first.stop_at(100);
  append(*manager, first, first.pending());
  second.share_rows(first, 777);
  EXPECT_EQ(second.reused(), 777);
  EXPECT_EQ(second.again(), 0);
  // Of one that nobody had told of it, only the rows up to its last state are had, and that is said.
  TurnTransaction third(*manager, manager->wake("c"), input(words(900) + words(600, " wind")));
  third.share_rows(first, 900);
  EXPECT_EQ(third.reused(), 777);
  EXPECT_EQ(third.again(), 123);
}

TEST_F(TurnStates, ALongPromptKeepsFewStatesWhileItIsRead) {
  auto manager = make();
  constexpr int kStrides = 24;
  const int64_t stride = checkpoint_stride(testing::small_state_layout(), layout_of(0));
  TurnTransaction turn(*manager, manager->wake("a"), input(words(int(kStrides * stride))));
  ASSERT_GE(ssize(turn.stops()), kStrides - 1);
  size_t most = 0;
  while (!turn.pending().empty()) {
    append(*manager, turn, turn.pending().first(std::min<size_t>(512, turn.pending().size())));
    most = std::max(most, turn.cache().states().size());
  }
  EXPECT_LE(most, 10u);
  EXPECT_TRUE(holds(turn.cache(), stride)) << "the first one";
  append(*manager, turn, ids(5, 9));
  const size_t before = turn.cache().nbytes(), held = turn.cache().states().size();
  turn.commit({"assistant", "answer"}, true);
  const size_t gone = held - turn.cache().states().size();
  EXPECT_EQ(before - turn.cache().nbytes(), (gone + 1) * testing::small_state_layout().bytes()) << "and the spare one";
}

TEST_F(TurnStates, RowsThatWereHeldAMomentAgoAreReservedWhateverTheBudget) {
  auto manager = make(2 * layout_of(0).bytes_per_token() * kSegmentTokens);
  TurnTransaction turn(*manager, manager->wake("a"), input(words(300)));
  const Growth growth{&turn.cache(), 1000};
  try {
    manager->reserve({&growth, 1});
    FAIL() << "they don't fit";
  } catch (const Error& error) {
    EXPECT_TRUE(is_lack_of_room(error));
  }
  manager->reserve({&growth, 1}, true);
  EXPECT_EQ(turn.cache().growth(1000), 0u);
}

TEST_F(TurnStates, AnAgentThatWakesAtAStateHasTheLineageOfItsRows) {
  for (const char* numerics : {"a", "a", "b"}) {
    auto manager = make(0, numerics);
    answer(*manager, "a", words(300));
    manager->sleep("a");
  }
  rewind_agent(store_, "a", 560, Durability::kRename);
  auto manager = make(0, "b");
  const AgentHold agent = manager->wake("a");
  EXPECT_LT(agent->cache->length(), 512);
  EXPECT_EQ(agent->lineage.numerics_at(0), "a");
  EXPECT_EQ(agent->lineage.numerics_at(256), "b") << "what it computes from there on";
}

}  // namespace
}  // namespace torpor
