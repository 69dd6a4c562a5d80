// Sampling, stop strings, the pace of a prefill and a generation's steps, without a model.

#include <cmath>
#include <limits>
#include <map>

#include <gtest/gtest.h>

#include "engine/generation.h"
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

TEST(Sampler, LogitsThatHoldNoNumberAreAnError) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<std::vector<float>> rows = {{0, NAN, 1}, {NAN, NAN}, {-NAN, 0}, {0, inf}, {-inf, -inf}};
  for (const SamplingOptions& options : {SamplingOptions{}, SamplingOptions{1, 1, 0}, SamplingOptions{1, 0.9f, 0}}) {
    for (const std::vector<float>& row : rows) {
      try {
        const int32_t token = sample(row, options, 0);
        ADD_FAILURE() << "token " << token;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInternal);
        EXPECT_NE(std::string(error.what()).find("no number"), std::string::npos) << error.what();
      }
    }
    EXPECT_EQ(sample(std::vector<float>{-inf, 0, -inf}, options, 0), 1);  // tokens that can't come are none
  }
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

TEST(PrefillPace, AChunkTakesAboutAQuarterOfASecond) {
  for (const double rows_per_second : {5.0, 40.0, 600.0, 1500.0, 1e6}) {
    PrefillPace pace(Backend::kKernels);
    EXPECT_LE(pace.rows(), 32);  // before the first measurement
    for (int i = 0; i < 3; ++i) {
      pace.took(pace.rows(), pace.rows() / rows_per_second);
      EXPECT_LE(pace.rows(), std::max<double>(PrefillPace::kLeast, rows_per_second * PrefillPace::kSeconds));
      EXPECT_GT(pace.rows(), std::min<double>(PrefillPace::kMost, rows_per_second * PrefillPace::kSeconds) - PrefillPace::kBlock);
      EXPECT_TRUE(pace.rows() % (pace.rows() < PrefillPace::kBlock ? PrefillPace::kLeast : PrefillPace::kBlock) == 0) << pace.rows();
    }
  }
}

TEST(PrefillPace, WhereChunksChangeBitsTheyAreOfOneSize) {
  PrefillPace pace(Backend::kMlx);
  EXPECT_EQ(pace.rows(), PrefillPace::kMost);
  pace.took(512, 60);
  EXPECT_EQ(pace.rows(), PrefillPace::kMost);
}

/// A generation over made-up logits of the real tokenizer's vocabulary.
class GenerationTest : public testing::Test {
 protected:
  GenerationTest() : tokenizer_(Tokenizer::load(TORPOR_SOURCE_DIR "/.models/smollm2-135m")) {
    model_.vocab_size = tokenizer_->vocab_size();
    model_.eos_token_ids = {2};
    options_.on_prefill = [this](int done, int) { prefilled_.push_back(done); };
    options_.on_text = [this](std::string_view text) { said_ += text; };
  }
  std::vector<float> logits_for(int32_t token) const {
    std::vector<float> logits(size_t(model_.vocab_size), 0.0f);
    logits[size_t(token)] = 1;
    return logits;
  }
  /// Takes steps of at most `most` prompt tokens; after the prompt the tokens of `text` come, then `then`.
  GenerateResult run(Generation& generation, int most, const std::string& text, int32_t then) {
    std::vector<int32_t> tokens = tokenizer_->encode(text, false);
    tokens.push_back(then);
    size_t next = 0;
    for (auto rows = generation.next_rows(most); !rows.empty(); rows = generation.next_rows(most)) {
      computed_.insert(computed_.end(), rows.begin(), rows.end());
      const bool wanted = generation.wants_logits();
      generation.take(wanted ? logits_for(tokens[std::min(next++, tokens.size() - 1)]) : std::vector<float>{});
    }
    return generation.finish();
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
  ModelInfo model_;
  GenerateOptions options_;
  std::vector<int32_t> computed_;
  std::vector<int> prefilled_;
  std::string said_;
};

TEST_F(GenerationTest, ThePromptGoesInChunksAndEverySampledTokenIsComputed) {
  Generation generation(model_, tokenizer_, 7, {10, 11, 12, 13, 14}, options_);
  const GenerateResult result = run(generation, 2, "Hello there", 2);
  EXPECT_EQ(prefilled_, (std::vector<int>{2, 4, 5}));
  EXPECT_EQ(said_, "Hello there");
  EXPECT_EQ(result.text, said_);
  EXPECT_EQ(result.finish_reason, FinishReason::kStop);
  EXPECT_EQ(result.tokens.back(), 2);
  std::vector<int32_t> expected = {10, 11, 12, 13, 14};
  expected.insert(expected.end(), result.tokens.begin(), result.tokens.end());
  EXPECT_EQ(computed_, expected);
}

TEST_F(GenerationTest, EndsAtMaxTokensAtTheContextsEndAndWhenCancelled) {
  options_.max_tokens = 3;
  Generation three(model_, tokenizer_, 0, {10}, options_);
  GenerateResult result = run(three, 8, " a b c d e f", 2);
  EXPECT_EQ(result.tokens.size(), 3u);
  EXPECT_EQ(result.finish_reason, FinishReason::kLength);

  options_.max_tokens = 100;
  model_.max_context = 10;
  Generation full(model_, tokenizer_, 5, {10, 11}, options_);
  result = run(full, 8, " a b c d e f", 2);
  EXPECT_EQ(result.tokens.size(), 3u);  // 5 held, 2 of the prompt
  EXPECT_EQ(result.finish_reason, FinishReason::kLength);
  EXPECT_THROW(Generation(model_, tokenizer_, 5, {10, 11, 12, 13, 14}, options_), Error);

  model_.max_context = 0;
  std::atomic<bool> cancel{false};
  options_.cancel = &cancel;
  options_.on_prefill = [&](int done, int) { cancel = done == 2; };
  Generation cut(model_, tokenizer_, 0, {10, 11, 12}, options_);
  result = run(cut, 2, " a", 2);
  EXPECT_EQ(result.prefilled, 2);
  EXPECT_TRUE(result.tokens.empty());
  EXPECT_EQ(result.finish_reason, FinishReason::kCancelled);
}

TEST_F(GenerationTest, LogitsThatHoldNoNumberEndItWithAnError) {
  Generation generation(model_, tokenizer_, 0, {10}, options_);
  ASSERT_EQ(generation.next_rows(8).size(), 1u);
  std::vector<float> logits = logits_for(20);
  logits[5] = NAN;
  EXPECT_THROW(generation.take(logits), Error);
  EXPECT_EQ(said_, "");
}

}  // namespace
}  // namespace torpor
