// Sampling, stop strings and the engine thread, without a model.

#include <cmath>
#include <map>
#include <stdexcept>

#include <gtest/gtest.h>

#include "engine/engine_thread.h"
#include "engine/sampler.h"
#include "engine/stop_filter.h"
#include "torpor/error.h"

namespace torpor {
namespace {

TEST(Sampler, GreedyTakesTheFirstOfTheLargest) {
  const std::vector<float> logits = {0, 3, 3, 1};
  EXPECT_EQ(sample(logits, {}, 0), 1);
}

TEST(Sampler, FrequenciesFollowTheSoftmax) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  std::map<int, int> counts;
  for (int position = 0; position < 20000; ++position) ++counts[sample(logits, {1.0f, 1.0f, 42}, position)];
  EXPECT_NEAR(counts[0] / 20000.0, 0.5, 0.02);
  EXPECT_NEAR(counts[1] / 20000.0, 0.3, 0.02);
  EXPECT_NEAR(counts[2] / 20000.0, 0.2, 0.02);
}

TEST(Sampler, TopPKeepsTheSmallestSufficientSet) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  for (int position = 0; position < 2000; ++position) {
    EXPECT_EQ(sample(logits, {1.0f, 0.5f, 1}, position), 1);
    EXPECT_NE(sample(logits, {1.0f, 0.79f, 1}, position), 0);
  }
}

TEST(Sampler, OfEqualTokensTopPKeepsTheSmallerIds) {
  const std::vector<float> logits(10, 0.0f);
  for (int position = 0; position < 500; ++position) EXPECT_LT(sample(logits, {1.0f, 0.25f, 1}, position), 3);
}

TEST(Sampler, ReproducibleBySeedAndPosition) {
  const std::vector<float> logits(100, 0.0f);
  int differ = 0;
  for (int position = 0; position < 100; ++position) {
    EXPECT_EQ(sample(logits, {1, 1, 9}, position), sample(logits, {1, 1, 9}, position));
    differ += sample(logits, {1, 1, 9}, position) != sample(logits, {1, 1, 10}, position);
  }
  EXPECT_GT(differ, 80);
}

TEST(Sampler, RefusesWhatIsNoProbability) {
  EXPECT_THROW(check_sampling({-1, 1, 0}), Error);
  EXPECT_THROW(check_sampling({NAN, 1, 0}), Error);
  EXPECT_THROW(check_sampling({1, 0, 0}), Error);
  EXPECT_THROW(check_sampling({1, 1.5f, 0}), Error);
  EXPECT_NO_THROW(check_sampling({0.7f, 0.9f, 0}));
}

std::string through(StopFilter& filter, const std::vector<std::string>& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += filter.push(piece);
  return text + filter.finish();
}

TEST(StopFilter, CutsBeforeTheStopStringHoweverItArrives) {
  for (const std::vector<std::string>& pieces :
       {std::vector<std::string>{"one END two"}, {"one E", "ND two"}, {"one ", "E", "N", "D", " two"}}) {
    StopFilter filter({"END"});
    EXPECT_EQ(through(filter, pieces), "one ");
    EXPECT_TRUE(filter.stopped());
  }
}

TEST(StopFilter, ReleasesWhatOnlyLookedLikeAStop) {
  StopFilter filter({"END"});
  EXPECT_EQ(filter.push("one EN"), "one ");
  EXPECT_EQ(filter.push("ough"), "ENough");
  EXPECT_EQ(filter.push("E"), "");
  EXPECT_EQ(filter.finish(), "E");
  EXPECT_FALSE(filter.stopped());
}

TEST(StopFilter, TheEarliestOfSeveralWins) {
  StopFilter filter({"c", "ab", ""});
  EXPECT_EQ(through(filter, {"xxabc"}), "xx");
}

TEST(EngineThread, RunsInOrderOnOneThreadAndCarriesErrors) {
  EngineThread thread;
  const auto id = thread.call([] { return std::this_thread::get_id(); });
  EXPECT_NE(id, std::this_thread::get_id());
  EXPECT_EQ(id, thread.call([] { return std::this_thread::get_id(); }));
  EXPECT_THROW(thread.call([]() -> int { throw std::runtime_error("x"); }), std::runtime_error);
  EXPECT_EQ(thread.call([] { return 7; }), 7);
}

}  // namespace
}  // namespace torpor
