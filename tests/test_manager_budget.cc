// Agents at the edge of the memory budget: what an operation works on is not let go of to make room for it.

#include <algorithm>
#include <functional>
#include <map>

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

/// Bytes of the buffers of every awake agent, each once, found by a walk over all of them.
int64_t walked_bytes(AgentManager& manager) {
  std::map<const void*, size_t> buffers;
  for (const AgentMemory& memory : manager.memory_usage().agents) {
    for (const KvCache::HeldBuffer& buffer : manager.wake(memory.agent)->cache->buffers()) {
      size_t& most = buffers[buffer.data];
      most = std::max(most, buffer.bytes);
    }
  }
  int64_t bytes = 0;
  for (const auto& [data, size] : buffers) bytes += int64_t(size);
  return bytes;
}

/// A save that ends meanwhile lets go of memory, so what is held is looked at again after the walk.
void expect_walked(AgentManager& manager) {
  int64_t held, walked;
  do {
    held = manager.memory_usage().kv_bytes;
    walked = walked_bytes(manager);
  } while (held != manager.memory_usage().kv_bytes);
  EXPECT_EQ(held, walked);
}

/// All agents with their tokens.
using Held = std::map<std::string, std::vector<int32_t>>;

/// `ada` (four runs) and `bob` (three) are awake, and `ada` would be the next to go; `eve` (two runs) is asleep.
struct Operation {
  const char* what;
  const char* worked_on;  ///< awake afterwards, unless it is ""
  std::function<void(AgentManager&, Held&)> run;
};

AgentHold turn(AgentManager& manager, Held& held, const std::string& id) {
  const std::vector<int32_t> more = ids(300, 9);
  AgentHold agent = manager.wake(id);
  const Growth growth{agent->cache.get(), int(more.size())};
  manager.reserve({&growth, 1});
  compute(*agent->cache, more);
  agent->history = agent->cache->tokens();
  agent->changed();
  held[id].insert(held[id].end(), more.begin(), more.end());
  return agent;
}

void take_back(AgentManager& manager, Held& held) {
  const AgentHold ada = turn(manager, held, "ada");
  manager.take_back(*ada, 1000);
  held["ada"].resize(1000);
  ada->history = held["ada"];
}

/// As a turn does that begins earlier than its agent's last token.
void truncate(AgentManager& manager, Held& held) {
  const AgentHold ada = manager.wake("ada");
  manager.truncate(*ada, 300);
  // Fewer where a window has left rows behind that no segment holds.
  held["ada"].resize(size_t(ada->cache->length()));
  ada->history = held["ada"];
}

void begin_alike(AgentManager& manager, Held& held) {
  const AgentHold made = manager.wake("new");
  held["new"] = held["ada"];
  held["new"].resize(size_t(manager.reuse_prefix(*made, std::span(held["ada"]).first(400))));
  made->history = held["new"];
  made->changed();
}

void fork(AgentManager& manager, Held& held, const std::string& id, size_t at) {
  manager.fork(id, "new", int64_t(at));
  held["new"] = held[id];
  held["new"].resize(at);
}

void rewind(AgentManager& manager, Held& held, const std::string& id, size_t to) {
  manager.rewind(id, int64_t(to));
  held[id].resize(to);
}

void rename(AgentManager& manager, Held& held, const std::string& id) {
  manager.rename(id, "new");
  held["new"] = held.extract(id).mapped();
}

void remove(AgentManager& manager, Held& held, const std::string& id) {
  manager.remove(id);
  held.erase(id);
}

const std::vector<Operation> kOperations = {
    {"wake, awake", "ada", [](AgentManager& m, Held&) { m.wake("ada"); }},
    {"wake, asleep", "eve", [](AgentManager& m, Held&) { m.wake("eve"); }},
    {"prefetch, then wake", "eve", [](AgentManager& m, Held&) { m.prefetch("eve"), m.wake("eve"); }},
    {"prefetch, then a turn of another", "ada", [](AgentManager& m, Held& h) { m.prefetch("eve"), turn(m, h, "ada"); }},
    {"prefetch into room that there is", "eve",
     [](AgentManager& m, Held&) { m.sleep("bob"), m.prefetch("eve"), m.wake("bob"), m.wake("eve"); }},
    {"turn, awake", "ada", [](AgentManager& m, Held& h) { turn(m, h, "ada"); }},
    {"turn, asleep", "eve", [](AgentManager& m, Held& h) { turn(m, h, "eve"); }},
    {"turn, new", "new", [](AgentManager& m, Held& h) { turn(m, h, "new"); }},
    {"turn, saved behind", "ada", [](AgentManager& m, Held& h) { m.save_behind(*turn(m, h, "ada")); }},
    {"turn, taken back", "ada", [](AgentManager& m, Held& h) { take_back(m, h); }},
    {"turn, after a cut inside a sealed run", "ada",
     [](AgentManager& m, Held& h) { truncate(m, h), turn(m, h, "ada"); }},
    {"turn, begun with another's rows", "new", [](AgentManager& m, Held& h) { begin_alike(m, h); }},
    {"fork", "ada", [](AgentManager& m, Held& h) { fork(m, h, "ada", 1000); }},
    {"fork inside a sealed run", "ada", [](AgentManager& m, Held& h) { fork(m, h, "ada", 300); }},
    {"fork at the end of a run", "ada", [](AgentManager& m, Held& h) { fork(m, h, "ada", 512); }},
    {"fork, asleep", "", [](AgentManager& m, Held& h) { fork(m, h, "eve", 300); }},
    {"rewind in the open run", "ada", [](AgentManager& m, Held& h) { rewind(m, h, "ada", 900); }},
    {"rewind inside a sealed run", "ada", [](AgentManager& m, Held& h) { rewind(m, h, "ada", 300); }},
    {"rewind to the end of a run", "ada", [](AgentManager& m, Held& h) { rewind(m, h, "ada", 512); }},
    {"rewind, asleep", "", [](AgentManager& m, Held& h) { rewind(m, h, "eve", 300); }},
    {"rename, awake", "new", [](AgentManager& m, Held& h) { rename(m, h, "ada"); }},
    {"rename, asleep", "", [](AgentManager& m, Held& h) { rename(m, h, "eve"); }},
    {"remove, awake", "", [](AgentManager& m, Held& h) { remove(m, h, "ada"); }},
    {"remove, asleep", "", [](AgentManager& m, Held& h) { remove(m, h, "eve"); }},
    {"pin", "ada", [](AgentManager& m, Held&) { m.pin("ada", true), m.wake("eve"), m.pin("ada", false); }},
    {"save", "ada", [](AgentManager& m, Held&) { m.save(*m.wake("ada")); }},
    {"save behind", "ada", [](AgentManager& m, Held&) { m.save_behind(*m.wake("ada")); }},
    {"saves finished", "ada", [](AgentManager& m, Held&) { m.save_behind(*m.wake("ada")), m.wait_for_writes(), m.tell_errors(); }},
    {"sleep", "", [](AgentManager& m, Held&) { m.sleep("ada"); }},
};

void expect_whole(AgentManager& manager, const Held& held) {
  for (const auto& [id, tokens] : held) {
    const AgentHold agent = manager.wake(id);
    EXPECT_EQ(agent->cache->tokens(), tokens) << id;
    expect_sound(*agent->cache);
    EXPECT_LE(manager.memory_usage().kv_bytes, manager.memory_usage().budget) << id;
  }
  expect_walked(manager);
}

/// `saved`: the agents that are awake have woken, else they are new and not on disk.
TEST_P(Budget, NoOperationAtTheEdgeOfTheBudgetLosesAnAgent) {
  const Held begun{{"ada", ids(1000, 1)}, {"bob", ids(600, 2)}, {"eve", ids(500, 3)}};
  for (const auto& [backend, saved] : {std::pair(Backend::kKernels, false), {Backend::kKernels, true},
                                      {Backend::kMlx, false}, {Backend::kMlx, true}}) {
    const auto set_up = [&](Store& store, size_t budget) {
      auto manager = std::make_unique<AgentManager>(store, options(0, size_t(64) << 20, backend));
      for (const auto& [id, tokens] : begun) {
        if (!saved && id != "eve") continue;
        say(*manager, id, tokens);
        manager->sleep(id);
      }
      manager = std::make_unique<AgentManager>(store, options(budget, size_t(64) << 20, backend));
      for (const char* id : {"ada", "bob"}) saved ? manager->wake(id) : say(*manager, id, begun.at(id));
      return manager;
    };
    size_t held_bytes = 0;
    {
      const testing::TemporaryDirectory directory{testing::TemporaryDirectory::in_memory()};
      Store store(directory.path());
      held_bytes = size_t(set_up(store, 0)->memory_usage().kv_bytes);
    }
    for (const size_t budget : {held_bytes, held_bytes + run_bytes()}) {
      for (const Operation& operation : kOperations) {
        SCOPED_TRACE(std::string(operation.what) + (backend == Backend::kMlx ? ", MLX" : "") +
                     (saved ? ", saved" : "") + (budget == held_bytes ? ", held" : ", a run more"));
        const testing::TemporaryDirectory directory{testing::TemporaryDirectory::in_memory()};
        Store store(directory.path());
        Held held = begun;
        auto manager = set_up(store, budget);
        ASSERT_EQ(manager->memory_usage().evictions, 0);
        try {
          operation.run(*manager, held);
        } catch (const Error& error) {
          ADD_FAILURE() << error.what();
          continue;
        }
        EXPECT_LE(manager->memory_usage().kv_bytes, int64_t(budget));
        if (*operation.worked_on != '\0') {
          EXPECT_TRUE(manager->is_awake(operation.worked_on));
        }
        expect_whole(*manager, held);
        EXPECT_NO_THROW(save_all(*manager));
        EXPECT_EQ(store.list_cached_agents().size(), held.size());
      }
    }
  }
}

TEST_P(Budget, ASavedForkTakesNoMemoryWhileItsSourceKeepsTheRows) {
  for (const Backend backend : {Backend::kKernels, Backend::kMlx}) {
    auto manager = make(0, size_t(64) << 20, backend);
    const std::string name = backend == Backend::kMlx ? "dense" : "runs";
    say(*manager, name, ids(1000, 1));
    const int64_t before = manager->memory_usage().kv_bytes;
    AgentHold turn = (manager->fork(name, name + "-fork", std::nullopt), manager->wake(name));
    finish_saves(*manager);
    EXPECT_EQ(manager->memory_usage().kv_bytes, before) << "the source is in its turn";
    turn.release();
    manager->wake(name + "-fork").release();
    // Runs go for all that share them; arrays stay for as long as two share them.
    const bool released = GetParam() != 0 && backend == Backend::kKernels;
    EXPECT_EQ(manager->memory_usage().kv_bytes < before, released);
    EXPECT_LE(manager->memory_usage().kv_bytes, before);
    expect_walked(*manager);
    expect_sound(*manager->wake(name)->cache);
    expect_sound(*manager->wake(name + "-fork")->cache);
  }
}

TEST_P(Budget, TheLedgerIsWhatAWalkOverAllBuffersFinds) {
  for (const Backend backend : {Backend::kKernels, Backend::kMlx}) {
    const size_t budget = 16 * run_bytes();
    auto manager = make(budget, size_t(64) << 20, backend);
    std::mt19937 random(3);
    std::map<std::string, std::vector<int32_t>> expected;
    int cuts = 0;
    for (int i = 0; i < 400; ++i) {
      const std::string id = std::string(backend == Backend::kMlx ? "dense" : "runs") + std::to_string(random() % 8);
      std::vector<int32_t>& tokens = expected[id];
      try {
        switch (random() % 8) {
          case 0: {
            const std::string other = id + "-" + std::to_string(i);
            const int at = int(random() % (tokens.size() + 1));
            if (tokens.empty()) break;
            manager->fork(id, other, at);
            manager->remove(id);
            manager->rename(other, id);
            tokens.resize(size_t(at));
            ++cuts;
            break;
          }
          case 1: {
            if (tokens.empty()) break;
            const int at = int(random() % (tokens.size() + 1));
            manager->rewind(id, at);
            tokens.resize(size_t(at));
            ++cuts;
            break;
          }
          case 2: manager->sleep(id); break;
          case 3: save_all(*manager); break;
          default: {
            const std::vector<int32_t> more = ids(1 + int(random() % 300), random());
            if (tokens.size() + more.size() > 1500) break;
            AgentHold agent = say(*manager, id, more);
            tokens.insert(tokens.end(), more.begin(), more.end());
            ASSERT_EQ(agent->cache->tokens(), tokens);
            expect_sound(*agent->cache);
            random() % 2 == 0 ? manager->save_behind(*agent) : void(manager->save(*agent));
          }
        }
      } catch (const Error& error) {
        ADD_FAILURE() << i << ": " << error.what();
        return;
      }
      expect_walked(*manager);
      ASSERT_FALSE(HasFailure()) << i;
      ASSERT_LE(manager->memory_usage().kv_bytes, int64_t(budget)) << i;
    }
    EXPECT_GT(manager->memory_usage().evictions, 10);
    EXPECT_GT(cuts, 40);
    for (auto& [id, tokens] : expected) {
      if (tokens.empty()) continue;
      EXPECT_EQ(manager->wake(id)->cache->tokens(), tokens);
      expect_sound(*manager->wake(id)->cache);
    }
  }
}

TEST_P(Budget, ReservedRowsTakeNoMemoryWhenTheyAreComputed) {
  for (const Backend backend : {Backend::kKernels, Backend::kMlx}) {
    auto manager = make(100 * run_bytes(), size_t(64) << 20, backend);
    const std::string name = backend == Backend::kMlx ? "dense" : "runs";
    say(*manager, name, ids(400, 1));
    manager->fork(name, name + "-fork", std::nullopt);
    AgentHold one = manager->wake(name), two = manager->wake(name + "-fork"), three = manager->wake(name + "-new");
    const std::vector<Growth> growths = {{one->cache.get(), 500}, {two->cache.get(), 1}, {three->cache.get(), 300}};
    manager->reserve(growths);
    const int64_t reserved = manager->memory_usage().kv_bytes;
    EXPECT_EQ(reserved, int64_t((backend == Backend::kMlx ? 4 + 2 + 2 : 1 + 3 + 1 + 2) * run_bytes()));
    for (const Growth& growth : growths) compute(*growth.cache, ids(growth.rows, 2));
    EXPECT_EQ(manager->memory_usage().kv_bytes, reserved);
    for (const Growth& growth : growths) expect_sound(*growth.cache);
  }
}

TEST_P(Budget, WhatDoesNotFitIsRefusedBeforeAnythingIsTaken) {
  auto manager = make(5 * run_bytes());
  const AgentHold one = say(*manager, "one", ids(400, 1)), two = say(*manager, "two", ids(400, 2));
  const std::vector<Growth> growths = {{one->cache.get(), 200}, {two->cache.get(), 200}};
  EXPECT_EQ(testing::code_of([&] { manager->reserve(growths); }), ErrorCode::kResourceExhausted);
  EXPECT_EQ(manager->memory_usage().kv_bytes, int64_t(4 * run_bytes()));
  EXPECT_NO_THROW(manager->reserve({growths.data(), 1}));
}

TEST_P(Budget, RowsOfAnAgentInItsTurnStayWhereTheyAreWhileItsLastSaveEnds) {
  if (GetParam() == 0) return;
  for (const Backend backend : {Backend::kKernels, Backend::kMlx}) {
    auto manager = make(12 * run_bytes(), size_t(64) << 20, backend);
    const std::string name = backend == Backend::kMlx ? "dense" : "runs";
    say(*manager, name + "-other", ids(1000, 1));
    AgentHold agent = say(*manager, name, ids(2000, 2));
    manager->save_behind(*agent);
    const auto before = agent->cache->buffers();
    manager->save(*manager->wake(name + "-other"));  // takes in the outcome of the save behind
    const Growth growth{agent->cache.get(), 500};
    manager->reserve({&growth, 1});
    EXPECT_FALSE(manager->is_awake(name + "-other"));
    ASSERT_FALSE(agent->dirty());
    const auto after = agent->cache->buffers();
    for (size_t i = 0; i < before.size(); ++i) EXPECT_GE(after[i].bytes, before[i].bytes);
    compute(*agent->cache, ids(500, 3));
    expect_sound(*agent->cache);
    const int64_t held = manager->memory_usage().kv_bytes;
    agent.release();
    EXPECT_LT(manager->memory_usage().kv_bytes, held);
    expect_sound(*manager->wake(name)->cache);
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
