// What comes late: outcomes of saves whose agents are gone, agents loaded ahead that nobody wakes, and an id that another
// process takes between the look and the lock.

#include <thread>

#include <gtest/gtest.h>

#include "fault_env.h"
#include "manager_fixture.h"

namespace torpor {
namespace {

using Late = Manager;

INSTANTIATE_TEST_SUITE_P(Windows, Late, ::testing::Values(0, 300));

AgentHold nameless_prompt(AgentManager& manager, std::span<const int32_t> tokens) {
  AgentHold agent = manager.stateless();
  compute(*agent->cache, tokens);
  agent->changed();
  return agent;
}

TEST_P(Late, TheSaveOfANamelessPromptSaysNothingAboutTheNext) {
  auto manager = make();
  {
    const AgentHold first = nameless_prompt(*manager, ids(2000, 1));
    manager->save_behind(*first);
  }
  const std::vector<int32_t> other = ids(2000, 2);
  const AgentHold second = nameless_prompt(*manager, other);
  finish_saves(*manager);
  EXPECT_TRUE(second->dirty());
  EXPECT_TRUE(second->segments.empty());
  expect_sound(*second->cache);
  EXPECT_EQ(manager->save(*second).segments_written, 7);
  EXPECT_EQ(store_.find_prefix(testing::test_identity(), {}, layout(), other), 1792);
}

TEST_P(Late, ASaveThatEndsBeforeItIsAwaitedTellsHowItEndedAllTheSame) {
  testing::FaultEnv env(directory_.path() / "faulty", directory_.path() / "attic");
  Store store(directory_.path() / "faulty", &env);
  Writer writer(store, Durability::kRename, size_t(64) << 20);
  const auto submit = [&](uint64_t ticket) {
    writer.submit({.agent = "a", .ticket = ticket, .snapshot = testing::make_snapshot(300, layout())});
    writer.wait(ticket);
  };
  submit(1);
  EXPECT_EQ(writer.await(1).get().segments_written, 1);
  EXPECT_TRUE(writer.collect().at(0).awaited);
  env.fail_at(1, ENOSPC, true);
  submit(2);
  EXPECT_EQ(testing::code_of([&] { writer.await(2).get(); }), ErrorCode::kIo);
  EXPECT_TRUE(writer.collect().at(0).awaited) << "or it would be told once more";
  EXPECT_EQ(writer.await(2).get().segments_written, 0);
}

TEST_P(Late, ErrorsOfSavesWhoseAgentsAreGoneAreToldOnceByFinishSaves) {
  testing::FaultEnv env(directory_.path() / "faulty", directory_.path() / "attic");
  Store store(directory_.path() / "faulty", &env);
  AgentManager manager(store, {.model_name = "m", .identity = testing::test_identity(), .layout = layout()});
  for (const char* id : {"a", "b"}) say(manager, id, ids(10, 1));
  env.fail_at(1, ENOSPC, true);
  manager.save_behind(*nameless_prompt(manager, ids(600, 1)));
  const AgentHold second = nameless_prompt(manager, ids(600, 2));
  EXPECT_EQ(testing::code_of([&] { finish_saves(manager); }), ErrorCode::kIo);
  EXPECT_FALSE(second->save_error.has_value());
  EXPECT_NO_THROW(finish_saves(manager));
  manager.save_behind(*manager.wake("a"));
  manager.drop("a");
  EXPECT_EQ(testing::code_of([&] { finish_saves(manager); }), ErrorCode::kIo);
  // What was to be removed anyway has no error to tell.
  manager.save_behind(*manager.wake("b"));
  for (int i = 0; i < 10000 && !manager.wake("b")->save_error; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  ASSERT_TRUE(manager.wake("b")->save_error.has_value());
  env.fail_at(0, 0);
  manager.remove("b");
  EXPECT_NO_THROW(finish_saves(manager));
}

TEST_P(Late, AwakeAgentsAndFailedLoadsKeepNoSlot) {
  auto manager = make();
  for (const char* id : {"a", "b", "c", "d", "asleep"}) say(*manager, id, ids(300, unsigned(id[0])));
  manager->sleep("asleep");
  for (const char* id : {"a", "b", "c", "d"}) EXPECT_FALSE(manager->prefetch(id));
  save_all(*manager);
  // Elsewhere they are awake, so their loads fail; no slot is lost to that.
  auto elsewhere = make();
  for (const char* id : {"a", "b", "c", "d"}) {
    manager->drop(id);
    elsewhere->wake(id);
  }
  for (const char* id : {"a", "b", "c", "d"}) EXPECT_TRUE(manager->prefetch(id));
  bool begun = false;
  for (int i = 0; i < 10000 && !begun; ++i) {
    begun = manager->prefetch("asleep");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(begun);
  EXPECT_EQ(manager->wake("asleep")->cache->length(), 300);
}

TEST_P(Late, APrefetchedAgentThatNobodyWakesIsLetGo) {
  ManagerOptions options{.model_name = "m", .identity = testing::test_identity(), .layout = layout()};
  options.prefetch = {.slots = 1, .patience = std::chrono::milliseconds(0)};
  AgentManager manager(store_, options);
  for (const char* id : {"a", "b"}) {
    say(manager, id, ids(300, unsigned(id[0])));
    manager.sleep(id);
  }
  EXPECT_TRUE(manager.prefetch("a"));
  bool begun = false;
  for (int i = 0; i < 10000 && !begun; ++i) {
    begun = manager.prefetch("b");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(begun);
  EXPECT_NO_THROW(store_.lock_agent("a"));
  bool free = false;
  for (int i = 0; i < 10000 && !free; ++i) {
    finish_saves(manager);
    free = !testing::code_of([&] { (void)store_.lock_agent("b"); });
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(free);
}

TEST_P(Late, WhatWasPrefetchedCountsAndGoesWhenNobodyElseCan) {
  auto manager = make(8 * run_bytes());
  say(*manager, "a", ids(1000, 1));
  manager->sleep("a");
  EXPECT_TRUE(manager->prefetch("a"));
  int64_t held = 0;
  for (int i = 0; i < 10000 && held == 0; ++i) {
    held = manager->memory_usage().kv_bytes;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_GT(held, 0);
  const AgentHold big = say(*manager, "big", ids(2000, 2));
  EXPECT_EQ(manager->memory_usage().kv_bytes, int64_t(8 * run_bytes()));
  EXPECT_NO_THROW(store_.lock_agent("a"));
}

TEST_P(Late, WhatWasPrefetchedCountsWithItsState) {
  ManagerOptions of_states = options();
  of_states.state_layout = {{{"layer_2_recurrent", KvDtype::kF32, {100, 100}}}};
  AgentManager manager(store_, of_states);
  say(manager, "a", ids(300, 1));
  manager.sleep("a");
  EXPECT_TRUE(manager.prefetch("a"));
  int64_t held = 0;
  for (int i = 0; i < 10000 && held == 0; ++i) {
    held = manager.memory_usage().kv_bytes;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const AgentHold agent = manager.wake("a");
  EXPECT_EQ(held, manager.memory_usage().kv_bytes);
  EXPECT_GT(held, int64_t(of_states.state_layout.bytes()));
  expect_sound(*agent->cache);
}

TEST_P(Late, APrefetchTakesFreeRoomAlone) {
  auto manager = make(8 * run_bytes());
  say(*manager, "a", ids(1000, 1));
  manager->sleep("a");
  const AgentHold big = say(*manager, "big", ids(1500, 2));  // leaves two runs free
  ASSERT_EQ(manager->memory_usage().kv_bytes, int64_t(6 * run_bytes()));
  EXPECT_TRUE(manager->prefetch("a"));
  bool given_up = false;  // then it can be begun again
  for (int i = 0; i < 10000 && !given_up; ++i) {
    ASSERT_LE(manager->memory_usage().kv_bytes, int64_t(8 * run_bytes()));
    given_up = manager->prefetch("a");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_TRUE(given_up);
  EXPECT_TRUE(manager->is_awake("big"));
}

// Makes an agent the moment somebody opens its lock file.
class IntrudingEnv : public testing::FaultEnv {
 public:
  using FaultEnv::FaultEnv;
  std::function<void()> intrude;
  int raw_open(const char* path, OpenMode mode) override {
    if (intrude && std::string(path).ends_with("eve.lock")) std::exchange(intrude, nullptr)();
    return FaultEnv::raw_open(path, mode);
  }
};

TEST_P(Late, AForkDoesNotReplaceAnAgentThatCameIntoBeingMeanwhile) {
  IntrudingEnv env(directory_.path() / "shared", directory_.path() / "attic");
  Store store(directory_.path() / "shared", &env);
  AgentManager manager(store, {.model_name = "m", .identity = testing::test_identity(), .layout = layout()});
  say(manager, "a", ids(600, 1));
  env.intrude = [&] {
    Store other(directory_.path() / "shared");
    AgentManager elsewhere(other, {.model_name = "m", .identity = testing::test_identity(), .layout = layout()});
    say(elsewhere, "eve", ids(40, 2));
    elsewhere.sleep("eve");
  };
  EXPECT_EQ(testing::code_of([&] { manager.fork("a", "eve", std::nullopt); }), ErrorCode::kInvalidArgument);
  save_all(manager);
  EXPECT_FALSE(manager.is_awake("eve"));
  EXPECT_EQ(manager.wake("eve")->cache->tokens(), ids(40, 2));
}

// Refuses to open one segment.
class MissingSegmentEnv : public testing::FaultEnv {
 public:
  using FaultEnv::FaultEnv;
  std::string refused;
  int raw_open(const char* path, OpenMode mode) override {
    if (!refused.empty() && std::string_view(path).find(refused) != std::string_view::npos) return -EIO;
    return FaultEnv::raw_open(path, mode);
  }
};

TEST_P(Late, AChangeOnDiskStandsWhereTheAgentCanNotBeWokenAgain) {
  MissingSegmentEnv env(directory_.path() / "faulty", directory_.path() / "attic");
  Store store(directory_.path() / "faulty", &env);
  // In the memory of four runs there is no room for the copy of a sealed run, so the rewind is made on disk.
  AgentManager manager(store, {.model_name = "m", .identity = testing::test_identity(), .layout = layout(),
                               .memory_budget = 4 * run_bytes()});
  const std::vector<int32_t> begun = ids(1000, 1);
  manager.save(*say(manager, "a", begun));
  env.refused = manager.wake("a")->segments[0];
  EXPECT_NO_THROW(manager.rename("a", "b"));
  EXPECT_FALSE(manager.is_awake("a") || manager.is_awake("b"));
  EXPECT_FALSE(store.contains("a"));

  env.refused.clear();
  EXPECT_EQ(manager.wake("b")->cache->tokens(), begun);
  env.refused = manager.wake("b")->segments[0];
  EXPECT_NO_THROW(manager.rewind("b", 300));
  EXPECT_FALSE(manager.is_awake("b"));
  EXPECT_EQ(store.agent_info("b").cache_size, 300);

  env.refused.clear();
  EXPECT_EQ(manager.wake("b")->cache->tokens(), std::vector<int32_t>(begun.begin(), begun.begin() + 300));
  expect_sound(*manager.wake("b")->cache);
}

}  // namespace
}  // namespace torpor
