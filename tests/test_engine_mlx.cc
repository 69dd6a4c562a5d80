// Turns that MLX's backend computes together: each has the tokens and the logits that it has alone, but for the last
// bits. Cancelled turns, turns without memory and turns of several KV formats are among them.

#include <atomic>
#include <barrier>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "store_fixture.h"
#include "tiny_lfm2.h"
#include "tiny_model.h"
#include "torpor/engine.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor {
namespace {

using testing::TemporaryDirectory;
namespace fs = std::filesystem;

/// Of logits that reach 10, and of logarithms of probabilities.
constexpr float kBound = 1e-3f;
/// Between the two likeliest tokens: below it the last bits may choose.
constexpr float kMargin = 1e-4f;

std::string words(std::mt19937& random, int n) {
  static const char* const kWords[] = {"the",    "quick", "fox",   "jumps", "over",
                                       "return", "null",  "range", "lazy",  "dog"};
  std::string text;
  for (int i = 0; i < n; ++i) text.append(i == 0 ? "" : " ").append(kWords[random() % 10]);
  return text;
}

TurnRequest request(const std::string& agent, const std::string& prompt, int max_tokens) {
  TurnRequest turn;
  turn.agent = agent;
  turn.prompt = prompt;
  turn.raw = true;
  turn.save = SaveMode::kNo;
  turn.generate.max_tokens = max_tokens;
  turn.generate.sampling.temperature = 0;
  turn.generate.logprobs = 2;
  return turn;
}

/// A turn as it was asked for, and what came of it.
struct Said {
  TurnRequest request;
  bool given_up = false;
  std::vector<TokenLogprobs> logprobs;
  int prefilled = 0, generated = 0, context = 0;
  std::vector<float> logits;  ///< afterwards
};

class EngineMlx : public ::testing::Test {
 protected:
  explicit EngineMlx(const std::function<void(const fs::path&)>& write_model = [](const fs::path& model) {
    testing::write_tiny_model(model);
  }) {
    write_model(model_);
  }

  EngineOptions options(const std::string& store, const std::string& kv = "") {
    EngineOptions made;
    made.model = model_.string();
    made.store = directory_.path() / store;
    made.durability = Durability::kRename;
    made.compute.backend = Backend::kMlx;
    if (!kv.empty()) made.kv_format = KvFormat::parse(kv).value();
    return made;
  }
  /// With room for seven runs: six agents of two don't fit.
  EngineOptions tight(const std::string& kv = "") {
    EngineOptions made = options("tight", kv);
    Engine engine(options("size", kv));
    engine.turn(request("one", "the quick fox", 1));
    made.memory_budget = size_t(engine.memory_usage().kv_bytes) * 7;
    return made;
  }

  const TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  const fs::path model_ = directory_.path() / "model";
};

/// Words of a prompt: of the first agent, and more of each after it.
struct Words {
  int least, more;
};
constexpr Words kOfAllLengths{3, 37}, kTwoRuns{220, 10};

/// Agents that each have two turns at once. With `ends` some are cancelled or given up.
std::vector<std::vector<Said>> talk_at_once(Engine& engine, int agents, const Words& of, bool ends = true) {
  std::vector<std::vector<Said>> said{size_t(agents)};
  std::barrier arrived(agents);
  std::vector<std::thread> running;
  for (int i = 0; i < agents; ++i) {
    running.emplace_back([&, i] {
      std::mt19937 random(unsigned(50 + i));
      for (int t = 0; t < 2; ++t) {
        Said one;
        const int n = t == 0 ? of.least + of.more * i : 2 + int(random() % 10);
        one.request = request("agent" + std::to_string(i), words(random, n), 20 + int(random() % 30));
        const bool cut = ends && t == 1 && i % 3 > 0;
        one.given_up = cut && i % 3 == 1;
        std::atomic<bool> cancel{false};
        int left = cut ? 3 : 1000;  // pieces of text that are heard
        TurnRequest heard = one.request;
        (one.given_up ? heard.give_up : heard.generate.cancel) = &cancel;
        heard.generate.on_text = [&](std::string_view) { cancel = --left <= 0; };
        bool first = t == 0;
        heard.generate.on_prefill = [&](int, int) {
          if (std::exchange(first, false)) arrived.arrive_and_wait();  // all are at work at once
        };
        try {
          const TurnResult result = engine.turn(heard);
          one.given_up = false;
          one.logprobs = result.logprobs;
          one.prefilled = result.tokens.prefilled;
          one.generated = result.tokens.generated;
          one.context = result.tokens.context;
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), ErrorCode::kCancelled) << error.what();
        }
        if (!one.given_up) one.logits = engine.next_logits(one.request.agent);
        said[size_t(i)].push_back(std::move(one));
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  return said;
}

/// The same turns, one by one.
void expect_near_alone(Engine& engine, const std::vector<std::vector<Said>>& said) {
  for (const std::vector<Said>& turns : said) {
    for (const Said& one : turns) {
      if (one.given_up) continue;
      SCOPED_TRACE(one.request.agent);
      TurnRequest again = one.request;
      again.generate.max_tokens = one.generated;
      const TurnResult alone = engine.turn(again);
      ASSERT_EQ(alone.logprobs.size(), one.logprobs.size());
      bool parted = false;
      for (size_t i = 0; i < one.logprobs.size() && !parted; ++i) {
        const TokenLogprobs& expected = alone.logprobs[i];
        parted = one.logprobs[i].token != expected.token;
        if (parted) {
          EXPECT_LT(expected.top[0].logprob - expected.top[1].logprob, kMargin) << i;
        } else {
          ASSERT_NEAR(one.logprobs[i].logprob, expected.logprob, kBound) << i;
        }
      }
      if (parted) break;  // what follows is another conversation
      EXPECT_EQ(alone.tokens.context, one.context);
      const std::vector<float> logits = engine.next_logits(one.request.agent);
      ASSERT_EQ(logits.size(), one.logits.size());
      for (size_t i = 0; i < logits.size(); ++i) ASSERT_NEAR(one.logits[i], logits[i], kBound) << i;
    }
  }
}

/// The parameter is a format's whole name.
class OfFormat : public EngineMlx, public ::testing::WithParamInterface<const char*> {};

TEST_P(OfFormat, ConcurrentTurnsHaveTheTokensAndLogitsOfSingleOnes) {
  std::vector<std::vector<Said>> said;
  {
    Engine engine(options("together", GetParam()));
    said = talk_at_once(engine, 6, kOfAllLengths);
    EXPECT_GE(engine.work().most_turns, 4);
  }
  Engine alone(options("alone", GetParam()));
  expect_near_alone(alone, said);
  EXPECT_EQ(alone.work().most_turns, 1);
}

TEST_P(OfFormat, TurnsThatGiveTheirMemoryToOthersComputeNothingTwice) {
  std::vector<std::vector<Said>> said;
  {
    Engine engine(tight(GetParam()));
    said = talk_at_once(engine, 6, kTwoRuns, false);
    const EngineWork work = engine.work();
    EXPECT_GT(work.put_aside, 0);
    EXPECT_GE(work.most_turns, 2);
    int64_t prompts = 0, answers = 0;
    for (const std::vector<Said>& turns : said) {
      for (const Said& one : turns) prompts += one.prefilled, answers += one.generated;
    }
    EXPECT_EQ(work.prompt_tokens, prompts);
    EXPECT_EQ(work.answer_tokens, answers);
  }
  Engine alone(options("alone", GetParam()));
  expect_near_alone(alone, said);
}

std::string name_of(const ::testing::TestParamInfo<const char*>& format) {
  std::string name = format.param;
  std::replace_if(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, OfFormat, ::testing::Values("f16", "q8,4 group 32 f16 rotated"), name_of);

/// Of a model with recurrent layers, whose states go with the rows.
class MlxStates : public EngineMlx {
 protected:
  MlxStates() : EngineMlx(testing::write_tiny_lfm2) {}
};

TEST_F(MlxStates, ConcurrentTurnsHaveTheTokensAndLogitsOfSingleOnesInTooLittleMemoryToo) {
  std::vector<std::vector<Said>> said;
  {
    Engine engine(tight());
    said = talk_at_once(engine, 6, kTwoRuns);
    EXPECT_GT(engine.work().put_aside, 0);
    EXPECT_GE(engine.work().most_turns, 2);
  }
  Engine alone(options("alone"));
  expect_near_alone(alone, said);
}

TEST_F(EngineMlx, AnAgentThatSleptAfterATurnInABatchGoesOnAsIfItHadNot) {
  std::vector<std::vector<Said>> said;
  {
    Engine engine(options("store"));
    said = talk_at_once(engine, 4, kOfAllLengths, false);
    EXPECT_GE(engine.work().most_turns, 2);
    engine.save_all();
  }
  Engine engine(options("store"));
  for (const std::vector<Said>& turns : said) {
    EXPECT_EQ(engine.next_logits(turns.back().request.agent), turns.back().logits);  // bit for bit
  }
}

TEST_F(EngineMlx, AgentsOfSeveralFormatsAreSteppedAndEachPassHasOne) {
  const std::vector<std::string> formats = {"f32", "q8 group 32 f16"};
  for (size_t i = 0; i < 4; ++i) {
    Engine engine(options("store", formats[i % 2]));
    engine.turn(request("agent" + std::to_string(i), "the quick fox", 3));
    engine.save_all();
  }
  std::vector<std::vector<Said>> said;
  {
    Engine engine(options("store"));
    said = talk_at_once(engine, 4, kOfAllLengths);
    EXPECT_EQ(engine.work().most_turns, 2);
  }
  Engine alone(options("store"));
  expect_near_alone(alone, said);
}

TEST_F(EngineMlx, APromptIsReadInAPassOfItsOwnWhileAnswersAreComputed) {
  std::mt19937 random(4);
  std::atomic<bool> read{false};
  Engine engine(options("store"));
  TurnRequest prompt = request("b", words(random, 700), 1), answer = request("a", "the quick fox", 3000);
  prompt.generate.cancel = answer.generate.cancel = &read;
  prompt.generate.on_prefill = [&](int, int) { read = true; };
  TurnResult other;
  std::thread reader;
  answer.generate.on_text = [&](std::string_view) {
    if (!reader.joinable()) reader = std::thread([&] { other = engine.turn(prompt); });
  };
  const TurnResult result = engine.turn(answer);
  reader.join();
  EXPECT_EQ(result.finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(other.finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(engine.work().prompt_tokens, result.tokens.prompt + 512);
  EXPECT_EQ(engine.work().most_turns, 1);
}

TEST_F(EngineMlx, TurnsThatBeginAlikeComputeTheirCommonPromptOnce) {
  std::mt19937 random(5);
  const std::string common = words(random, 700);
  constexpr int kAgents = 4, kNotWorthWaiting = 16;
  std::vector<TurnRequest> turns;
  for (int i = 0; i < kAgents; ++i) {
    turns.push_back(request(i % 2 == 0 ? "agent" + std::to_string(i) : "", common + " " + words(random, 10), 10));
  }
  int64_t own = 0;
  {
    Engine engine(options("alone"));
    for (const TurnRequest& turn : turns) own += engine.turn(turn).tokens.prefilled;
  }
  Engine engine(options("together"));
  std::vector<TurnResult> together(kAgents);
  std::vector<std::thread> threads;
  // The first waits in the middle of its prompt until all others have asked.
  turns[0].generate.on_prefill = [&](int, int) {
    if (!threads.empty()) return;
    for (size_t i = 1; i < kAgents; ++i) threads.emplace_back([&, i] { together[i] = engine.turn(turns[i]); });
  };
  together[0] = engine.turn(turns[0]);
  for (std::thread& thread : threads) thread.join();
  int64_t computed = 0;
  for (const TurnResult& result : together) computed += result.tokens.prefilled;
  EXPECT_EQ(engine.work().prompt_tokens, computed);
  EXPECT_LE(computed, own + (kAgents - 1) * kNotWorthWaiting);
}

}  // namespace
}  // namespace torpor
