/// Operations on a store that is asked from several threads, some of whose answers are lost.

#include "remote/driver.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "memory_bucket.h"
#include "remote/lease.h"
#include "remote/ownership.h"
#include "remote/sweep.h"
#include "torpor/error.h"

namespace torpor::remote {
namespace {

using testing::MemoryBucket;

std::string id_of(int64_t n) {
  std::string digits = std::to_string(n);
  return std::string(32 - digits.size(), '0') + digits;
}

const std::string kContent(32, 'c');

/// A store file as far as a save reads it.
Blob file_of(const std::string& rest) {
  auto text = std::make_shared<std::string>(std::string(kChecksumAt, 'x') + kContent + rest);
  return {std::as_bytes(std::span(*text)), text};
}

IsGone nobody_is_gone() {
  return [](const std::string&) { return false; };
}

/// A worker that takes an agent and saves it `turns` times.
void save_turns(Driver& driver, const std::string& agent, const std::string& session, int turns,
                std::atomic<int64_t>& ids) {
  const std::string save_id = id_of(++ids);
  const Acquired acquired = driver.run(
      [&](Exchange& exchange) { return acquire(exchange, agent, session, Make::kAbsent, save_id, nobody_is_gone()); });
  ASSERT_EQ(acquired.outcome, Acquired::Outcome::kOwned);
  HeadVersion version = acquired.version;
  std::vector<std::string> keys;
  for (int turn = 0; turn < turns; ++turn) {
    SaveRequest request{.agent = agent, .save_id = id_of(++ids)};
    request.kept = keys;
    for (const char* name : {"a", "b", "c"}) {
      request.uploads.push_back({"segments/ab/" + agent + std::to_string(turn) + name, kContent, 1});
    }
    const Saved saved = driver.run(
        [&](Exchange& exchange) { return save(exchange, version, request, acquired.generation); },
        [&](size_t number) { return file_of(number == 0 ? "agent file of " + agent : "rows"); });
    ASSERT_EQ(saved.outcome, Saved::Outcome::kCommitted);
    version = saved.version;
    keys = saved.keys;
  }
}

TEST(RemoteDriver, WorkersThatSaveAtATimeEachKeepTheirTurns) {
  MemoryBucket bucket;
  Driver driver(bucket);
  std::atomic<int64_t> ids = 0;
  std::vector<std::thread> workers;
  for (int i = 0; i < 4; ++i) {
    workers.emplace_back(
        [&, i] { save_turns(driver, "agent-" + std::to_string(i), "session-" + std::to_string(i), 5, ids); });
  }
  for (std::thread& worker : workers) worker.join();
  for (int i = 0; i < 4; ++i) {
    const auto read = driver.run([&](Exchange& e) { return read_save(e, "agent-" + std::to_string(i)); });
    ASSERT_TRUE(read);
    EXPECT_EQ(read->keys.size(), 15u);
    EXPECT_EQ(read->version.head.sequence, 6);
    EXPECT_TRUE(read->agent_file.ends_with("agent file of agent-" + std::to_string(i)));
  }
}

TEST(RemoteDriver, AnAnswerThatIsLostBeforeOrAfterARequestIsAppliedIsResolvedByReading) {
  MemoryBucket bucket;
  std::atomic<int> asked = 0;
  const auto lose = [&](const char*, const std::string&) {
    if (++asked % 5 == 0) throw LostAnswer("No answer came.");
  };
  bucket.before = lose;
  bucket.after = lose;
  Driver driver(bucket);
  std::atomic<int64_t> ids = 0;
  save_turns(driver, "ada", "session", 6, ids);
  const auto read = driver.run([&](Exchange& e) { return read_save(e, "ada"); });
  EXPECT_EQ(read->version.head.sequence, 7);
  EXPECT_EQ(read->keys.size(), 18u);
}

TEST(RemoteDriver, ALeaseThatHasRunOutIsNotWrittenAgain) {
  MemoryBucket bucket;
  Driver driver(bucket);
  Generations generations;
  LeaseKeeper keeper(Lease{.session = "paused", .ttl_ms = 20}, generations);
  const auto renew = [&] { return driver.run([&](Exchange& e) { return keeper.renew(e); }); };
  const auto tag = [&] { return bucket.head(lease_key("paused"))->tag; };
  EXPECT_TRUE(renew());
  const std::string before = tag();
  std::this_thread::sleep_for(std::chrono::milliseconds(40));
  EXPECT_FALSE(renew());
  EXPECT_EQ(tag(), before);  // else observers would wait for this worker again
}

TEST(RemoteDriver, ASweepRemovesWhatNoHeadNamesOnARealClock) {
  MemoryBucket bucket;
  Driver driver(bucket);
  std::atomic<int64_t> ids = 0;
  save_turns(driver, "ada", "session", 3, ids);
  bucket.put("segments/ab/orphan.0.safetensors", file_of("rows").bytes, {});
  Generations generations;
  LeaseKeeper keeper(Lease{.session = "sweeper"}, generations);
  EXPECT_TRUE(driver.run([&](Exchange& e) { return keeper.renew(e); }));
  LeaseWatch watch;
  SweepOptions options;
  options.session = "sweeper";
  options.save_ids = std::string(24, 'f');
  options.look_every = std::chrono::milliseconds(1);
  const auto sweep_once = [&] { return driver.run([&](Exchange& e) { return sweep(e, watch, options); }); };
  EXPECT_EQ(sweep_once().outcome, Swept::Outcome::kWaited);  // the sweeper itself has not announced the generation
  driver.run([&](Exchange& e) { return keeper.renew(e); });
  std::atomic<bool> over = false;
  std::thread renews([&] {
    while (!over) {
      driver.run([&](Exchange& e) { return keeper.renew(e); });
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  options.looks = 1000;
  options.save_ids = std::string(24, 'e');
  const Swept swept = sweep_once();
  over = true;
  renews.join();
  EXPECT_EQ(swept.outcome, Swept::Outcome::kDone);
  EXPECT_EQ(swept.objects, 3);  // the orphan, and two saves before the last
  EXPECT_EQ(bucket.keys("segments/").size(), 9u);
}

TEST(RemoteDriver, ABlobThatCanNotBeReadRefusesItsRequestAlone) {
  MemoryBucket bucket;
  Driver driver(bucket);
  const Acquired acquired = driver.run([&](Exchange& exchange) {
    return acquire(exchange, "ada", "session", Make::kAlways, id_of(1), nobody_is_gone());
  });
  const SaveRequest request{.agent = "ada", .save_id = id_of(2)};
  const auto refuse = [](size_t) -> Blob { throw Error(ErrorCode::kCorruption, "The file is damaged."); };
  EXPECT_THROW(driver.run([&](Exchange& e) { return save(e, acquired.version, request, 0); }, refuse), Error);
  EXPECT_FALSE(driver.run([&](Exchange& e) { return read_save(e, "ada"); }));
}

TEST(RemoteDriver, ACancelledDriverEndsWaitsAndAsksNothingMore) {
  MemoryBucket bucket;
  Driver driver(bucket);
  std::atomic<bool> waits = false;
  ErrorCode code = ErrorCode::kInternal;
  std::thread caller([&] {
    try {
      driver.run([&](Exchange& e) {
        waits = true;
        return ask_firmly(e, wait_request(std::chrono::hours(1)));
      });
    } catch (const Error& error) {
      code = error.code();
    }
  });
  while (!waits) std::this_thread::yield();
  driver.cancel();
  caller.join();
  EXPECT_EQ(code, ErrorCode::kCancelled);
  EXPECT_THROW(driver.run([&](Exchange& e) { return ask_firmly(e, get_request("k")); }), Error);
  EXPECT_EQ(bucket.counts().gets, 0);
}

}  // namespace
}  // namespace torpor::remote
