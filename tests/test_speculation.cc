// Guesses of what an answer says next: where they come from, how many are made, and that no bit of an answer depends on them.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "engine/speculation.h"
#include "store_fixture.h"
#include "tiny_model.h"
#include "torpor/engine.h"
#include "torpor/generate.h"
#include "torpor/store.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;
using testing::TemporaryDirectory;
using Tokens = std::vector<int32_t>;

constexpr int kVocabulary = 1000;

SuffixLookup lookup_of(const Tokens& before, const Tokens& answer) {
  SuffixLookup lookup(before);
  for (const int32_t token : answer) lookup.push(token);
  return lookup;
}

TEST(SuffixLookup, ThreeTokensThatWereThereAreGoneOnWithAsTheyWereThen) {
  const Tokens before = {1, 2, 3, 4, 5, 6, 7};
  EXPECT_EQ(lookup_of(before, {9, 2, 3}).length(), 0);
  const SuffixLookup lookup = lookup_of(before, {9, 2, 3, 4});
  ASSERT_EQ(lookup.length(), 3);
  EXPECT_EQ(lookup.following(0), 5);
  EXPECT_EQ(lookup.following(2), 7);
}

TEST(SuffixLookup, TheLongestRepetitionIsFollowedAndOfEqualOnesTheLatest) {
  const Tokens before = {1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 2, 3, 4, 70, 8, 3, 4};
  EXPECT_EQ(lookup_of(before, {1, 2, 3, 4}).following(0), 50);
  EXPECT_EQ(lookup_of(before, {9, 2, 3, 4}).following(0), 60);
  EXPECT_EQ(lookup_of(before, {5, 2, 3, 4}).following(0), 70);
}

TEST(SuffixLookup, ARepetitionGrowsAndEndsWithTheFirstTokenThatDiffers) {
  const Tokens before = {1, 2, 3, 4, 5, 6, 7};
  EXPECT_EQ(lookup_of(before, {1, 2, 3, 4, 5, 6}).length(), 6);
  EXPECT_EQ(lookup_of(before, {1, 2, 3, 4, 5, 9}).length(), 0);
}

TEST(SuffixLookup, WhatRepeatsItselfGoesOnWithItself) {
  const SuffixLookup lookup = lookup_of({7, 1, 2}, {1, 2, 1});
  ASSERT_EQ(lookup.length(), 3);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(lookup.following(i), i % 2 == 0 ? 2 : 1) << i;
}

TEST(SuffixLookup, FindsWhatSearchingAllPlacesFinds) {
  uint32_t state = 1;
  Tokens tokens;
  SuffixLookup lookup(tokens);
  for (int i = 0; i < 3000; ++i) {
    state = state * 1664525u + 1013904223u;
    tokens.push_back(int32_t((state >> 24) % 6));
    lookup.push(tokens.back());
    const auto ends_as = [&](size_t place) {
      size_t same = 0;
      while (same < place && tokens[place - same - 1] == tokens[tokens.size() - same - 1]) ++same;
      return int(same);
    };
    int longest = 0;
    for (size_t place = 1; place < tokens.size(); ++place) longest = std::max(longest, ends_as(place));
    if (longest < SuffixLookup::kShortest) longest = 0;
    ASSERT_EQ(lookup.length() > 0, longest > 0) << i;
    ASSERT_LE(lookup.length(), longest);
  }
}

TEST(Speculation, TheLongerARepetitionTheMoreIsGuessed) {
  Tokens before;
  for (int32_t token = 0; token < 100; ++token) before.push_back(token);
  Speculation speculation(before);
  std::vector<size_t> guessed;
  for (int32_t token = 10; token < 60; ++token) {
    speculation.push(token);
    const Tokens guesses = speculation.guess(100, 0.35, kVocabulary);
    for (size_t i = 0; i < guesses.size(); ++i) EXPECT_EQ(guesses[i], token + 1 + int32_t(i));
    guessed.push_back(guesses.size());
  }
  EXPECT_EQ(guessed[1], 0u) << "two tokens are no repetition";
  EXPECT_GT(guessed[8], guessed[1]);
  EXPECT_GT(guessed[48], guessed[8]);
  EXPECT_LE(guessed[49], size_t(Speculation::kMostGuesses));
  EXPECT_EQ(speculation.guess(3, 0.35, kVocabulary).size(), 3u);
  EXPECT_LT(speculation.guess(100, 0.9, kVocabulary).size(), guessed[49]);
  EXPECT_TRUE(speculation.guess(100, 1, kVocabulary).empty()) << "a row costs as much as a token";
  EXPECT_EQ(speculation.guess(100, 0.35, 62).size(), 2u) << "59 was the last; 62 is no token";
}

TEST(Speculation, WhereRepetitionsDontGoOnNothingIsGuessed) {
  // Five tokens come again and again, and each time something else follows.
  Speculation speculation({});
  size_t guessed = 0;
  for (int32_t i = 0; i < 200; ++i) {
    for (const int32_t token : {1, 2, 3, 4, 5, 100 + i}) {
      speculation.push(token);
      if (i >= 20 && token == 5) guessed += speculation.guess(100, 0.35, kVocabulary).size();
    }
  }
  EXPECT_EQ(guessed, 0u);
}

TEST(ShareGuesses, NothingIsGuessedBesideAPromptAndNobodyWaitsLongForTheGuessesOfOthers) {
  // What each turn would guess.
  const std::vector<int> wanted = {9, 0, 12, 3};
  std::vector<int> asked(wanted.size());
  const auto guess = [&](size_t i, int most) { return std::min(asked[i] = most, wanted[i]); };
  EXPECT_EQ(share_guesses(std::vector<int>{0, 0, 0, 0}, guess), (std::vector<int>{1, 0, 1, 1})) << "one gains nothing: four rows more";
  EXPECT_EQ(share_guesses(std::vector<int>{0, -1, 0, 0}, guess), (std::vector<int>{9, 0, 9, 3})) << "all that decode gain";
  EXPECT_EQ(share_guesses(std::vector<int>{0, -1, -1, -1}, guess), (std::vector<int>{9, 0, 0, 0}));
  EXPECT_EQ(share_guesses(std::vector<int>{0, 0, 7, 0}, guess), (std::vector<int>{0, 0, 0, 0})) << "beside a prompt";
  EXPECT_EQ(asked[0], 0) << "what was guessed before the prompt came is forgotten";
}

TEST(RowCostTest, IsWhatStepsWithGuessesTookLongerThanStepsWithout) {
  RowCost cost;
  EXPECT_GT(cost.of(1), 0.1);
  EXPECT_GT(cost.of(8), cost.of(1)) << "rows of eight turns are cheap already";
  for (int i = 0; i < 100; ++i) {
    cost.took(1, 0, 0.010);
    cost.took(1, 4, 0.012);
    cost.took(2, 0, 0.010);
    cost.took(2, 2, 0.030);
  }
  EXPECT_LT(cost.of(1), 0.1);
  EXPECT_GT(cost.of(2), 0.8);
  // What was measured is forgotten while nothing is guessed.
  const double first = RowCost().of(2);
  for (int i = 0; i < 1000; ++i) cost.took(2, 0, 0.010);
  EXPECT_NEAR(cost.of(2), first, 0.02);
  EXPECT_EQ(cost.of(RowCost::kMostRows), 1);
}

// ---- on a model

class EngineSpeculation : public ::testing::Test {
 protected:
  explicit EngineSpeculation(std::string format = "f32") : format_(std::move(format)) {
    const bool biased = format_.find("bias-free") != std::string::npos;
    testing::write_tiny_model(model_, biased ? testing::TinyAttention::kBiased : testing::TinyAttention::kPlain);
  }
  EngineOptions options(const std::string& store) {
    EngineOptions made;
    made.model = model_.string();
    made.store = directory_.path() / store;
    made.durability = Durability::kRename;
    made.kv_format = KvFormat::parse(format_).value();
    return made;
  }

  const std::string format_;
  const TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  const fs::path model_ = directory_.path() / "model";
};

/// A turn whose answer says often what was said before: of 600 tokens three are likely, at several temperatures. In one of
/// three answers a single token is, whatever the model, so that guesses are sure enough at any cost of a row.
TurnRequest repetitive(const std::string& agent, uint64_t seed) {
  TurnRequest turn;
  turn.agent = agent;
  turn.prompt = "the fox " + std::to_string(seed);  // one chunk, whatever the pace
  turn.raw = true;
  turn.generate.max_tokens = 30 + int(seed % 7) * 10;
  const float first = seed % 3 == 0 ? 3000 : 300;
  turn.generate.sampling = {.temperature = float(seed % 4) * 0.5f, .seed = seed, .logit_bias = {{64, first}, {65, 297}, {66, 297}}};
  if (seed % 5 == 1) turn.generate.sampling.frequency_penalty = 0.05f;
  if (seed % 5 == 2) turn.generate.logprobs = 2;
  return turn;
}

void expect_same_rows(const fs::path& a, const fs::path& b, const std::string& agent) {
  const LoadedAgent one = Store(a).load_agent_cache(agent), other = Store(b).load_agent_cache(agent);
  ASSERT_EQ(one.tokens, other.tokens) << agent;
  ASSERT_EQ(one.snapshot.n_runs(), other.snapshot.n_runs()) << agent;
  for (size_t i = 0; i < one.snapshot.n_runs(); ++i) {
    EXPECT_TRUE(std::ranges::equal(one.snapshot.run_bytes(i), other.snapshot.run_bytes(i))) << agent << ", run " << i;
  }
}

class OfFormat : public EngineSpeculation, public ::testing::WithParamInterface<const char*> {
 protected:
  OfFormat() : EngineSpeculation(GetParam()) {}
};

TEST_P(OfFormat, AnswersLogprobsAndSavedRowsAreThoseOfOneTokenAtATime) {
  Engine guesses(options("guesses")), plain(options("plain"));
  int proposed = 0, accepted = 0;
  for (uint64_t seed = 0; seed < 25; ++seed) {
    const std::string agent = "agent" + std::to_string(seed % 3);  // of many turns, so that rows reach over several runs
    TurnRequest turn = repetitive(agent, seed);
    const TurnResult one = guesses.turn(turn);
    turn.generate.speculate = false;
    const TurnResult other = plain.turn(turn);
    ASSERT_EQ(one.text, other.text) << seed;
    ASSERT_EQ(one.finish_reason, other.finish_reason) << seed;
    ASSERT_EQ(one.tokens.generated, other.tokens.generated) << seed;
    ASSERT_EQ(one.logprobs.size(), other.logprobs.size()) << seed;
    for (size_t i = 0; i < one.logprobs.size(); ++i) {
      ASSERT_EQ(one.logprobs[i].token, other.logprobs[i].token);
      ASSERT_EQ(one.logprobs[i].logprob, other.logprobs[i].logprob);
    }
    ASSERT_EQ(other.tokens.proposed, 0);
    ASSERT_LE(one.tokens.accepted, one.tokens.proposed);
    proposed += one.tokens.proposed;
    accepted += one.tokens.accepted;
  }
  EXPECT_GT(accepted, 0);
  const EngineWork work = guesses.work();
  EXPECT_EQ(work.accepted_tokens, accepted);
  EXPECT_EQ(work.accepted_tokens + work.rejected_tokens, proposed);
  EXPECT_EQ(work.answer_tokens, plain.work().answer_tokens);
  EXPECT_EQ(work.passes + accepted, plain.work().passes) << "each token that was guessed rightly saves a pass";
  for (const std::string agent : {"agent0", "agent1", "agent2"}) {
    EXPECT_EQ(guesses.next_logits(agent), plain.next_logits(agent));
    expect_same_rows(directory_.path() / "guesses", directory_.path() / "plain", agent);
  }
}

INSTANTIATE_TEST_SUITE_P(All, OfFormat,
                         ::testing::Values("f32", "f16", "bf16", "q8 group 32 f16", "q8,4 group 32 f16 bias-free rotated",
                                           "q4 group 32 f32 rotated"),
                         [](const auto& format) {
                           std::string name = format.param;
                           std::replace_if(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
                           return name;
                         });

TEST_F(EngineSpeculation, TwoHundredSeedsGiveTheSameTexts) {
  Engine engine(options("store"));
  int accepted = 0;
  for (uint64_t seed = 100; seed < 300; seed += testing::every()) {
    TurnRequest turn = repetitive("", seed);
    turn.save = SaveMode::kNo;
    const TurnResult one = engine.turn(turn);
    turn.generate.speculate = false;
    ASSERT_EQ(one.text, engine.turn(turn).text) << seed;
    accepted += one.tokens.accepted;
  }
  EXPECT_GT(accepted, 0);
}

TEST_F(EngineSpeculation, TurnsThatAreComputedTogetherAreGuessedTogether) {
  Engine together(options("together")), plain(options("plain"));
  std::vector<TurnResult> results(3);
  std::barrier arrived(3);
  std::vector<std::thread> threads;
  const auto asked = [](size_t i) {
    TurnRequest turn = repetitive("agent" + std::to_string(i), i * 4);  // greedy
    turn.generate.max_tokens = 200;
    turn.save = SaveMode::kNo;
    return turn;
  };
  for (size_t i = 0; i < results.size(); ++i) {
    threads.emplace_back([&, i] {
      TurnRequest turn = asked(i);
      turn.generate.on_prefill = [&, first = true](int, int) mutable {
        if (std::exchange(first, false)) arrived.arrive_and_wait();  // all are at work at once
      };
      results[i] = together.turn(turn);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < results.size(); ++i) {
    TurnRequest turn = asked(i);
    turn.generate.speculate = false;
    EXPECT_EQ(results[i].text, plain.turn(turn).text);
    EXPECT_GT(results[i].tokens.accepted, 0);
    EXPECT_EQ(together.next_logits(turn.agent), plain.next_logits(turn.agent));
  }
}

TEST_F(EngineSpeculation, ATokenThatAFilterForbidsIsNeverTakenFromAGuess) {
  // Every fourth token must be another one than the three that are likely.
  class EveryFourth : public TokenFilter {
   public:
    void allow(std::span<uint32_t> words) override {
      std::ranges::fill(words, 0);
      if (count_ % 4 == 3) {
        words[70 / 32] |= 1u << (70 % 32);
      } else {
        for (const int token : {64, 65, 66}) words[size_t(token) / 32] |= 1u << (token % 32);
      }
    }
    void accept(int32_t token) override {
      EXPECT_EQ(token == 70, count_ % 4 == 3);
      ++count_;
    }

   private:
    int count_ = 0;
  };
  Engine engine(options("store"));
  int accepted = 0;
  for (uint64_t seed = 0; seed < 6; ++seed) {
    TurnRequest turn = repetitive("", seed);
    turn.save = SaveMode::kNo;
    turn.generate.filter = std::make_shared<EveryFourth>();
    const TurnResult one = engine.turn(turn);
    turn.generate.filter = std::make_shared<EveryFourth>();
    turn.generate.speculate = false;
    ASSERT_EQ(one.text, engine.turn(turn).text) << seed;
    accepted += one.tokens.accepted;
  }
  EXPECT_GT(accepted, 0);
}

TEST_F(EngineSpeculation, GuessesNeverFillTheModelsContextNorGoBeyondTheLongestAnswer) {
  Engine guesses(options("guesses")), plain(options("plain"));
  for (const int most : {1, 2, 3, 5, 8, 13, 100}) {
    TurnRequest turn = repetitive("agent", 4);  // greedy
    turn.generate.max_tokens = most;
    const TurnResult one = guesses.turn(turn);
    turn.generate.speculate = false;
    EXPECT_EQ(one.tokens.generated, most);
    EXPECT_EQ(one.text, plain.turn(turn).text);
  }
  TurnRequest turn = repetitive("agent", 8);
  turn.generate.max_tokens = 5000;
  const TurnResult one = guesses.turn(turn);
  turn.generate.speculate = false;
  const TurnResult other = plain.turn(turn);
  EXPECT_EQ(one.finish_reason, FinishReason::kLength);
  EXPECT_EQ(one.text, other.text);
  EXPECT_EQ(one.tokens.context, other.tokens.context);
  EXPECT_EQ(one.tokens.context, 4096);
  EXPECT_GT(one.tokens.accepted, 0);
}

}  // namespace
}  // namespace torpor
