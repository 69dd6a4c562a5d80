// Many agents in bounded memory, without a model.

#include <condition_variable>
#include <mutex>

#include <gtest/gtest.h>
#include <mlx/memory.h>
#include <mlx/mlx.h>

#include "fault_env.h"
#include "counting_env.h"
#include "manager_fixture.h"
#include "torpor/agents.h"

namespace torpor {
namespace {

using testing::TemporaryDirectory;

TEST_P(Manager, RowsThatRottedUnderAMappingAreComputedAgain) {
  const std::vector<int32_t> known = ids(1500, 1);
  {
    auto manager = make();
    manager->save(*say(*manager, "ada", known));
  }
  testing::CountingEnv env;
  Store store(directory_.path() / "store", &env);
  AgentManager manager(store, {.model_name = "m", .identity = testing::test_identity(), .layout = layout(),
                               .backend = Backend::kKernels, .durability = Durability::kRename});
  const std::string name = manager.wake("ada")->segments[4];
  manager.fork("ada", "eve", std::nullopt);
  finish_saves(manager);
  ASSERT_GT(manager.memory_usage().mapped_bytes, 0);
  {
    std::fstream file(directory_.path() / "store/segments" / name.substr(0, 2) / (name + ".safetensors"), std::ios::in | std::ios::out);
    file.seekp(-2000, std::ios::end);  // before the token list
    file.put(file.peek() ^ 1);
  }
  EXPECT_FALSE(manager.wake("ada")->damage) << "its pages never left";
  env.in_memory = false;
  {
    AgentHold ada = manager.wake("ada");
    ASSERT_TRUE(ada->damage);
    EXPECT_NE(ada->damage->find(name), std::string::npos);
    EXPECT_EQ(ada->cache->length(), 4 * kSegmentTokens);
    EXPECT_EQ(ada->history, known);
    compute(*ada->cache, std::span(known).subspan(4 * kSegmentTokens));
    expect_sound(*ada->cache);
    manager.save(*ada);
  }
  EXPECT_TRUE(store.verify("ada")[0].problems.empty()) << "the segment was written again";
  // Who shares the damaged run finds it, though its pages are back; nobody new starts from it.
  env.in_memory = true;
  {
    AgentHold bob = manager.wake("bob");
    manager.drop("ada");
    manager.reuse_prefix(*bob, known);
    expect_sound(*bob->cache);
  }
  EXPECT_TRUE(manager.wake("eve")->damage);
  expect_sound(*manager.wake("eve")->cache);
}

TEST_P(Manager, RowsAreReadWhereTheyAreNotToBeMapped) {
  const std::vector<int32_t> known = ids(1500, 1);
  {
    auto manager = make();
    manager->save(*say(*manager, "ada", known));
  }
  AgentManager manager(store_, {.model_name = "m", .identity = testing::test_identity(), .layout = layout(),
                                .backend = Backend::kKernels, .durability = Durability::kRename, .map_rows = false});
  AgentHold ada = manager.wake("ada"), bob = manager.wake("bob");
  EXPECT_EQ(manager.reuse_prefix(*bob, known), 1499);
  expect_sound(*ada->cache);
  compute(*ada->cache, ids(300, 2));
  ada->history = ada->cache->tokens();
  ada->changed();
  EXPECT_EQ(manager.save(*ada).segments_written, 2);
  EXPECT_EQ(manager.memory_usage().mapped_bytes, 0);
  // All rows are there, those behind a window too.
  manager.truncate(*ada, 400);
  EXPECT_EQ(ada->cache->length(), 400);
  expect_sound(*ada->cache);
}

INSTANTIATE_TEST_SUITE_P(Windows, Manager, ::testing::Values(0, 300));

TEST_P(Manager, TenAgentsInTheMemoryOfThreeAreAsTheyWouldBeAlone) {
  const size_t budget = 3 * 9 * run_bytes();  // each grows to at most nine runs
  auto manager = make(budget);
  std::mt19937 random(1);
  std::map<std::string, std::vector<int32_t>> expected;
  for (int turn = 0; turn < 200; ++turn) {
    const std::string id = "agent" + std::to_string(random() % 10);
    const std::vector<int32_t> more = ids(1 + int(random() % 200), random());
    const bool was_awake = manager->is_awake(id);
    AgentHold agent = say(*manager, id, more);
    std::vector<int32_t>& all = expected[id];
    if (!was_awake && !all.empty()) {
      EXPECT_EQ(agent->cache->length(), int(all.size() + more.size()));
    }
    all.insert(all.end(), more.begin(), more.end());
    EXPECT_EQ(agent->cache->tokens(), all);
    expect_sound(*agent->cache);
    ASSERT_LE(manager->memory_usage().kv_bytes, int64_t(budget));
    turn % 3 == 0 ? void(manager->save(*agent)) : manager->save_behind(*agent);
    ASSERT_LE(manager->memory_usage().kv_bytes, int64_t(budget));
  }
  save_all(*manager);
  manager.reset();
  manager = make();
  for (const auto& [id, tokens] : expected) {
    EXPECT_EQ(manager->wake(id)->cache->tokens(), tokens);
    expect_sound(*manager->wake(id)->cache);
  }
  for (const VerifyReport& report : store_.verify()) EXPECT_TRUE(report.problems.empty()) << report.problems[0];
}

TEST_P(Manager, WhenNothingCanGoTheErrorSaysWhatHoldsTheMemory) {
  auto manager = make(3 * run_bytes());
  say(*manager, "kept", ids(300, 1));
  manager->pin("kept", true);
  say(*manager, "small", ids(10, 2));
  try {
    say(*manager, "big", ids(600, 3));
    FAIL() << "the budget was exceeded";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kResourceExhausted);
    EXPECT_NE(std::string(error.what()).find("'kept' holds " + std::to_string(2 * run_bytes()) + " (pinned)"), std::string::npos)
        << error.what();
  }
  // Nobody was harmed; what had to go is on disk.
  EXPECT_FALSE(manager->is_awake("small"));
  EXPECT_TRUE(store_.contains("small"));
  manager->drop("big");
  manager->pin("kept", false);
  say(*manager, "big", ids(600, 3));
  EXPECT_FALSE(manager->is_awake("kept"));
  EXPECT_EQ(manager->wake("big")->cache->length(), 600);
}

TEST_P(Manager, ACleanAgentGoesWithoutAWriteAndTheLeastRecentlyUsedFirst) {
  auto manager = make(4 * run_bytes());
  for (const char* id : {"a", "b", "c", "d"}) manager->save(*say(*manager, id, ids(100, unsigned(id[0]))));
  manager->wake("a");
  const auto before = store_.agent_info("b").hash;
  say(*manager, "e", ids(100, 9));
  EXPECT_TRUE(manager->is_awake("a"));
  EXPECT_FALSE(manager->is_awake("b"));
  EXPECT_EQ(store_.agent_info("b").hash, before);
}

TEST_P(Manager, AnAgentThatCannotBeSavedIsNotGivenUp) {
  testing::FaultEnv env(directory_.path() / "faulty", directory_.path() / "attic");
  Store store(directory_.path() / "faulty", &env);
  AgentManager manager(store, {.model_name = "m", .identity = testing::test_identity(), .layout = layout(),
                               .memory_budget = 2 * run_bytes()});
  say(manager, "a", ids(256, 1));
  say(manager, "b", ids(256, 2));
  manager.wake("c");
  env.fail_at(1, ENOSPC, true);
  try {
    say(manager, "c", ids(10, 3));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kResourceExhausted);
    EXPECT_NE(std::string(error.what()).find("No space"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(manager.is_awake("a") && manager.is_awake("b"));
  manager.drop("c");
  // A save behind a turn that fails is said at the next occasion, and tried again.
  manager.save_behind(*manager.wake("a"));
  EXPECT_THROW(finish_saves(manager), Error);
  EXPECT_NO_THROW(finish_saves(manager));
  EXPECT_TRUE(manager.wake("a")->dirty());
  manager.save_behind(*manager.wake("a"));
  EXPECT_THROW(manager.save(*manager.wake("a")), Error);
  env.fail_at(0, 0);
  EXPECT_GT(manager.save(*manager.wake("a")).bytes_written, 0);
  EXPECT_FALSE(manager.wake("a")->dirty());
}

TEST_P(Manager, AForkCopiesNothingAndBothGoTheirOwnWay) {
  auto manager = make();
  const std::vector<int32_t> begun = ids(700, 1);
  manager->save(*say(*manager, "a", begun));
  const int64_t before = manager->memory_usage().kv_bytes;
  manager->fork("a", "b", std::nullopt);
  EXPECT_EQ(manager->memory_usage().kv_bytes, before);  // the open run too is shared until one of them writes
  EXPECT_EQ(manager->memory_usage().agents[1].shared_bytes, manager->memory_usage().agents[1].bytes);
  const SaveResult saved = manager->save(*manager->wake("b"));
  EXPECT_EQ(saved.segments_written, 0);

  say(*manager, "a", ids(100, 2));
  say(*manager, "b", ids(90, 3));
  for (const auto& [id, seed, n] : {std::tuple{"a", 2, 100}, {"b", 3, 90}}) {
    std::vector<int32_t> all = begun;
    const std::vector<int32_t> more = ids(n, unsigned(seed));
    all.insert(all.end(), more.begin(), more.end());
    EXPECT_EQ(manager->wake(id)->cache->tokens(), all);
    expect_sound(*manager->wake(id)->cache);
    manager->sleep(id);
    EXPECT_EQ(manager->wake(id)->cache->tokens(), all);
    expect_sound(*manager->wake(id)->cache);
  }
  EXPECT_THROW(manager->fork("a", "b", std::nullopt), Error);
  EXPECT_THROW(manager->fork("a", "c", 801), Error);
  EXPECT_THROW(manager->fork("nobody", "c", std::nullopt), Error);
}

TEST_P(Manager, RewindAndForkAtAnyTokenAwakeOrAsleep) {
  const std::vector<int32_t> begun = ids(1300, 1);
  for (const bool awake : {true, false}) {
    for (const int n : {0, 1, 255, 256, 257, 512, 700, 1023, 1024, 1025, 1299, 1300}) {
      auto manager = make();
      const std::string id = std::to_string(n) + (awake ? "-awake" : "-asleep");
      manager->save(*say(*manager, id, begun));
      if (!awake) manager->sleep(id);
      const std::vector<int32_t> prefix(begun.begin(), begun.begin() + n);
      manager->fork(id, id + "-fork", n);
      manager->rewind(id, n);
      EXPECT_EQ(manager->is_awake(id), awake);
      for (const std::string& name : {id, id + "-fork"}) {
        AgentHold agent = manager->wake(name);
        EXPECT_EQ(agent->cache->tokens(), prefix) << name;
        EXPECT_EQ(agent->history, prefix);
        EXPECT_EQ(agent->messages.size(), n == 1300 ? 1u : 0u);  // the cut went through the only message
        expect_sound(*agent->cache);
        say(*manager, name, ids(300, 5));
        expect_sound(*agent->cache);
        agent.release();
        manager->sleep(name);
        expect_sound(*manager->wake(name)->cache);
        EXPECT_EQ(manager->wake(name)->cache->length(), n + 300);
        manager->remove(name);
        EXPECT_FALSE(store_.contains(name));
      }
    }
  }
}

TEST_P(Manager, ANewAgentStartsFromTheLongestPrefixAnyoneHas) {
  const std::vector<int32_t> known = ids(700, 1);
  auto manager = make();
  manager->save(*say(*manager, "asleep", known));
  manager->sleep("asleep");

  // From disk, to the segment.
  std::vector<int32_t> wanted(known.begin(), known.begin() + 650);
  wanted.push_back(-1 & 0x7FFF);
  AgentHold first = manager->wake("first");
  EXPECT_EQ(manager->reuse_prefix(*first, wanted), 512);
  EXPECT_EQ(first->cache->tokens(), std::vector<int32_t>(known.begin(), known.begin() + 512));
  expect_sound(*first->cache);
  compute(*first->cache, std::span(wanted).subspan(512));
  first->changed();
  EXPECT_EQ(manager->save(*first).segments_written, 0);

  // From memory, to the token; one is left to compute.
  AgentHold second = manager->wake("second");
  EXPECT_EQ(manager->reuse_prefix(*second, wanted), 650);
  expect_sound(*second->cache);
  AgentHold third = manager->wake("third");
  std::vector<int32_t> early = ids(1, 77);
  early.insert(early.end(), wanted.begin(), wanted.end());
  EXPECT_EQ(manager->reuse_prefix(*third, early), 0);

  // What nobody's name is on serves too.
  AgentHold nameless = manager->stateless();
  const std::vector<int32_t> other = ids(600, 8);
  compute(*nameless->cache, other);
  nameless->changed();
  manager->save(*nameless);
  nameless.release();
  EXPECT_EQ(store_.list_cached_agents().size(), 2u);
  EXPECT_EQ(manager->reuse_prefix(*third, other), 512);
  expect_sound(*third->cache);
}

TEST_P(Manager, AgentsThatWokeWithTheSameBeginningHoldItOnce) {
  const std::vector<int32_t> begun = ids(1024, 1);
  auto manager = make();
  manager->save(*say(*manager, "a", begun));
  manager->fork("a", "b", std::nullopt);
  save_all(*manager);
  manager.reset();
  manager = make();
  manager->wake("a");
  const int64_t one = manager->memory_usage().kv_bytes;
  EXPECT_EQ(manager->wake("b")->bytes_read > 0, true);
  EXPECT_EQ(manager->memory_usage().kv_bytes, one);
}

TEST_P(Manager, MemoryIsWhatMlxCounts) {
  auto manager = make();
  const auto active = [] { return int64_t(mx::get_active_memory()); };
  const int64_t before = active();
  for (const char* id : {"a", "b"}) say(*manager, id, ids(3000, unsigned(id[0])));
  const MemoryUsage usage = manager->memory_usage();
  EXPECT_EQ(usage.mapped_bytes, 0);
  EXPECT_NEAR(double(usage.kv_bytes), double(active() - before), 0.02 * double(usage.kv_bytes));
  manager->sleep("a");
  manager->sleep("b");
  EXPECT_NEAR(double(active()), double(before), 4096);
}

TEST_P(Manager, WhatAWindowHasLeftBehindIsLetGoOnceItIsOnDisk) {
  if (GetParam() == 0) return;
  auto manager = make();
  AgentHold agent = say(*manager, "a", ids(4000, 1));
  EXPECT_EQ(manager->memory_usage().kv_bytes, int64_t(16 * run_bytes()));
  manager->save(*agent);
  EXPECT_EQ(manager->memory_usage().kv_bytes, int64_t(16 * run_bytes()));  // nobody's rows move while they are held
  agent.release();
  // Layer 1 keeps the runs that its window of 300 can reach: of 4,000 tokens the last two.
  EXPECT_EQ(manager->memory_usage().kv_bytes, int64_t(16 * run_bytes() / 2 + 2 * run_bytes() / 2));
  expect_sound(*manager->wake("a")->cache);
  say(*manager, "a", ids(500, 2));
  manager->sleep("a");
  const int64_t read = manager->wake("a")->bytes_read;
  expect_sound(*manager->wake("a")->cache);
  EXPECT_LT(read, int64_t(18 * run_bytes() / 2 + 3 * run_bytes() / 2 + 18 * 4096));
}

TEST_P(Manager, APrefetchedAgentIsReadyAndAFailedPrefetchHarmsNobody) {
  auto manager = make();
  manager->save(*say(*manager, "a", ids(600, 1)));
  EXPECT_FALSE(manager->prefetch("a"));  // it is awake
  manager->sleep("a");
  EXPECT_FALSE(manager->prefetch("nobody"));
  EXPECT_TRUE(manager->prefetch("a"));
  EXPECT_FALSE(manager->prefetch("a"));
  EXPECT_EQ(manager->wake("a")->cache->length(), 600);
  expect_sound(*manager->wake("a")->cache);
  // Prefetched, then changed or let go: no lock stays behind.
  manager->sleep("a");
  EXPECT_TRUE(manager->prefetch("a"));
  manager->rewind("a", 100);
  EXPECT_EQ(manager->wake("a")->cache->length(), 100);
  manager->sleep("a");
  EXPECT_NO_THROW((void)store_.lock_agent("a"));
}

TEST_P(Manager, NamesAndPinsOutliveTheProcess) {
  auto manager = make();
  say(*manager, "a", ids(300, 1));
  manager->pin("a", true);
  manager->rename("a", "b");
  EXPECT_TRUE(manager->is_awake("b"));
  EXPECT_FALSE(store_.contains("a"));
  save_all(*manager);
  manager.reset();
  EXPECT_TRUE(is_pinned(store_.agent_info("b")));
  manager = make();
  EXPECT_TRUE(manager->wake("b")->pinned);
  EXPECT_THROW(manager->rename("nobody", "c"), Error);
  say(*manager, "c", ids(3, 1));
  EXPECT_THROW(manager->rename("b", "c"), Error);
}

TEST_P(Manager, SavingEveryTurnOfALongConversationWritesLessThanTwiceItsBytes) {
  // Rows of 8 KiB, a sixth of a small model's: beside them headers and token lists weigh little, as in life.
  KvLayout wide = layout();
  for (KvTensorSpec& tensor : wide.tensors) tensor.n_kv_heads = kHeads * 16;
  AgentManager manager(store_, {.model_name = "m", .identity = testing::test_identity(), .layout = wide,
                                .durability = Durability::kNone});
  AgentHold agent = manager.wake("a");
  int64_t written = 0;
  for (int turn = 0; turn < 50; ++turn) {
    const std::vector<int32_t> more = ids(8192 / 50, unsigned(turn));
    agent->cache->reserve(int(more.size()));
    agent->cache->record_tokens(more);
    agent->cache->advance(int(more.size()));
    agent->history = agent->cache->tokens();
    agent->changed();
    written += manager.save(*agent).bytes_written;
  }
  EXPECT_LT(written, 2 * store_.agent_info("a").bytes);
}

// Holds every write back until it is told to go on.
class SlowEnv : public testing::FaultEnv {
 public:
  using FaultEnv::FaultEnv;
  int64_t raw_write(int fd, const void* bytes, size_t size) override {
    std::unique_lock lock(mutex_);
    gate_.wait(lock, [this] { return open_; });
    return FaultEnv::raw_write(fd, bytes, size);
  }
  void open(bool on) {
    const std::lock_guard lock(mutex_);
    open_ = on;
    gate_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable gate_;
  bool open_ = true;
};

TEST(WriteBehind, ATurnDoesNotWaitForTheDiskUntilTheQueueIsFull) {
  TemporaryDirectory directory;
  SlowEnv env(directory.path() / "store", directory.path() / "attic");
  Store store(directory.path() / "store", &env);
  Writer writer(store, Durability::kNone, 1000);
  const auto job = [&](const std::string& id, int n, size_t new_bytes) {
    Writer::Job made{.agent = id, .ticket = uint64_t(id[0]), .version = uint64_t(n)};
    made.snapshot = {.identity = testing::test_identity(), .layout = layout_of(0), .tokens = ids(n, 1)};
    made.snapshot.tail = testing::make_run(layout_of(0), 0, n, 1);
    made.new_bytes = new_bytes;
    return made;
  };
  env.open(false);
  writer.submit(job("a", 10, 400));
  writer.submit(job("b", 10, 400));  // neither waits
  writer.submit(job("b", 20, 500));  // takes the place of the older state, if that has not begun
  EXPECT_TRUE(writer.collect().empty());
  std::atomic<bool> through{false};
  std::thread pushed_back([&] {
    writer.submit(job("c", 10, 400));
    through = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(through);  // can only fail to see a defect, never see one that is not there
  env.open(true);
  pushed_back.join();
  writer.wait_all();
  std::map<std::string, uint64_t> last;
  for (const Writer::Outcome& outcome : writer.collect()) {
    EXPECT_FALSE(outcome.error.has_value()) << outcome.error->what();
    last[outcome.agent] = outcome.version;
  }
  EXPECT_EQ(last, (std::map<std::string, uint64_t>{{"a", 10}, {"b", 20}, {"c", 10}}));
  EXPECT_EQ(store.load_agent_cache("b").tokens.size(), 20u);
  EXPECT_EQ(writer.queued_bytes(), 0u);
}

}  // namespace
}  // namespace torpor
