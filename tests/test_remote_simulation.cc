/// The protocol of workers on one bucket, in simulated time: 2,000 stories, or TORPOR_SEEDS of them (`make soak` asks
/// for 100,000), from TORPOR_SEED on. Lost answers, answers that come after the client gave up, 5xx after applying,
/// 409, 412, crashes and pauses between any two requests, clocks of other rates, clients that ask twice, sweepers.

#include <cstdlib>

#include <gtest/gtest.h>

#include "simulated_fleet.h"

namespace torpor::testing {
namespace {

int64_t number_of(const char* variable, int64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoll(text);
}

/// In how many of these stories the flaw shows.
int stories_that_show(Flaw flaw) {
  int found = 0;
  for (uint64_t seed = 1; seed <= 100; ++seed) found += Fleet(seed, flaw).run().empty() ? 0 : 1;
  return found;
}

TEST(RemoteSimulation, NoAcknowledgedTurnIsLostAndNoFileThatAHeadNamesIsMissing) {
  const int64_t first = number_of("TORPOR_SEED", 1), seeds = number_of("TORPOR_SEEDS", 2000);
  for (int64_t seed = first; seed < first + seeds; ++seed) {
    const std::string broken = Fleet(uint64_t(seed), Flaw::kNone).run();
    ASSERT_EQ(broken, "") << "TORPOR_SEED=" << seed << " TORPOR_SEEDS=1 repeats it";
  }
}

TEST(RemoteSimulation, ASwapWithoutASaveIdIsFound) { EXPECT_GT(stories_that_show(Flaw::kNoSaveId), 0); }
TEST(RemoteSimulation, ATakeoverByTheWallClockIsFound) { EXPECT_GT(stories_that_show(Flaw::kWallClock), 0); }
TEST(RemoteSimulation, AnAnswerBeforeTheSwapIsFound) { EXPECT_GT(stories_that_show(Flaw::kEarlyAnswer), 0); }
TEST(RemoteSimulation, ASweepThatKnowsNoGenerationsIsFound) { EXPECT_GT(stories_that_show(Flaw::kNoGenerations), 0); }

}  // namespace
}  // namespace torpor::testing
