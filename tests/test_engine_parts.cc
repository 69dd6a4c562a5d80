// Sampling, stop strings, the pace of a prefill and a generation's steps, without a model.

#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "base/json.h"
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

// A vocabulary of several of the pieces that threads take, and options that keep few tokens, many or all.
TEST(Sampler, KeepsAndDrawsOfALargeVocabularyWhatTheSoftmaxSays) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(50'001);
  for (float& logit : logits) logit = normal(random);
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, std::greater<>(), [&](int32_t id) { return logits[size_t(id)]; });
  const auto weight = [&](int32_t id, double temperature) {
    return std::exp((double(logits[size_t(id)]) - double(logits[size_t(order[0])])) / temperature);
  };
  double all = 0;
  for (const int32_t id : order) all += weight(id, 1);
  for (const SamplingOptions& options :
       {SamplingOptions{.temperature = 0.8f}, SamplingOptions{.temperature = 1.5f, .top_p = 0.5f},
        SamplingOptions{.temperature = 1, .top_p = 0.999f}, SamplingOptions{.temperature = 0.7f, .top_k = 4'000},
        SamplingOptions{.temperature = 2, .min_p = 0.01f}}) {
    const bool leaves_out = options.top_p < 1 || options.top_k > 0 || options.min_p > 0;
    std::vector<int32_t> kept;
    double sum = 0, total = 0;
    for (const int32_t id : order) {
      if (sum >= (options.top_p < 1 ? options.top_p * all : INFINITY) || weight(id, 1) < options.min_p ||
          (options.top_k > 0 && kept.size() == size_t(options.top_k))) {
        break;
      }
      kept.push_back(id);
      sum += weight(id, 1);
      total += weight(id, options.temperature);
    }
    const Candidates found = candidates(logits, options);
    EXPECT_EQ(found.all, !leaves_out);
    EXPECT_NEAR(found.total / total, 1, 1e-5);
    EXPECT_EQ(found.tokens, leaves_out ? kept : std::vector<int32_t>());
    for (const int32_t id : kept) ASSERT_NEAR(found.weights[size_t(id)], weight(id, options.temperature), 1e-5);
    // How often one of the likeliest tenth comes.
    const std::set<int32_t> likely(kept.begin(), kept.begin() + ptrdiff_t(kept.size() / 10));
    double share = 0;
    for (const int32_t id : likely) share += weight(id, options.temperature) / total;
    int drawn = 0;
    constexpr int kDraws = 150;
    for (int position = 0; position < kDraws; ++position) drawn += likely.contains(sample(logits, options, position));
    EXPECT_NEAR(double(drawn) / kDraws, share, 0.1);
  }
}

// So tokens that can't come never do, and no piece of the vocabulary is passed over.
TEST(Sampler, ADrawIsTheTokenWhereTheSumOfTheSoftmaxPassesTheRandomNumber) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(50'001);
  for (float& logit : logits) logit = random() % 3 == 0 ? -INFINITY : normal(random);
  const float top = *std::ranges::max_element(logits);
  const SamplingOptions options{.temperature = 0.8f, .seed = 11};
  std::vector<double> before{0};
  for (const float logit : logits) before.push_back(before.back() + std::exp((double(logit) - top) / 0.8));
  const std::vector<float> equal(1 << 20, 0.0f);
  for (int position = 0; position < 40; ++position) {
    // Of equal tokens it is the one that is so far among them.
    const double number = double(sample(equal, options, position)) / double(equal.size());
    const auto token = size_t(sample(logits, options, position));
    EXPECT_GT(logits[token], -INFINITY);
    EXPECT_LE(before[token] / before.back(), number + 1e-5) << position;
    EXPECT_GE(before[token + 1] / before.back(), number - 1e-5) << position;
  }
}

// Against mlx-lm (scripts/make-goldens-sampling).
TEST(Sampler, ChangesLogitsAndKeepsTokensAsMlxLmDoes) {
  std::ifstream file(TORPOR_SOURCE_DIR "/tests/goldens/sampling.json");
  const auto golden = nlohmann::json::parse(file);
  const auto tokens = golden["tokens"].get<std::vector<int32_t>>();
  const std::span<const int32_t> all = tokens;
  for (const auto& one : golden["cases"]) {
    SCOPED_TRACE(dump_json(one["options"]));
    const auto& given = one["options"];
    SamplingOptions options{.temperature = given.value("temperature", 1.0f), .top_p = given.value("top_p", 1.0f),
                            .top_k = given.value("top_k", 0), .min_p = given.value("min_p", 0.0f),
                            .repetition_penalty = given.value("repetition_penalty", 1.0f),
                            .penalty_context = given.value("penalty_context", 64),
                            .presence_penalty = given.value("presence_penalty", 0.0f),
                            .frequency_penalty = given.value("frequency_penalty", 0.0f)};
    const auto biases = given.value("logit_bias", nlohmann::json::object());
    for (const auto& [id, bias] : biases.items()) {
      options.logit_bias.emplace_back(std::stoi(id), bias.get<float>());
    }
    // The repetition penalty counts what is before the answer, too; the others the answer alone.
    const bool answers = options.presence_penalty != 0 || options.frequency_penalty != 0;
    const size_t before = answers ? 0 : 25;
    auto logits = golden["logits"].get<std::vector<float>>();
    adjust_logits(logits, options, all.first(before), all.subspan(before));
    const auto theirs = one["logits"].get<std::vector<float>>();
    for (size_t i = 0; i < logits.size(); ++i) EXPECT_NEAR(logits[i], theirs[i], 1e-5) << i;
    const Candidates found = candidates(logits, options);
    std::vector<double> ours(logits.size());
    for (size_t i = 0; found.all && i < ours.size(); ++i) ours[i] = found.weights[i] / found.total;
    for (const int32_t token : found.tokens) ours[size_t(token)] = found.weights[size_t(token)] / found.total;
    const auto probabilities = one["probabilities"].get<std::vector<double>>();
    for (size_t i = 0; i < ours.size(); ++i) {
      EXPECT_NEAR(ours[i], probabilities[i], 1e-5) << i;
      EXPECT_EQ(ours[i] > 0, probabilities[i] > 0) << i;
    }
  }
}

TEST(Sampler, RefusesWhatNoOptionCanBe) {
  for (const SamplingOptions& options :
       {SamplingOptions{.top_k = -1}, SamplingOptions{.min_p = 1.5f}, SamplingOptions{.repetition_penalty = 0},
        SamplingOptions{.repetition_penalty = NAN}, SamplingOptions{.penalty_context = -1},
        SamplingOptions{.presence_penalty = NAN}, SamplingOptions{.frequency_penalty = INFINITY},
        SamplingOptions{.logit_bias = {{-1, 1}}}, SamplingOptions{.logit_bias = {{10, 1}}},
        SamplingOptions{.logit_bias = {{0, NAN}}}}) {
    EXPECT_THROW(check_sampling(options, 10), Error);
  }
  EXPECT_NO_THROW(check_sampling({.logit_bias = {{9, -INFINITY}}}, 10));
}

TEST(Sampler, LogProbabilitiesAreTheSoftmaxs) {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  const TokenLogprobs found = logprobs_of(logits, 0, 2);
  EXPECT_NEAR(found.logprob, std::log(0.2), 1e-6);
  ASSERT_EQ(found.top.size(), 2u);
  EXPECT_EQ(found.top[0].token, 1);
  EXPECT_NEAR(found.top[1].logprob, std::log(0.3), 1e-6);
  EXPECT_EQ(logprobs_of(logits, 0, 64).top.size(), 3u);
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

TEST(StopFilter, WhatIsNotShownIsMatchedAndNeverComesOut) {
  StopFilter filter({"a<end>b"});
  EXPECT_EQ(filter.push("xa"), "x");
  EXPECT_EQ(filter.push("<end>", false), "");
  EXPECT_EQ(filter.push("c"), "ac");
  EXPECT_EQ(filter.push("a"), "");
  EXPECT_EQ(filter.push("<end>", false), "");
  EXPECT_EQ(filter.push("bz"), "");
  EXPECT_TRUE(filter.stopped());
  EXPECT_EQ(filter.stop(), "a<end>b");
  EXPECT_EQ(filter.cut(), std::string("xa<end>c").size());
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
  try {
    Generation(model_, tokenizer_, 5, {10, 11, 12, 13, 14}, options_);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kResourceExhausted);
    EXPECT_EQ(error.field(), kContextFull);
    EXPECT_EQ(error.expected() + " " + error.found(), "10 10");
  }

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

TEST_F(GenerationTest, OfAStopStringNoTokenIsKept) {
  // What a token has before the stop string is encoded anew.
  for (const auto& [text, stop, kept] : {std::tuple{"Hello there, you two", " there", "Hello"},
                                         {"Hello there", "Hell", ""},
                                         {"Hello there, you two", "ere, yo", "Hello th"},
                                         {"naïve \U0001F44D end", "end", "naïve \U0001F44D "},
                                         {"one \U0001F44D two", "\U0001F44D", "one "},
                                         {"the nev us end", "us", "the nev "}}) {
    said_.clear();
    computed_.clear();
    options_.stop = {"never", stop};
    Generation generation(model_, tokenizer_, 7, {10, 11}, options_);
    const std::vector<int32_t> tokens = tokenizer_->encode(text, false);
    size_t next = 0, cached = 7;
    for (auto rows = generation.next_rows(8); !rows.empty(); rows = generation.next_rows(8)) {
      computed_.resize(cached - 7);
      computed_.insert(computed_.end(), rows.begin(), rows.end());
      generation.take(logits_for(tokens[std::min(next++, tokens.size() - 1)]));
      cached = size_t(generation.position());
    }
    computed_.resize(cached - 7);
    const GenerateResult result = generation.finish();
    EXPECT_EQ(result.text, kept) << stop;
    EXPECT_EQ(said_, kept);
    EXPECT_EQ(result.stop, stop);
    EXPECT_EQ(result.finish_reason, FinishReason::kStop);
    EXPECT_EQ(tokenizer_->decode(result.tokens), kept) << stop;
    std::vector<int32_t> expected = {10, 11};
    expected.insert(expected.end(), result.tokens.begin(), result.tokens.end());
    EXPECT_EQ(computed_, expected) << stop;
  }
}

TEST_F(GenerationTest, WhereAStopStringCountsIsTheCallersToSay) {
  // The second "you" counts, and it is found when there is more text already.
  std::string heard;
  options_.stop = {"Hello"};
  options_.find_stop = [&](std::string_view piece) -> std::optional<StopFound> {
    heard += piece;
    const size_t second = heard.find("you", heard.find("you") + 1);
    return heard.ends_with("know") ? std::optional(StopFound{second, "you"}) : std::nullopt;
  };
  Generation generation(model_, tokenizer_, 0, {10}, options_);
  const GenerateResult result = run(generation, 8, "Hello you, do you know me", 2);
  EXPECT_EQ(result.text, "Hello you, do ");
  EXPECT_EQ(said_, "Hello you, do you know");
  EXPECT_EQ(result.stop, "you");
  EXPECT_EQ(result.finish_reason, FinishReason::kStop);
  EXPECT_EQ(tokenizer_->decode(result.tokens), result.text);
  EXPECT_EQ(generation.position(), 1 + int(result.tokens.size()));
}

TEST_F(GenerationTest, EachTokenIsToldBeforeItsTextWithTheTextThatItMakes) {
  options_.logprobs = 2;
  std::string joined;
  std::vector<size_t> begins;
  options_.on_token = [&](const TokenLogprobs& token) {
    EXPECT_EQ(said_.size(), token.begin);
    begins.push_back(token.begin);
    if (token.token != 2) joined += token.text;
    EXPECT_EQ(token.top.size(), 2u);
    EXPECT_EQ(token.top[0].token, token.token);
  };
  Generation generation(model_, tokenizer_, 0, {10}, options_);
  const GenerateResult result = run(generation, 8, "Hello there, you two", 2);
  EXPECT_EQ(joined, result.text);
  EXPECT_EQ(begins.size(), result.tokens.size());
  EXPECT_EQ(begins.back(), result.text.size());
  EXPECT_EQ(result.logprobs.size(), result.tokens.size());
}

TEST_F(GenerationTest, AStopStringMayBeASpecialTokensText) {
  options_.stop = {"<|im_start|>"};
  Generation generation(model_, tokenizer_, 0, {10}, options_);
  const GenerateResult result = run(generation, 8, "Hello<|im_start|>", 2);
  EXPECT_EQ(result.text, "Hello");
  EXPECT_EQ(tokenizer_->decode(result.tokens), "Hello");
  EXPECT_EQ(result.generated, int(result.tokens.size()) + 1);
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
