// Agents at the edge of the memory budget: what an operation works on is not let go of to make room for it.

#include <gtest/gtest.h>

#include "fault_env.h"
#include "manager_fixture.h"

namespace torpor {
namespace {

/// Budgets at the edge: what is held, and one run more.
class Budget : public Manager {
 protected:
  std::vector<size_t> edges(size_t runs) const { return {runs * run_bytes(), (runs + 1) * run_bytes()}; }
  static std::vector<int32_t> first(const std::vector<int32_t>& tokens, int n) { return {tokens.begin(), tokens.begin() + n}; }
};

INSTANTIATE_TEST_SUITE_P(Windows, Budget, ::testing::Values(0, 300));

TEST_P(Budget, ForkingInsideASealedRunKeepsTheSource) {
  const std::vector<int32_t> begun = ids(1000, 1);
  int round = 0;
  for (const size_t budget : edges(4)) {
    auto manager = make(budget);
    const std::string base = "base" + std::to_string(round), eve = "eve" + std::to_string(round++);
    manager->save(*say(*manager, base, begun));
    manager->fork(base, eve, 300);
    EXPECT_TRUE(manager->is_awake(base));
    expect_sound(*manager->wake(base)->cache);
    EXPECT_EQ(manager->wake(base)->cache->tokens(), begun);
    EXPECT_EQ(manager->wake(eve)->cache->tokens(), first(begun, 300));
    expect_sound(*manager->wake(eve)->cache);
    EXPECT_LE(manager->memory_usage().kv_bytes, int64_t(budget));
  }
}

TEST_P(Budget, RewindingInsideASealedRunDoesNotEvictTheAgentItself) {
  const std::vector<int32_t> begun = ids(1000, 1);
  int round = 0;
  for (const size_t budget : edges(4)) {
    auto manager = make(budget);
    const std::string id = "a" + std::to_string(round++);
    say(*manager, id, begun);
    manager->rewind(id, 300);
    EXPECT_EQ(manager->wake(id)->cache->tokens(), first(begun, 300));
    expect_sound(*manager->wake(id)->cache);
    say(*manager, id, ids(200, 2));
    expect_sound(*manager->wake(id)->cache);
  }
}

TEST_P(Budget, ANewAgentStartsFromOneThatWouldBeTheNextToGo) {
  const std::vector<int32_t> known = ids(1000, 1);
  for (const size_t budget : edges(8)) {
    auto manager = make(budget);
    say(*manager, "older", known);
    say(*manager, "newer", ids(1000, 2));
    AgentHold third = manager->wake("third");
    std::vector<int32_t> wanted = first(known, 300);
    wanted.push_back(7);
    EXPECT_GE(manager->reuse_prefix(*third, wanted), 256);
    EXPECT_EQ(third->cache->tokens(), first(known, third->cache->length()));
    expect_sound(*third->cache);
    third.release();
    for (const char* id : {"older", "newer", "third"}) manager->drop(id);
  }
}

TEST_P(Budget, WhenThePrefixOnDiskIsGoneTheOneInMemoryStillServes) {
  const std::vector<int32_t> known = ids(1000, 1);
  for (const size_t budget : edges(2)) {
    testing::fs::remove_all(directory_.path() / "store");
    Store fresh(directory_.path() / "store");
    auto manager = make(budget);
    {
      // The disk has more of it than memory, but is damaged in its first segment.
      auto other = make();
      other->save(*say(*other, "long", known));
      const std::vector<std::string> segments = other->wake("long")->segments;
      other.reset();
      const auto path = directory_.path() / "store/segments" / segments[0].substr(0, 2) / (segments[0] + ".safetensors");
      std::string bytes = testing::read_all(path);
      bytes[bytes.size() - 100] ^= 1;
      testing::write_all(path, bytes);
    }
    say(*manager, "short", first(known, 400));
    AgentHold third = manager->wake("third");
    EXPECT_GE(manager->reuse_prefix(*third, known), 256);
    EXPECT_EQ(third->cache->tokens(), first(known, third->cache->length()));
    expect_sound(*third->cache);
    third.release();
    EXPECT_TRUE(manager->is_awake("short"));
    for (const char* id : {"short", "third"}) manager->drop(id);
  }
}

TEST_P(Budget, WhatSomebodyHoldsIsBusyForEverybodyElse) {
  auto manager = make();
  AgentHold hold = say(*manager, "a", ids(300, 1));
  for (const auto& call : std::vector<std::function<void()>>{
           [&] { manager->sleep("a"); }, [&] { manager->drop("a"); }, [&] { manager->rename("a", "b"); },
           [&] { manager->remove("a"); }, [&] { manager->fork("a", "b", std::nullopt); }, [&] { manager->rewind("a", 1); },
           [&] { manager->pin("a", true); }}) {
    EXPECT_EQ(testing::code_of(call), ErrorCode::kBusy);
  }
  EXPECT_TRUE(manager->is_awake("a"));
  AgentHold second = hold.share();
  hold.release();
  EXPECT_EQ(testing::code_of([&] { manager->sleep("a"); }), ErrorCode::kBusy);
  second = {};
  EXPECT_NO_THROW(manager->sleep("a"));
}

}  // namespace
}  // namespace torpor
