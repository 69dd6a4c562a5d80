/// Workers of one bucket, each with a store of its own.

#include <gtest/gtest.h>

#include <fstream>
#include <thread>

#include "memory_bucket.h"
#include "remote/worker.h"
#include "store_fixture.h"

namespace torpor::remote {
namespace {

using testing::MemoryBucket;

constexpr auto kTtl = std::chrono::seconds(1);

/// The bucket for a machine's lease, until its way there is cut.
struct Link final : ObjectStore {
  Link(ObjectStore& bucket, std::atomic<bool>& cut) : bucket(bucket), cut(cut) {}
  PutResult put(const std::string& key, std::span<const std::byte> bytes, const Condition& condition,
                const ObjectMetadata& metadata) override {
    if (cut) throw LostAnswer("No answer came.");
    return bucket.put(key, bytes, condition, metadata);
  }
  std::optional<Object> get(const std::string& key, std::uint64_t most) override {
    if (cut) throw LostAnswer("No answer came.");
    return bucket.get(key, most);
  }
  std::optional<ObjectInfo> head(const std::string& key) override { return bucket.head(key); }
  void read(const std::string& key, std::uint64_t offset, std::span<std::byte> out) override {
    bucket.read(key, offset, out);
  }
  std::vector<ObjectInfo> list(const std::string& prefix) override { return bucket.list(prefix); }
  void remove(const std::string& key) override { bucket.remove(key); }
  ObjectStore& bucket;
  std::atomic<bool>& cut;
};

/// A machine: a store, and a worker on it.
struct Machine {
  explicit Machine(std::shared_ptr<ObjectStore> bucket, std::shared_ptr<ObjectStore> leases = nullptr,
                   RemoteOptions given = {})
      : store(directory.path()), bucket(std::move(bucket)), leases(leases ? leases : this->bucket),
        options(std::move(given)) {
    options.url = "s3://bucket";
    options.store = directory.path();
    options.ttl = kTtl;
    begin();
  }
  void begin() { worker = std::make_unique<Worker>(this->bucket, this->leases, options); }
  /// It ends without a word to anybody.
  void die(std::atomic<bool>& cut) {
    cut = true;
    while (worker->alive()) std::this_thread::sleep_for(kTtl / 50);
    worker.reset();
    cut = false;
  }
  /// What an Engine does of a turn that ends with so many tokens.
  void turn(const std::string& id, int n_tokens, const std::string& turn_id = "t") {
    ASSERT_TRUE(worker->open(id, true));
    {
      const auto lock = store.lock_agent(id);
      store.save_agent_cache(id, testing::make_snapshot(n_tokens, layout), "demo/tiny");
    }
    try {
      worker->commit(id, KnownTurn{turn_id, std::string(32, 'a'), "result of " + turn_id});
    } catch (...) {
      worker->done(id);
      throw;
    }
    worker->done(id);
  }
  int64_t tokens(const std::string& id) {
    if (!worker->open(id, false)) return -1;
    worker->done(id);
    return store.agent_info(id).cache_size;
  }

  testing::TemporaryDirectory directory;
  Store store;
  std::shared_ptr<ObjectStore> bucket, leases;
  RemoteOptions options;
  KvLayout layout = testing::small_layout();
  std::unique_ptr<Worker> worker;
};

std::string refusal(const std::function<void()>& call, const char* field) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBusy) << error.what();
    EXPECT_EQ(error.field(), field) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was refused";
  return {};
}

TEST(RemoteWorker, AnAgentGoesFromStoreToStoreAsItsOwnersLetItGo) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket), b(bucket);
  EXPECT_EQ(a.tokens("ada"), -1);
  a.turn("ada", 300);
  EXPECT_NE(refusal([&] { b.worker->open("ada", true); }, kAgentElsewhere).find("'ada' is awake"), std::string::npos);
  a.worker->close("ada");
  EXPECT_FALSE(a.worker->owns("ada"));
  EXPECT_EQ(b.tokens("ada"), 300);
  EXPECT_EQ(a.store.agent_info("ada").hash, b.store.agent_info("ada").hash);
  b.turn("ada", 310, "u");
  b.worker.reset();  // as it ends
  EXPECT_EQ(a.tokens("ada"), 310);
  a.worker.reset();
  EXPECT_TRUE(bucket->keys("nodes/").empty());
}

TEST(RemoteWorker, AnAgentInUseIsNotLetGo) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket);
  a.turn("ada", 3);
  ASSERT_TRUE(a.worker->open("ada", false));
  a.worker->close("ada");
  EXPECT_TRUE(a.worker->owns("ada"));
  a.worker->done("ada");
  a.worker->close("ada");
  EXPECT_FALSE(a.worker->owns("ada"));
}

TEST(RemoteWorker, ACopyThatMemoryHasIsNeverReplacedUnderIt) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket), b(bucket);
  a.turn("ada", 300);
  a.worker->close("ada");
  b.turn("ada", 310, "u");
  b.worker->close("ada");
  {
    const auto awake = a.store.lock_agent("ada");  // memory read it once more, while it was let go
    refusal([&] { a.worker->open("ada", false); }, "");
    EXPECT_FALSE(a.worker->owns("ada"));
    EXPECT_EQ(a.store.agent_info("ada").cache_size, 300);
    b.turn("ada", 320, "v");
    b.worker->close("ada");
  }
  EXPECT_EQ(a.tokens("ada"), 320);
}

TEST(RemoteWorker, ForLackOfRoomTheCopyOfAnAgentGoesThatTheBucketHasAsItIsAndNobodyUses) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket);
  a.store.save_agent_cache("local", testing::make_snapshot(3), "demo/tiny");
  a.turn("old", 300);
  a.turn("new", 310);
  EXPECT_FALSE(a.worker->make_room()) << "both are this worker's";
  a.worker->close("old");
  {
    Worker beside(bucket, bucket, {.url = "s3://bucket", .store = a.directory.path(), .ttl = kTtl});
    ASSERT_TRUE(beside.open("old", false));
    EXPECT_FALSE(a.worker->make_room()) << "another worker of the store has it";
    beside.done("old");
  }
  a.worker->close("new");
  EXPECT_TRUE(a.worker->make_room());
  EXPECT_FALSE(a.store.contains("old"));
  {
    const auto lock = a.store.lock_agent("new");
    EXPECT_FALSE(a.worker->make_room());
    a.store.save_agent_cache("new", testing::make_snapshot(320), "demo/tiny");
  }
  EXPECT_FALSE(a.worker->make_room()) << "the bucket lacks what the copy has";
  EXPECT_TRUE(a.store.contains("new") && a.store.contains("local"));
  EXPECT_EQ(a.tokens("old"), 300);
}

TEST(RemoteWorker, WhatIsBroughtHereCountsForTheDiskLimitsOfItsEngine) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket), b(bucket);
  a.layout = testing::small_layout(KvDtype::kF16, 2, 4, 64);
  a.turn("old", 600);
  a.layout = testing::small_layout(KvDtype::kF16, 2, 4, 32);
  a.turn("new", 1200);
  a.worker.reset();
  EXPECT_EQ(b.tokens("old"), 600);
  b.worker.reset();
  b.options.disk.budget = b.store.get_cache_disk_usage().total_bytes * 3 / 2;
  b.begin();
  EXPECT_EQ(b.tokens("new"), 1200);
  EXPECT_FALSE(b.store.contains("old")) << "it made room";
  try {
    b.tokens("old");
    ADD_FAILURE() << "there is no room for it";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kResourceExhausted) << error.what();
  }
  b.worker->close("new");
  EXPECT_EQ(b.tokens("old"), 600);
}

TEST(RemoteWorker, ATurnIsKnownAgainByItsIdOnEveryMachine) {
  const auto bucket = std::make_shared<MemoryBucket>();
  const KnownTurn first{"t", std::string(32, 'a'), {}}, second{"u", std::string(32, 'a'), {}};
  {
    Machine a(bucket);
    a.turn("ada", 3, "t");
    a.turn("ada", 4, "u");
  }
  Machine b(bucket);
  ASSERT_TRUE(b.worker->open("ada", false));
  EXPECT_EQ(b.worker->answered("ada", second), "result of u");
  EXPECT_THROW(b.worker->answered("ada", first), Error);
  EXPECT_THROW(b.worker->answered("ada", {"u", std::string(32, 'b'), {}}), Error);
  EXPECT_EQ(b.worker->answered("ada", {"v", std::string(32, 'a'), {}}), std::nullopt);
  b.worker->done("ada");
}

TEST(RemoteWorker, ATurnIsOverOnceTheAgentHasChangedWithoutAnId) {
  const auto bucket = std::make_shared<MemoryBucket>();
  const KnownTurn turn{"t", std::string(32, 'a'), {}};
  Machine a(bucket);
  a.turn("ada", 3, "t");
  ASSERT_TRUE(a.worker->open("ada", false));
  a.worker->commit("ada", std::nullopt);  // of what has not changed
  EXPECT_EQ(a.worker->answered("ada", turn), "result of t");
  {
    const auto lock = a.store.lock_agent("ada");
    a.store.save_agent_cache("ada", testing::make_snapshot(4), "demo/tiny");
  }
  a.worker->commit("ada", std::nullopt);
  try {
    a.worker->answered("ada", turn);
    ADD_FAILURE() << "another turn's answer was given";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
  }
  a.worker->done("ada");
}

TEST(RemoteWorker, ATurnOfAnAgentThatTheBucketNeverHadIsTakenBackIfItIsNotCommitted) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket);
  a.store.save_agent_cache("ada", testing::make_snapshot(3), "demo/tiny");
  ASSERT_TRUE(a.worker->open("ada", false));
  a.worker->done("ada");
  bucket->before = [&](const char* verb, const std::string& key) {
    if (key.ends_with("/head") && std::string_view(verb) == "put") throw LostAnswer("No answer came.");
  };
  refusal([&] { a.turn("ada", 4); }, kUncommitted);
  bucket->before = nullptr;
  EXPECT_EQ(a.tokens("ada"), 3);
}

TEST(RemoteWorker, AnAgentWhoseCommitFailedIsFreeOnceItSleeps) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket), b(bucket);
  a.turn("ada", 3);
  bucket->before = [&](const char* verb, const std::string& key) {
    if (key.ends_with("/head") && std::string_view(verb) == "put") throw Error(ErrorCode::kIo, "Access is denied.");
  };
  EXPECT_THROW(a.turn("ada", 4, "u"), Error);
  bucket->before = nullptr;
  a.worker->close("ada");
  EXPECT_EQ(b.tokens("ada"), 3);
  EXPECT_EQ(a.store.agent_info("ada").cache_size, 4);  // which was never committed
  b.worker->close("ada");
  EXPECT_EQ(a.tokens("ada"), 3);
}

TEST(RemoteWorker, WhatIsNotKnownToBeCommittedIsFoundOutBeforeTheAgentGoesOn) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket);
  a.turn("ada", 3);
  std::atomic<bool> cut = false;
  const auto fail = [&](bool also_put) {
    bucket->before = [&, also_put](const char* verb, const std::string& key) {
      if (!key.ends_with("/head")) return;
      const bool put = std::string_view(verb) == "put";
      if (put && also_put) throw LostAnswer("No answer came.");
      if (!put && cut) throw LostAnswer("No answer came.");
    };
    bucket->after = [&](const char* verb, const std::string& key) {
      if (!key.ends_with("/head") || std::string_view(verb) != "put") return;
      cut = true;
      throw LostAnswer("No answer came.");
    };
  };
  fail(false);  // the swap is applied, and nobody hears
  refusal([&] { a.turn("ada", 4, "u"); }, kUncommitted);
  EXPECT_FALSE(a.worker->owns("ada"));
  bucket->before = bucket->after = nullptr;
  cut = false;
  EXPECT_EQ(a.tokens("ada"), 4);
  ASSERT_TRUE(a.worker->open("ada", false));
  EXPECT_EQ(a.worker->answered("ada", {"u", std::string(32, 'a'), {}}), "result of u");
  a.worker->done("ada");
  cut = true;
  fail(true);  // it is not
  refusal([&] { a.turn("ada", 5, "v"); }, kUncommitted);
  bucket->before = bucket->after = nullptr;
  EXPECT_EQ(a.tokens("ada"), 4);  // what was never told is not the agent's
}

/// From how many of its tokens the copy of an agent can go on.
size_t rows_of(Machine& machine, const std::string& id) {
  return machine.store.load_agent_cache(id).snapshot.tokens.size();
}

TEST(RemoteWorker, ATailThatIsSentOnceItsAgentSleepsIsComputedAgainFromItsIdsBySomebodyElseAlone) {
  const auto bucket = std::make_shared<MemoryBucket>();
  std::atomic<bool> cut = false;
  const KvLayout wide = testing::small_layout(KvDtype::kF16, 2, 4, 64);
  Machine a(bucket, std::make_shared<Link>(*bucket, cut), {.tail = RemoteTail::kSleep}), b(bucket);
  a.layout = b.layout = wide;
  a.turn("ada", 300);
  a.turn("ada", 350, "u");
  const int64_t before = bucket->counts().bytes_in;
  a.turn("ada", 400, "v");
  EXPECT_LT(bucket->counts().bytes_in - before, int64_t(50 * wide.bytes_per_token()) / 4);
  const std::string hash = a.store.agent_info("ada").hash;
  a.die(cut);
  a.begin();
  EXPECT_EQ(a.tokens("ada"), 400);
  EXPECT_EQ(a.store.agent_info("ada").hash, hash) << "what this machine has is as good as the commit";
  EXPECT_EQ(rows_of(a, "ada"), 400u);
  a.die(cut);
  EXPECT_EQ(b.tokens("ada"), 400);
  EXPECT_EQ(rows_of(b, "ada"), 256u);
  EXPECT_EQ(b.store.agent_tokens("ada"), a.store.agent_tokens("ada"));
  EXPECT_TRUE(b.store.verify("ada").front().problems.empty());
  EXPECT_EQ(b.store.verify("ada").front().intact_tokens, 256);
  ASSERT_TRUE(b.worker->open("ada", false));
  EXPECT_EQ(b.worker->answered("ada", {"v", std::string(32, 'a'), {}}), "result of v");
  b.worker->done("ada");
  b.turn("ada", 410, "w");
  EXPECT_EQ(rows_of(b, "ada"), 410u);
  b.worker->close("ada");
  a.begin();
  EXPECT_EQ(a.tokens("ada"), 410);
  EXPECT_EQ(rows_of(a, "ada"), 410u) << "the other one sends its tail with each commit";
  a.turn("ada", 420, "x");
  a.worker->close("ada");
  EXPECT_EQ(b.tokens("ada"), 420);
  EXPECT_EQ(b.store.agent_info("ada").hash, a.store.agent_info("ada").hash);
  ASSERT_TRUE(b.worker->open("ada", false));
  EXPECT_EQ(b.worker->answered("ada", {"x", std::string(32, 'a'), {}}), "result of x");
  b.worker->done("ada");
}

TEST(RemoteWorker, AnAgentWhoseTailCanNotBeSentSleepsWithoutItAndIsFree) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket, nullptr, {.tail = RemoteTail::kSleep}), b(bucket);
  a.turn("ada", 300);
  bucket->before = [&](const char* verb, const std::string& key) {
    if (std::string_view(verb) == "put" && key.starts_with("agents/") && !key.ends_with("/head")) {
      throw Error(ErrorCode::kIo, "Access is denied.");
    }
  };
  a.worker->close("ada");
  bucket->before = nullptr;
  EXPECT_EQ(b.tokens("ada"), 300);
  EXPECT_EQ(rows_of(b, "ada"), 256u);
}

bool puts_head(const char* verb, const std::string& key) {
  return std::string_view(verb) == "put" && key.ends_with("/head");
}

TEST(RemoteWorker, ATurnThatIsOverLocallyIsCommittedBeforeItsAgentIsUsedAgainAndBeforeItsWorkerEnds) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket, nullptr, {.ack = RemoteAck::kLocal}), b(bucket);
  a.turn("ada", 3, "t0");
  a.turn("bob", 3, "t0");
  Mutex mutex;
  CondVar changed;
  bool open = false;
  bucket->before = [&](const char* verb, const std::string& key) {
    MutexLock lock(mutex);
    while (!open && puts_head(verb, key)) changed.wait(lock);
  };
  const auto save_of = [&](const std::string& id) { return decode_head(bucket->text(head_key(id)), "head").file; };
  const std::string before = save_of("ada");
  a.turn("ada", 4, "t1");
  EXPECT_EQ(save_of("ada"), before) << "the turn is over, and its commit waits";
  std::thread next([&] { a.turn("ada", 5, "t2"); });
  a.turn("bob", 7, "t1");  // nobody waits for another agent's
  {
    const MutexLock lock(mutex);
    open = true;
    changed.notify_all();
  }
  next.join();
  for (int n = 6; n < 20; ++n) a.turn("ada", n, "t" + std::to_string(n - 3));
  ASSERT_TRUE(a.worker->open("ada", false));
  EXPECT_EQ(a.worker->answered("ada", {"t16", std::string(32, 'a'), {}}), "result of t16");
  EXPECT_THROW(a.worker->answered("ada", {"t1", std::string(32, 'a'), {}}), Error) << "it was committed, too";
  a.worker->done("ada");
  a.turn("ada", 20, "t17");
  a.worker.reset();
  EXPECT_EQ(b.tokens("ada"), 20);
  EXPECT_EQ(b.tokens("bob"), 7);
  bucket->before = nullptr;
}

TEST(RemoteWorker, TheCommitOfATurnThatIsOverIsMadeUntilItStands) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket, nullptr, {.ack = RemoteAck::kLocal}), b(bucket);
  a.turn("ada", 3, "t");
  std::atomic<int> lost = 0;
  for (const bool applied : {false, true}) {
    lost = 0;
    const auto lose = [&](const char* verb, const std::string& key) {
      if (puts_head(verb, key) && lost++ < 2) throw LostAnswer("No answer came.");
    };
    (applied ? bucket->after : bucket->before) = lose;
    a.turn("ada", applied ? 5 : 4, applied ? "v" : "u");
    EXPECT_EQ(a.tokens("ada"), applied ? 5 : 4);
    EXPECT_TRUE(a.worker->owns("ada"));
    EXPECT_GE(lost, 1);
    bucket->before = bucket->after = nullptr;
  }
  a.worker->close("ada");
  EXPECT_EQ(b.tokens("ada"), 5);
}

TEST(RemoteWorker, ATurnThatIsOverAndWasNotCommittedIsCommittedByTheNextWorkerOfItsStoreUnlessTheAgentWentOnElsewhere) {
  const auto bucket = std::make_shared<MemoryBucket>();
  std::atomic<bool> cut = false;
  Machine a(bucket, std::make_shared<Link>(*bucket, cut), {.ack = RemoteAck::kLocal}), b(bucket);
  const auto turn_that_is_cut_off = [&](int n_tokens, const std::string& turn_id) {
    bucket->before = [&](const char* verb, const std::string& key) {
      if (puts_head(verb, key)) throw LostAnswer("No answer came.");
    };
    a.turn("ada", n_tokens, turn_id);
    a.die(cut);
    bucket->before = nullptr;
    EXPECT_EQ(a.store.agent_info("ada").cache_size, n_tokens);
  };
  a.turn("ada", 3, "t");
  turn_that_is_cut_off(4, "u");
  a.options.ack = RemoteAck::kCommit;  // which is no matter
  a.begin();
  EXPECT_EQ(a.tokens("ada"), 4);
  ASSERT_TRUE(a.worker->open("ada", false));
  EXPECT_EQ(a.worker->answered("ada", {"u", std::string(32, 'a'), {}}), "result of u");
  a.worker->done("ada");
  a.options.ack = RemoteAck::kLocal;
  a.worker.reset();
  a.begin();
  EXPECT_EQ(a.tokens("ada"), 4);
  turn_that_is_cut_off(5, "v");
  b.turn("ada", 6, "w");
  b.worker->close("ada");
  a.begin();
  EXPECT_EQ(a.tokens("ada"), 6) << "what nobody else had is lost, as is told";
}

TEST(RemoteWorker, AWorkerThatCannotRenewItsLeaseIsTakenOverFromAndCommitsNothing) {
  const auto bucket = std::make_shared<MemoryBucket>();
  std::atomic<bool> cut = false;
  Machine a(bucket, std::make_shared<Link>(*bucket, cut)), b(bucket);
  a.turn("ada", 3);
  cut = true;
  b.turn("ada", 4, "u");  // waits until the first one's lease is dead
  EXPECT_FALSE(a.worker->alive());
  refusal([&] { a.turn("ada", 5, "v"); }, kAgentElsewhere);
  EXPECT_EQ(b.tokens("ada"), 4);
}

TEST(RemoteWorker, AWorkerEndsTheLeaseOfOneThatWasKilledOnItsStoreAndNoOther) {
  const auto bucket = std::make_shared<MemoryBucket>();
  Machine a(bucket);
  const auto leave = [&](const std::string& session, const std::string& url, const std::string& ack) {
    bucket->put("nodes/" + session, {}, remote::Condition::absent());
    std::ofstream(a.directory.path() / ".locks" / (".worker-" + session + ".lock"))
        << R"({"url":")" << url << R"(","session":")" << session << R"(","ack":")" << ack << R"("})";
  };
  leave("s-killed", "s3://bucket", "commit");
  leave("s-ahead", "s3://bucket", "local");
  leave("s-elsewhere", "s3://other", "commit");
  const Worker second(bucket, bucket, a.options);  // the first one lives
  const std::vector<std::string> leases = bucket->keys("nodes/");
  EXPECT_EQ(leases.size(), 4u);
  EXPECT_EQ(std::count(leases.begin(), leases.end(), "nodes/s-killed"), 0);
  EXPECT_TRUE(a.worker->open("ada", true));
  a.worker->done("ada");
}

}  // namespace
}  // namespace torpor::remote
