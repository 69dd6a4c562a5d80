// A turn whose memory others need: its rows wait in a file, and come back as they were, or what was before the turn does.
// Rows are made up; the tokenizer is a real model's.

#include <cerrno>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "agents/turn_transaction.h"
#include "fault_env.h"
#include "manager_fixture.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;

class Aside : public Manager {
 protected:
  TurnInput input(const std::string& word, int n) const {
    std::string prompt;
    for (int i = 0; i < n; ++i) prompt += " " + word;
    return {.prompt = prompt, .raw = true, .tokenizer = tokenizer_};
  }
  static void append(AgentManager& manager, TurnTransaction& turn, std::span<const int32_t> tokens) {
    const Growth growth{&turn.cache(), int(tokens.size())};
    manager.reserve({&growth, 1});
    compute(turn.cache(), tokens);
  }
  void answer(AgentManager& manager, const std::string& id, const TurnInput& input) const {
    TurnTransaction turn(manager, manager.wake(id), input);
    append(manager, turn, turn.pending());
    append(manager, turn, ids(5, 9));
    turn.commit({"assistant", "answer"}, true);
  }
  static int64_t held(AgentManager& manager) { return manager.memory_usage().kv_bytes; }

  const std::shared_ptr<const Tokenizer> tokenizer_ = Tokenizer::load(TORPOR_SOURCE_DIR "/.models/smollm2-135m");
};

INSTANTIATE_TEST_SUITE_P(Windows, Aside, ::testing::Values(0, 300, -300));

TEST_P(Aside, RowsTakeNoMemoryWhileTheyAreAsideAndComeBackAsTheyWere) {
  for (const Backend backend : {Backend::kKernels, Backend::kMlx}) {
    for (const bool saved : {false, true}) {
      auto manager = make(0, size_t(64) << 20, backend);
      const std::string id = std::string(saved ? "saved" : "unsaved") + (backend == Backend::kMlx ? "-mlx" : "");
      answer(*manager, id, input(id, 300));  // a prompt that nobody else has begun with
      if (saved) manager->sleep(id);
      TurnTransaction turn(*manager, manager->wake(id), input("sea", 500));
      append(*manager, turn, turn.pending().first(400));
      const std::vector<int32_t> tokens = turn.cache().tokens();
      const int64_t before = held(*manager);
      for (int i = 0; i < 2; ++i) {
        turn.put_aside();
        EXPECT_EQ(held(*manager), 0);
        EXPECT_EQ(turn.cache().length(), 0);
        EXPECT_EQ(manager->memory_usage().agents.front().tokens, int64_t(tokens.size()));
        turn.put_aside();  // they are
        turn.bring_back();
        // MLX's arrays then lack what windows have left behind and segment files have.
        EXPECT_LE(held(*manager), before);
        EXPECT_TRUE(backend == Backend::kMlx || held(*manager) == before);
        EXPECT_EQ(turn.cache().tokens(), tokens);
        expect_sound(turn.cache());
      }
      turn.bring_back();
      append(*manager, turn, turn.pending());
      append(*manager, turn, ids(5, 4));
      expect_sound(turn.cache());
      turn.commit({"assistant", "answer"}, true);
      turn.save(SaveMode::kWait).get();
      expect_sound(*KvCache::restore(store_.load_agent_cache(id).snapshot, Backend::kKernels));
    }
  }
}

TEST_P(Aside, ATurnThatIsTakenBackWhileItsRowsAreAsideLeavesTheAgentAsItWas) {
  auto manager = make();
  answer(*manager, "unsaved", input("lamp", 700));
  answer(*manager, "saved", input("lamp", 300));
  manager->sleep("saved");
  const AgentHold agent = manager->wake("unsaved");
  const std::vector<int32_t> tokens = agent->cache->tokens();
  const uint64_t version = agent->version;
  {
    TurnTransaction turn(*manager, manager->wake("unsaved"), input("sea", 300));
    append(*manager, turn, turn.pending());
    turn.put_aside();
    TurnTransaction other(*manager, manager->wake("saved"), input("sea", 300));
    append(*manager, other, other.pending());
    other.put_aside();
    TurnTransaction fresh(*manager, manager->wake("new"), input("wind", 300));
    append(*manager, fresh, fresh.pending());
    fresh.put_aside();
  }
  EXPECT_EQ(agent->cache->tokens(), tokens);
  EXPECT_EQ(agent->version, version);
  expect_sound(*agent->cache);
  EXPECT_FALSE(manager->is_awake("saved"));
  EXPECT_FALSE(manager->is_awake("new"));
  // The rows of a turn that was cancelled, which the next turn began by cutting.
  {
    TurnTransaction turn(*manager, manager->wake("unsaved"), input("sea", 700));
    append(*manager, turn, turn.pending().first(600));
    turn.commit({"assistant", ""}, false);
  }
  const std::vector<int32_t> longer = agent->cache->tokens();
  {
    TurnTransaction turn(*manager, manager->wake("unsaved"), input("wind", 300));
    append(*manager, turn, turn.pending());
    turn.put_aside();
    EXPECT_EQ(held(*manager), 0);
    turn.bring_back();
    expect_sound(turn.cache());
  }
  EXPECT_EQ(agent->cache->tokens(), longer);
  expect_sound(*agent->cache);
}

TEST_P(Aside, RunsThatAnotherAgentHoldsAreSharedAgain) {
  auto manager = make(6 * run_bytes());
  answer(*manager, "a", input("lamp", 700));
  manager->fork("a", "b", std::nullopt);
  // A saved fork maps what its window has left behind, for its source too.
  manager->wait_for_writes();
  EXPECT_EQ(held(*manager), int64_t(3 * run_bytes() - (GetParam() != 0 ? run_bytes() / 2 : 0)));
  TurnTransaction turn(*manager, manager->wake("a"), input("sea", 100));
  append(*manager, turn, turn.pending());
  const AgentHold other = manager->wake("b");
  const int64_t before = held(*manager);
  turn.put_aside();
  EXPECT_EQ(held(*manager), int64_t(other->cache->nbytes()));
  turn.bring_back();
  EXPECT_EQ(held(*manager), before);
  expect_sound(turn.cache());
}

TEST_P(Aside, StatesWaitWithTheRowsAndAreThereForWhatTheTurnGoesBackTo) {
  if (GetParam() < 0) return;  // a layout has states or rows kept apart
  ManagerOptions of_states = options();
  of_states.state_layout = testing::small_state_layout();
  AgentManager manager(store_, of_states);
  const auto positions = [](const KvCache& cache) {
    std::vector<int64_t> all;
    for (const auto& state : cache.states()) all.push_back(state->position());
    return all;
  };
  answer(manager, "a", input("lamp", 700));
  const AgentHold agent = manager.wake("a");
  const std::vector<int32_t> tokens = agent->cache->tokens();
  for (const bool commits : {false, true}) {
    {
      TurnTransaction turn(manager, manager.wake("a"), input("sea", 500));
      append(manager, turn, turn.pending().first(200));
      turn.cache().keep_state();
      append(manager, turn, turn.pending().first(100));
      const auto before = positions(turn.cache());
      const auto begun = int64_t(tokens.size());
      EXPECT_EQ(before, (std::vector<int64_t>{begun, begun + 200, begun + 300}));
      const int64_t in_memory = held(manager);
      turn.put_aside();
      EXPECT_EQ(held(manager), 0);
      turn.bring_back();
      EXPECT_LE(held(manager), in_memory);
      EXPECT_EQ(positions(turn.cache()), before);
      expect_sound(turn.cache());
      turn.take_back(int(before[1]));
      EXPECT_EQ(turn.cache().length(), before[1]);
      append(manager, turn, turn.pending());
      append(manager, turn, ids(5, 4));
      expect_sound(turn.cache());
      if (commits) {
        turn.commit({"assistant", "answer"}, true);
        turn.save(SaveMode::kWait).get();
      } else {
        turn.put_aside();
      }
    }
    expect_sound(*agent->cache);
    if (!commits) EXPECT_EQ(agent->cache->tokens(), tokens);
  }
  const LoadedAgent saved = store_.load_agent_cache("a");
  EXPECT_EQ(saved.snapshot.tokens, agent->cache->tokens());
  expect_sound(*KvCache::restore(saved.snapshot, Backend::kKernels));
}

TEST_P(Aside, WithoutRoomTheyStayAside) {
  auto manager = make(4 * run_bytes());
  TurnTransaction turn(*manager, manager->wake("a"), input("lamp", 700));
  append(*manager, turn, turn.pending());
  turn.put_aside();
  {
    TurnTransaction other(*manager, manager->wake("b"), input("sea", 700));
    append(*manager, other, other.pending());
    try {
      turn.bring_back();
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_TRUE(is_lack_of_room(error)) << error.what();
    }
    EXPECT_EQ(turn.cache().length(), 0);
  }
  turn.bring_back();
  expect_sound(turn.cache());
}

TEST_P(Aside, OnAFullDiskTheTurnKeepsItsRows) {
  testing::FaultEnv env(directory_.path() / "store", directory_.path() / "attic");
  Store store(directory_.path() / "store", &env);
  AgentManager manager(store, options());
  TurnTransaction turn(manager, manager.wake("a"), input("lamp", 700));
  append(manager, turn, turn.pending());
  int refused = 0;
  for (int k = 1; k < 6; ++k) {
    env.fail_at(k, ENOSPC);
    try {
      turn.put_aside();
      turn.bring_back();
    } catch (const Error&) {
      ++refused;
    }
    env.fail_at(1 << 30, 0);
    expect_sound(turn.cache());
    EXPECT_EQ(turn.cache().length(), int(turn.tokens().size()));
  }
  EXPECT_GE(refused, 2);
}

#if defined(__linux__)
TEST_P(Aside, WhatWasDamagedOnDiskIsNotGivenBack) {
  auto manager = make();
  TurnTransaction turn(*manager, manager->wake("a"), input("lamp", 700));
  append(*manager, turn, turn.pending());
  turn.put_aside();
  int damaged = 0;
  for (const auto& open : fs::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const std::string path = fs::read_symlink(open.path(), gone).string();
    if (!path.starts_with(directory_.path().string()) || !path.ends_with("(deleted)")) continue;
    std::fstream file(open.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(std::streamoff(run_bytes() + 5));
    file.put('\x7e');
    damaged += file.flush() ? 1 : 0;
  }
  ASSERT_EQ(damaged, 1);
  EXPECT_EQ(testing::code_of([&] { turn.bring_back(); }), ErrorCode::kCorruption);
}
#endif

}  // namespace
}  // namespace torpor
