/// Agents between a store on disk and a bucket: what travels, what is shared, and what damage does.

#include "remote/tier.h"

#include <gtest/gtest.h>

#include <thread>

#include "memory_bucket.h"
#include "store_fixture.h"
#include "torpor/error.h"

namespace torpor::remote {
namespace {

using namespace torpor::testing;

/// A machine: its store, and its way to the bucket.
struct Machine {
  explicit Machine(MemoryBucket& bucket)
      : counted(bucket), driver(counted), store(directory.path()), tier(driver, store, "s3://bucket"),
        session(driver) {}

  void save(const std::string& agent, const KvSnapshot& snapshot) {
    store.save_agent_cache(agent, snapshot, "demo/tiny", {}, Durability::kRename);
  }
  std::vector<int32_t> tokens(const std::string& agent) { return store.agent_tokens(agent); }
  Acquired own(const std::string& agent) {
    return driver.run([&](Exchange& e) {
      return acquire(e, agent, session.name(), Make::kAlways, std::string(32, '7'),
                     [](const std::string&) { return false; });
    });
  }

  TemporaryDirectory directory{TemporaryDirectory::in_memory()};
  CountedStore counted;
  Driver driver;
  Store store;
  Tier tier;
  Session session;
};

ErrorCode code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code();
  }
  return ErrorCode::kInternal;
}

void expect_same_agent(Machine& one, Machine& other, const std::string& agent) {
  const LoadedAgent here = one.store.load_agent_cache(agent), there = other.store.load_agent_cache(agent);
  EXPECT_EQ(here.info.hash, there.info.hash);
  EXPECT_EQ(here.snapshot.tokens, there.snapshot.tokens);
  EXPECT_TRUE(other.store.verify(agent).front().problems.empty());
}

TEST(RemoteTier, AnAgentThatWasPushedIsTheSameWhereItIsPulled) {
  MemoryBucket bucket;
  Machine one(bucket), other(bucket);
  one.save("ada", make_snapshot(600));
  one.save("ada", make_snapshot(620));  // the first file is a part now
  EXPECT_EQ(one.tier.push(one.session, "ada", false).outcome, Saved::Outcome::kCommitted);
  const Pulled pulled = other.tier.pull("ada", false);
  EXPECT_TRUE(pulled.damaged.empty());
  EXPECT_EQ(pulled.objects, int64_t(pulled.keys.size()));
  EXPECT_GE(pulled.objects, 3);
  expect_same_agent(one, other, "ada");
  const Pulled again = other.tier.pull("ada", false);
  EXPECT_EQ(again.objects, 0);  // all of it is here
  // It goes on elsewhere, and comes back.
  other.save("ada", make_snapshot(900));
  EXPECT_EQ(other.tier.push(other.session, "ada", false).uploaded, 2);  // a segment, and a part of earlier ids
  EXPECT_EQ(one.tier.pull("ada", false).objects, 2);
  expect_same_agent(other, one, "ada");
}

TEST(RemoteTier, StatesOfRecurrentLayersTravelWithTheirAgent) {
  MemoryBucket bucket;
  Machine one(bucket), other(bucket);
  one.save("ada", with_states(make_snapshot(300), {256}));
  one.tier.push(one.session, "ada", false);
  EXPECT_EQ(bucket.keys("states/").size(), 2u);
  other.tier.pull("ada", false);
  expect_same_agent(one, other, "ada");
}

TEST(RemoteTier, TwoMachinesWithOnePromptSendItsRowsOnce) {
  MemoryBucket bucket;
  Machine one(bucket), other(bucket);
  one.save("ada", make_snapshot(1024 + 10));
  other.save("bob", make_snapshot(1024 + 20));
  const Saved first = one.tier.push(one.session, "ada", false);
  EXPECT_EQ(first.uploaded, 4);
  const auto before = other.counted.counts();
  const Saved second = other.tier.push(other.session, "bob", false);
  const auto after = other.counted.counts();
  EXPECT_EQ(second.uploaded, 0);
  EXPECT_EQ(second.keys, first.keys);
  EXPECT_EQ(after.puts - before.puts, 4);  // acquire, save, commit, release
  EXPECT_LT(after.bytes_sent - before.bytes_sent, 8192);
  EXPECT_EQ(bucket.keys("segments/").size(), 4u);
}

TEST(RemoteTier, ATurnSendsItsOwnBytesInAFewRequests) {
  MemoryBucket bucket;
  Machine one(bucket);
  one.save("ada", make_snapshot(1000));
  const Acquired owned = one.own("ada");
  const Saved first = one.tier.push_save("ada", owned.version, {}, owned.generation);
  one.save("ada", make_snapshot(1010));
  const auto before = one.counted.counts();
  const Session::Saving saving(one.session);
  const Saved turn = one.tier.push_save("ada", first.version, first.keys, saving.generation(),
                                        {.turn = Turn{"t1", std::string(32, '1'), "r"}});
  const auto after = one.counted.counts();
  EXPECT_EQ(turn.outcome, Saved::Outcome::kCommitted);
  EXPECT_EQ(turn.version.head.turn->id, "t1");
  EXPECT_LE(after.puts - before.puts, 3);  // a part, the save, the head
  EXPECT_LE(after.gets - before.gets, 1);
  EXPECT_LT(after.bytes_sent - before.bytes_sent, 16384);
}

TEST(RemoteTier, AnAgentThatCameWithoutItsTailIsCopiedCutAndSavedLikeAnyOther) {
  MemoryBucket bucket;
  Machine one(bucket), other(bucket);
  const auto messages = [](int64_t n) {
    return AgentNotes{.messages = {{R"({"role":"user"})", 0, 520}, {R"({"role":"assistant"})", 520, n}}};
  };
  one.store.save_agent_cache("ada", make_snapshot(600), "demo/tiny", {}, Durability::kRename, messages(600));
  one.store.save_agent_cache("ada", make_snapshot(650), "demo/tiny", {}, Durability::kRename, messages(650));
  one.save("bob", with_states(make_snapshot(600), {256, 590}));
  for (const char* agent : {"ada", "bob"}) {
    const Acquired owned = one.own(agent);
    const Pushed pushed = one.tier.push_save(agent, owned.version, {}, owned.generation, {.tail = false});
    EXPECT_TRUE(pushed.without_tail);
    other.tier.pull(agent, false);
    EXPECT_EQ(other.tokens(agent), one.tokens(agent));
    EXPECT_TRUE(other.store.verify(agent).front().problems.empty());
  }
  EXPECT_EQ(resumable_tokens(other.store.agent_info("bob"), 600), 256);
  EXPECT_EQ(resumable_tokens(other.store.agent_info("ada"), 650), 512);
  EXPECT_EQ(other.store.load_agent_cache("ada").messages.size(), one.store.load_agent_cache("ada").messages.size());
  for (const int64_t n : {650, 630, 512, 300}) {
    const std::string copy = "copy-" + std::to_string(n);
    other.store.copy_agent_cache("ada", copy, {.n_tokens = n});
    const LoadedAgent loaded = other.store.load_agent_cache(copy);
    EXPECT_EQ(loaded.tokens, make_snapshot(int(n)).tokens);
    EXPECT_EQ(int64_t(loaded.snapshot.tokens.size()), std::min<int64_t>(n, 512)) << n;
    EXPECT_TRUE(other.store.verify(copy).front().problems.empty()) << n;
  }
  other.store.rename_agent_cache("copy-650", "eve");
  EXPECT_EQ(other.tokens("eve"), one.tokens("ada"));
  EXPECT_EQ(code_of([&] { other.store.export_agent("ada", other.directory.path() / ".." / "ada.safetensors"); }),
            ErrorCode::kInvalidArgument);
  for (const char* agent : {"ada", "eve"}) {
    other.save(agent, make_snapshot(700));
    EXPECT_EQ(other.store.load_agent_cache(agent).snapshot.tokens, make_snapshot(700).tokens);
    EXPECT_TRUE(other.store.verify(agent).front().problems.empty());
  }
  // What is pushed again is what the other one goes on from.
  EXPECT_EQ(other.tier.push(other.session, "eve", false).outcome, Saved::Outcome::kCommitted);
}

TEST(RemoteTier, ATailThatCanNotBeComputedFromIdsGoesWithEachSave) {
  MemoryBucket bucket;
  Machine one(bucket);
  KvSnapshot unknown = make_snapshot(300), cut = make_snapshot(300);
  unknown.tokens[280] = -1;
  one.save("unknown", unknown);
  one.save("whole", make_snapshot(512));
  one.save("other", with_state(make_snapshot(300)));
  one.store.save_agent_cache("cut", cut, "demo/tiny", {}, Durability::kRename, {.record = {{"shortest_cut", "270"}}});
  for (const char* agent : {"unknown", "whole", "other", "cut"}) {
    const Acquired owned = one.own(agent);
    EXPECT_FALSE(one.tier.push_save(agent, owned.version, {}, owned.generation, {.tail = false}).without_tail) << agent;
  }
}

TEST(RemoteTier, AnArchivedAgentKnowsItsLastTurnAgain) {
  MemoryBucket bucket;
  Machine one(bucket);
  one.save("ada", make_snapshot(300));
  const Acquired owned = one.own("ada");
  one.tier.push_save("ada", owned.version, {}, owned.generation, {.turn = Turn{"t1", std::string(32, '1'), "r"}});
  EXPECT_EQ(one.tier.archive(one.session, "ada").outcome, Archived::Outcome::kDone);
  const auto read = one.driver.run([&](Exchange& e) { return read_save(e, "ada"); });
  EXPECT_EQ(check_turn(read->version.head, "t1", std::string(32, '1')), TurnCheck::kAnswered);
  EXPECT_TRUE(read->version.head.past.empty());
}

TEST(RemoteTier, AFlippedByteInAnyObjectIsFoundAndWhatIsIntactIsKept) {
  MemoryBucket bucket;
  Machine one(bucket);
  one.save("ada", make_snapshot(600));
  one.save("ada", make_snapshot(620));
  one.tier.push(one.session, "ada", false);
  int salvaged = 0, refused = 0;
  for (const std::string& key : bucket.keys()) {
    if (key.starts_with("nodes/") || key == kSweepKey) continue;
    for (const size_t at : {size_t(0), size_t(40), bucket.text(key).size() / 2, bucket.text(key).size() - 1}) {
      char& byte = bucket.text(key)[at];
      byte = char(byte ^ 4);
      Machine other(bucket);
      EXPECT_FALSE(other.tier.verify().problems.empty()) << key << " " << at;
      std::vector<BucketProblem> damaged;
      try {
        damaged = other.tier.pull("ada", false).damaged;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kCorruption) << error.what();
        EXPECT_FALSE(other.store.contains("ada"));  // not half of it
        ++refused;
      }
      if (!damaged.empty()) {
        ++salvaged;
        EXPECT_EQ(damaged.front().key, key);
        EXPECT_NE(damaged.front().problem.find(key), std::string::npos);
        const LoadedAgent woken = other.store.load_agent_cache("ada", {.salvage = true});
        EXPECT_TRUE(woken.damage);
        if (key.starts_with("segments/")) EXPECT_EQ(woken.tokens.size(), 620u);
        for (const VerifyReport& report : other.store.verify("ada")) EXPECT_FALSE(report.problems.empty());
      }
      byte = char(byte ^ 4);
    }
  }
  EXPECT_EQ(salvaged, 8);  // two segments
  EXPECT_EQ(refused, 12);  // the head, the save, and the part with the first ids
  EXPECT_TRUE(one.tier.verify().problems.empty());
}

TEST(RemoteTier, WhatIsDamagedInTheBucketIsGoodAgainAfterTheNextPush) {
  MemoryBucket bucket;
  Machine one(bucket), other(bucket);
  one.save("ada", make_snapshot(600));
  one.tier.push(one.session, "ada", false);
  bucket.text(bucket.keys("segments/").front())[2000] ^= 1;
  EXPECT_EQ(other.tier.pull("ada", false).damaged.size(), 1u);
  other.save("ada", make_snapshot(610));  // woken, and its rows computed again
  other.tier.push(other.session, "ada", false);
  EXPECT_TRUE(one.tier.verify().problems.empty());
  one.tier.pull("ada", false);
  expect_same_agent(other, one, "ada");
  // Damage where nobody has pulled it: the name is not free, and its own bytes take their place again.
  bucket.text(bucket.keys("segments/").front())[50] ^= 1;
  one.save("eve", make_snapshot(512));
  EXPECT_EQ(one.tier.push(one.session, "eve", false).outcome, Saved::Outcome::kCommitted);
  EXPECT_TRUE(one.tier.verify().problems.empty());
  bucket.text(bucket.keys("segments/").front()).resize(20);  // it has no checksum any more
  one.save("bob", make_snapshot(512));
  EXPECT_EQ(one.tier.push(one.session, "bob", false).outcome, Saved::Outcome::kCommitted);
  EXPECT_TRUE(one.tier.verify().problems.empty());
}

TEST(RemoteTier, ADamagedFileHereIsReplacedFromTheBucket) {
  MemoryBucket bucket;
  Machine one(bucket);
  one.save("ada", make_snapshot(600));
  one.tier.push(one.session, "ada", false);
  for (const auto& entry : fs::recursive_directory_iterator(one.directory.path() / "segments")) {
    if (!entry.is_regular_file()) continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(2000);
    file.put('\x7f');
    break;
  }
  EXPECT_FALSE(one.store.verify("ada").front().problems.empty());
  EXPECT_EQ(one.tier.pull("ada", false).objects, 0);
  EXPECT_EQ(one.tier.pull("ada", false, {.check = true}).objects, 1);
  EXPECT_TRUE(one.store.verify("ada").front().problems.empty());
}

TEST(RemoteTier, NobodysChangesAreDroppedUnasked) {
  MemoryBucket bucket;
  Machine one(bucket), other(bucket);
  one.save("ada", make_snapshot(300));
  one.tier.push(one.session, "ada", false);
  other.tier.pull("ada", false);
  other.save("ada", make_snapshot(310));
  other.tier.push(other.session, "ada", false);
  one.save("ada", make_snapshot(305));
  EXPECT_EQ(code_of([&] { one.tier.push(one.session, "ada", false); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of([&] { one.tier.pull("ada", false); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(one.tokens("ada").size(), 305u);
  one.tier.pull("ada", true);
  EXPECT_EQ(one.tokens("ada").size(), 310u);
  EXPECT_EQ(code_of([&] { one.tier.pull("eve", false); }), ErrorCode::kNotFound);
}

TEST(RemoteTier, AnAgentOfALiveWorkerIsNotTakenFromIt) {
  MemoryBucket bucket;
  Machine one(bucket);
  one.save("ada", make_snapshot(300));
  Session worker(one.driver, {.address = {}, .ttl = std::chrono::milliseconds(150), .on_end = {}});
  one.driver.run([&](Exchange& e) {
    return acquire(e, "ada", worker.name(), Make::kAlways, std::string(32, '7'),
                   [](const std::string&) { return false; });
  });
  EXPECT_EQ(code_of([&] { one.tier.push(one.session, "ada", true); }), ErrorCode::kBusy);
  EXPECT_EQ(one.tier.archive(one.session, "ada").outcome, Archived::Outcome::kAbsent);  // it has no save yet
  EXPECT_TRUE(worker.may_answer());
}

TEST(RemoteTier, AnAgentOfAWorkerThatIsGoneIsTakenOver) {
  MemoryBucket bucket;
  Machine one(bucket);
  one.save("ada", make_snapshot(300));
  one.tier.push(one.session, "ada", false);
  one.driver.run([&](Exchange& e) {
    return acquire(e, "ada", "dead", Make::kNever, std::string(32, '7'), [](const std::string&) { return false; });
  });
  one.save("ada", make_snapshot(310));
  EXPECT_EQ(one.tier.push(one.session, "ada", false).outcome, Saved::Outcome::kCommitted);
}

TEST(RemoteTier, ArchivingDropsRowsAndKeepsIdsAndASweepRemovesThem) {
  MemoryBucket bucket;
  Machine one(bucket), other(bucket);
  one.save("ada", make_snapshot(700));
  one.save("bob", make_snapshot(256));
  one.tier.push(one.session, "ada", false);
  one.tier.push(one.session, "bob", false);
  EXPECT_EQ(one.tier.archive(one.session, "ada").dropped, 2);
  EXPECT_EQ(one.tier.archive(one.session, "ada").outcome, Archived::Outcome::kNothing);
  const Pulled pulled = other.tier.pull("ada", false);
  EXPECT_EQ(pulled.dropped, 2);
  EXPECT_EQ(other.store.load_agent_cache("ada", {.salvage = true}).tokens.size(), 700u);
  EXPECT_EQ(one.tier.verify().unneeded, 1);
  other.session.close();  // it would announce the new generation only when it renews its lease, in seconds
  const Swept swept = one.session.sweep_bucket(std::chrono::milliseconds(10));
  EXPECT_EQ(swept.outcome, Swept::Outcome::kDone);
  EXPECT_EQ(one.tier.verify().unneeded, 0);
  EXPECT_TRUE(one.tier.verify().problems.empty());
}

TEST(RemoteTier, APullThatFailsLeavesTheAgentAsItWas) {
  MemoryBucket bucket;
  Machine one(bucket), other(bucket);
  one.save("ada", make_snapshot(300));
  one.tier.push(one.session, "ada", false);
  other.tier.pull("ada", false);
  one.save("ada", make_snapshot(600));
  one.tier.push(one.session, "ada", false);
  bucket.before = [](const char* verb, const std::string& key) {
    if (std::string(verb) == "get" && key.starts_with("segments/")) throw Error(ErrorCode::kIo, "The network is down.");
  };
  EXPECT_EQ(code_of([&] { other.tier.pull("ada", false); }), ErrorCode::kIo);
  bucket.before = nullptr;
  EXPECT_EQ(other.tokens("ada").size(), 300u);
  EXPECT_TRUE(other.store.verify("ada").front().problems.empty());
  const auto awake = other.store.lock_agent("ada");
  EXPECT_EQ(code_of([&] { other.tier.pull("ada", false); }), ErrorCode::kBusy);
}

TEST(RemoteTier, ThreadsThatWaitForALookShareTheNextOne) {
  constexpr int kThreads = 16;
  MemoryBucket bucket;
  Driver driver(bucket);
  Session session(driver, {.address = {}, .ttl = std::chrono::hours(1), .on_end = {}});
  std::atomic<int> called = 0, well = 0;
  bucket.before = [&](const char* verb, const std::string&) {
    while (std::string_view(verb) == "list" && called < kThreads) std::this_thread::yield();
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      ++called;
      well += session.look();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(well, kThreads);
  EXPECT_LE(bucket.counts().lists, kThreads / 2);
}

TEST(RemoteTier, ASessionEndsWithItsLeaseWhateverItsRequestsWaitFor) {
  MemoryBucket bucket;
  Driver driver(bucket);
  std::atomic<bool> held = false, ended = false;
  bucket.before = [&](const char*, const std::string&) {
    while (held && !ended) std::this_thread::yield();  // the old session's end waits for this answer
  };
  Session session(driver, {.address = {}, .ttl = std::chrono::milliseconds(200), .on_end = [&] { ended = true; }});
  held = true;
  for (int i = 0; i < 1000 && !ended; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_TRUE(ended);
  ended = true;
}

TEST(RemoteTier, ASessionWhoseLeaseGoesIsGoneWithTheNextLook) {
  MemoryBucket bucket;
  Driver driver(bucket);
  Session observer(driver, {.address = {}, .ttl = std::chrono::hours(1), .on_end = {}});
  std::string name;
  {
    Session other(driver, {.address = {}, .ttl = std::chrono::hours(1), .on_end = {}});
    name = other.name();
    observer.look();
    EXPECT_FALSE(observer.is_gone(name));
  }
  observer.look();
  EXPECT_TRUE(observer.is_gone(name));
}

TEST(RemoteTier, ALookThatBeganLatelyWillDo) {
  MemoryBucket bucket;
  Driver driver(bucket);
  Session session(driver, {.address = {}, .ttl = std::chrono::hours(1), .on_end = {}});
  const Instant begun = clock_now();
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(session.look(begun));
  EXPECT_EQ(bucket.counts().lists, 1);
  EXPECT_TRUE(session.look(clock_now()));
  EXPECT_EQ(bucket.counts().lists, 2);
}

TEST(RemoteTier, ASessionThatCanNotRenewItsLeaseMayNotAnswer) {
  MemoryBucket bucket;
  CountedStore counted(bucket);
  Driver driver(counted);
  std::atomic<bool> down = false, ended = false;
  bucket.before = [&](const char*, const std::string&) {
    if (down) throw LostAnswer("No answer came.");
  };
  Session session(driver, {.address = "http://a:1",
                           .ttl = std::chrono::milliseconds(100),
                           .on_end = [&] { ended = true; }});
  EXPECT_TRUE(session.may_answer());
  down = true;
  while (!ended) std::this_thread::yield();
  down = false;
  EXPECT_FALSE(session.may_answer());
}

}  // namespace
}  // namespace torpor::remote
