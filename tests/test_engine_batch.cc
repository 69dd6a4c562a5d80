// Turns that are computed together: no bit of theirs depends on it. Texts, tokens and logits of concurrent turns are compared with
// those of the same turns one after the other, for every KV format, with cancelled turns among them and in too little memory.

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <cmath>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "engine/generation.h"
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

/// Tokens that a turn computes again rather than wait for them.
constexpr int kNotWorthWaiting = 16;

std::string words(std::mt19937& random, int n) {
  static const char* const kWords[] = {"the", "quick", "fox", "jumps", "over", "return", "null", "range", "lazy", "dog"};
  std::string text;
  for (int i = 0; i < n; ++i) text.append(i == 0 ? "" : " ").append(kWords[random() % 10]);
  return text;
}

class EngineBatch : public ::testing::Test {
 protected:
  explicit EngineBatch(testing::TinyAttention kind = testing::TinyAttention::kPlain)
      : EngineBatch([kind](const fs::path& model) { testing::write_tiny_model(model, kind); }) {}
  explicit EngineBatch(const std::function<void(const fs::path&)>& write_model) { write_model(model_); }

  EngineOptions options(const std::string& store, const std::string& kv = "") {
    EngineOptions made;
    made.model = model_.string();
    made.store = directory_.path() / store;
    made.durability = Durability::kRename;
    if (!kv.empty()) made.kv_format = KvFormat::parse(kv).value();
    return made;
  }

  const TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  const fs::path model_ = directory_.path() / "model";
};

TurnRequest request(const std::string& agent, const std::string& prompt, int max_tokens, uint64_t seed) {
  TurnRequest turn;
  turn.agent = agent;
  turn.prompt = prompt;
  turn.raw = true;
  turn.save = SaveMode::kNo;
  turn.generate.max_tokens = max_tokens;
  turn.generate.sampling = {.temperature = 1, .top_p = 1, .seed = seed};
  return turn;
}

/// One way of many to choose tokens, with stop strings or without.
void choose_by_chance(GenerateOptions& generate, std::mt19937& random, bool stops) {
  SamplingOptions& sampling = generate.sampling;
  switch (random() % 8) {
    case 0: sampling.temperature = 0; break;
    case 1: sampling.top_k = 1 + int(random() % 20); break;
    case 2: sampling.min_p = 0.05f; break;
    case 3: sampling.top_p = 0.8f; break;
    case 4:
      sampling.repetition_penalty = 1.3f;
      sampling.penalty_context = int(random() % 3) * 40;
      break;
    case 5:
      sampling.presence_penalty = 1.5f;
      sampling.frequency_penalty = 0.5f;
      break;
    case 6: sampling.logit_bias = {{int32_t(random() % 600), 3}, {int32_t(random() % 600), -INFINITY}}; break;
    default:
      // Few letters, so that what was said comes again, and is guessed: rightly or not.
      sampling.logit_bias = {{64, 60}, {65, 57}, {66, 57}};
      break;
  }
  if (random() % 2 == 0) generate.logprobs = int(random() % 4);
  if (!stops || random() % 3 == 0) return;
  if (random() % 2 == 0) {
    generate.stop = {"zz", std::string(1, "aeiot"[random() % 5])};
    return;
  }
  // An answer of two letters, a token each, so that a stop string of several tokens comes.
  constexpr int32_t kA = 64, kB = 65;
  sampling = {.temperature = 1, .seed = sampling.seed, .logit_bias = {{kA, 60}, {kB, 60}}};
  generate.stop = {"abba", "baab", "aaaa", "bbbb"};
}

/// A turn as it was asked for, and what came of it.
struct Said {
  TurnRequest request;
  bool given_up = false;
  std::string text, stop;
  std::vector<TokenLogprobs> logprobs;
  int prefilled = 0, generated = 0, context = 0;
  std::vector<float> logits;  ///< afterwards
};

/// `threads` agents that each have `turns` turns of random length, at once. With `ends` some are cancelled or given up on
/// the way; with `stops` some end at a stop string.
std::vector<std::vector<Said>> talk_at_once(Engine& engine, int threads, int turns, unsigned seed, bool ends = true,
                                            bool stops = true) {
  std::vector<std::vector<Said>> said{size_t(threads)};
  std::barrier arrived(threads);
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i) {
    running.emplace_back([&, i] {
      std::mt19937 random(seed + unsigned(i));
      for (int t = 0; t < turns; ++t) {
        Said one;
        one.request = request("agent" + std::to_string(i), words(random, 5 + int(random() % 160)), 2 + int(random() % 24) + (t == 0 ? 250 : 0), random());
        choose_by_chance(one.request.generate, random, stops && t > 0);
        std::atomic<bool> cancel{false};
        int left = random() % 3 == 0 && ends ? 1 + int(random() % 8) : 1000;  // pieces of text that are heard
        one.given_up = left < 1000 && random() % 2 == 0;
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
          one.text = result.text;
          one.stop = result.stop;
          one.logprobs = result.logprobs;
          one.prefilled = result.tokens.prefilled;
          one.generated = result.tokens.generated;
          one.context = result.tokens.context;
          // Its four tokens are gone, and no others.
          if (one.stop.size() == 4) EXPECT_EQ(one.context, result.tokens.prompt + one.generated - 4);
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

bool same(const std::vector<TokenLogprobs>& a, const std::vector<TokenLogprobs>& b) {
  const auto equal = [](const TokenLogprob& x, const TokenLogprob& y) {
    return x.token == y.token && x.logprob == y.logprob && x.text == y.text;
  };
  return std::ranges::equal(a, b, [&](const TokenLogprobs& x, const TokenLogprobs& y) {
    return equal(x, y) && x.begin == y.begin && std::ranges::equal(x.top, y.top, equal);
  });
}

/// How many turns ended at a stop string of at least `size` bytes.
int64_t stopped(const std::vector<std::vector<Said>>& said, size_t size = 1) {
  int64_t count = 0;
  for (const auto& turns : said) {
    count += std::ranges::count_if(turns, [&](const Said& one) { return one.stop.size() >= size; });
  }
  return count;
}

/// The same turns one by one, token by token.
void expect_same_alone(Engine& engine, const std::vector<std::vector<Said>>& said) {
  for (const std::vector<Said>& turns : said) {
    for (const Said& one : turns) {
      if (one.given_up) continue;
      TurnRequest again = one.request;
      again.generate.max_tokens = std::max(one.generated, 1);
      again.generate.speculate = false;
      const TurnResult result = engine.turn(again);
      ASSERT_EQ(result.text, one.text) << one.request.agent;
      ASSERT_EQ(result.stop, one.stop) << one.request.agent;
      ASSERT_TRUE(same(result.logprobs, one.logprobs)) << one.request.agent;
      ASSERT_EQ(result.tokens.context, one.context) << one.request.agent;
      ASSERT_EQ(engine.next_logits(one.request.agent), one.logits) << one.request.agent;
    }
  }
}

/// The parameter is a format's whole name: where keys lack the bias of their projection, the model has one.
class OfFormat : public EngineBatch, public ::testing::WithParamInterface<const char*> {
 protected:
  OfFormat() : EngineBatch(attention_of(GetParam())) {}
  static testing::TinyAttention attention_of(const std::string& format) {
    return format.find("bias-free") != std::string::npos ? testing::TinyAttention::kBiased : testing::TinyAttention::kPlain;
  }
};

TEST_P(OfFormat, ConcurrentTurnsHaveTheTokensAndLogitsOfSingleOnes) {
  EngineOptions together = options("together", GetParam());
  together.max_stall_ms = 1;  // chunks of many sizes
  Engine engine(together);
  const auto said = talk_at_once(engine, 6, 3, 11);
  EXPECT_GE(engine.work().most_turns, 2);
  EXPECT_GT(stopped(said), 0);
  Engine alone(options("alone", GetParam()));
  expect_same_alone(alone, said);
  EXPECT_EQ(alone.work().most_turns, 1);
  EXPECT_EQ(alone.work().accepted_tokens + alone.work().rejected_tokens, 0);
  alone.turn(request("one", "the quick fox", 1, 1));
  alone.save_all();
  EXPECT_EQ(Store(directory_.path() / "alone").agent_info("one").identity.kv, GetParam());
}

std::string name_of(const ::testing::TestParamInfo<const char*>& format) {
  std::string name = format.param;
  std::replace_if(name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, OfFormat,
                         ::testing::Values("f32", "f16", "bf16", "q8 group 32 f16", "q4 group 32 f32 rotated",
                                           "q8 group 32 f16 bias-free", "q8,4 group 32 f16 bias-free rotated",
                                           "q4 group 32 f16 bias-free rotated"),
                         name_of);

TEST_P(OfFormat, TurnsThatGiveTheirMemoryToOthersComputeNothingTwice) {
  EngineOptions tight = options("tight", GetParam());
  tight.max_stall_ms = 1;
  {
    Engine engine(options("size", GetParam()));
    engine.turn(request("one", "the quick fox", 1, 1));
    tight.memory_budget = size_t(engine.memory_usage().kv_bytes) * 7;  // runs, of six agents of two to four
  }
  std::vector<std::vector<Said>> said;
  {
    Engine engine(tight);
    std::atomic<bool> over{false};
    std::thread monitor([&] {
      while (!over) {
        const MemoryUsage usage = engine.memory_usage();
        EXPECT_LE(usage.kv_bytes, usage.budget);
        std::this_thread::yield();
      }
    });
    said = talk_at_once(engine, 6, 4, 23, false, false);
    over = true;
    monitor.join();
    const EngineWork work = engine.work();
    EXPECT_GT(work.put_aside, 0);
    int64_t prompts = 0, answers = 0;
    for (const std::vector<Said>& turns : said) {
      for (const Said& one : turns) prompts += one.prefilled, answers += one.generated;
    }
    EXPECT_EQ(work.prompt_tokens, prompts);
    EXPECT_EQ(work.answer_tokens, answers);
  }
  Engine alone(options("alone", GetParam()));
  expect_same_alone(alone, said);
}

/// Of a model with recurrent layers, whose states go with the rows.
class OfStates : public EngineBatch {
 protected:
  OfStates() : EngineBatch(testing::write_tiny_lfm2) {}
};

TEST_F(OfStates, ConcurrentTurnsHaveTheTokensAndLogitsOfSingleOnes) {
  EngineOptions together = options("together");
  together.max_stall_ms = 1;
  Engine engine(together);
  const auto said = talk_at_once(engine, 6, 3, 11);
  EXPECT_GE(engine.work().most_turns, 2);
  EXPECT_GT(stopped(said), 0);
  Engine alone(options("alone"));
  expect_same_alone(alone, said);
}

TEST_F(OfStates, TurnsThatGiveTheirMemoryToOthersHaveTheTokensAndLogitsOfSingleOnes) {
  EngineOptions tight = options("tight");
  tight.max_stall_ms = 1;
  {
    Engine engine(options("size"));
    engine.turn(request("one", "the quick fox", 1, 1));
    tight.memory_budget = size_t(engine.memory_usage().kv_bytes) * 7;
  }
  std::vector<std::vector<Said>> said;
  {
    Engine engine(tight);
    said = talk_at_once(engine, 6, 4, 23, false, false);
    EXPECT_GT(engine.work().put_aside, 0);
  }
  Engine alone(options("alone"));
  expect_same_alone(alone, said);
}

TEST_F(EngineBatch, AStopStringsTokensAreTakenBackFromRowsThatWerePutAsideToo) {
  EngineOptions tight = options("tight");
  tight.max_stall_ms = 1;
  {
    Engine engine(options("size"));
    engine.turn(request("one", "the quick fox", 1, 1));
    tight.memory_budget = size_t(engine.memory_usage().kv_bytes) * 7;
  }
  std::vector<std::vector<Said>> said;
  {
    Engine engine(tight);
    said = talk_at_once(engine, 6, 4, 31, false);
    EXPECT_GT(engine.work().put_aside, 0);
    EXPECT_GT(stopped(said, 4), 0);
  }
  Engine alone(options("alone"));
  expect_same_alone(alone, said);
}

TEST_F(EngineBatch, TurnsThatBeginAlikeComputeTheirCommonPromptOnce) {
  std::mt19937 random(5);
  const std::string common = words(random, 700);
  constexpr int kAgents = 10;
  std::vector<TurnRequest> turns;
  for (int i = 0; i < kAgents; ++i) {
    // Every second one has no name.
    turns.push_back(request(i % 2 == 0 ? "agent" + std::to_string(i) : "", common + " " + words(random, 10), 20, uint64_t(i)));
  }
  std::vector<TurnResult> alone;
  int64_t own = 0;
  {
    Engine engine(options("alone"));
    for (const TurnRequest& turn : turns) alone.push_back(engine.turn(turn));
    own = engine.work().prompt_tokens;
    // What they have in common is shared by those that come one after the other, too.
    ASSERT_LT(own, int64_t(alone[0].tokens.prompt) * 2);
  }
  Engine engine(options("together"));
  std::vector<TurnResult> together(kAgents);
  std::vector<std::thread> threads;
  std::atomic<int> begun{0};
  // The first waits in the middle of its prompt until all others have asked.
  turns[0].generate.on_prefill = [&](int, int) {
    if (begun.exchange(1) != 0) return;
    for (int i = 1; i < kAgents; ++i) {
      threads.emplace_back([&, i] { together[size_t(i)] = engine.turn(turns[size_t(i)]); });
    }
  };
  together[0] = engine.turn(turns[0]);
  for (std::thread& thread : threads) thread.join();
  int64_t computed = 0;
  for (size_t i = 0; i < turns.size(); ++i) {
    EXPECT_EQ(together[i].text, alone[i].text) << i;
    EXPECT_EQ(together[i].tokens.cached + together[i].tokens.prefilled, together[i].tokens.prompt);
    computed += together[i].tokens.prefilled;
  }
  EXPECT_EQ(engine.work().prompt_tokens, computed);
  EXPECT_LE(computed, own + (kAgents - 1) * kNotWorthWaiting);
}

TEST_F(EngineBatch, TurnsOfAnotherSaltTakeNoRowsFromMemoryDiskTurnsUnderWayOrThoseGivenUp) {
  std::mt19937 random(8);
  const auto turn_of = [](const std::string& agent, const std::string& prompt, const std::string& salt) {
    TurnRequest turn = request(agent, prompt, 4, 1);
    turn.salt = salt;
    turn.save = SaveMode::kWait;
    return turn;
  };
  const std::string on_disk = words(random, 700), under_way = words(random, 700), given_up = words(random, 700);
  {
    Engine engine(options("store"));
    EXPECT_EQ(engine.turn(turn_of("ada", on_disk, "")).tokens.cached, 0);
    EXPECT_EQ(engine.turn(turn_of("bea", on_disk, "acme")).tokens.cached, 0);
    EXPECT_EQ(engine.turn(turn_of("", on_disk, "other")).tokens.cached, 0);
    EXPECT_GT(engine.turn(turn_of("", on_disk, "acme")).tokens.cached, 600);

    // Two that begin while a third computes the same.
    TurnRequest first = turn_of("", under_way, "acme");
    TurnResult same, other;
    std::thread same_salt, other_salt;
    first.generate.on_prefill = [&](int, int) {
      if (same_salt.joinable()) return;
      same_salt = std::thread([&] { same = engine.turn(turn_of("", under_way, "acme")); });
      other_salt = std::thread([&] { other = engine.turn(turn_of("", under_way, "fourth")); });
    };
    engine.turn(first);
    same_salt.join();
    other_salt.join();
    EXPECT_GT(same.tokens.cached, 600);
    EXPECT_EQ(other.tokens.cached, 0);

    std::atomic<bool> give_up{false};
    TurnRequest cut = turn_of("", given_up, "acme");
    cut.give_up = &give_up;
    cut.generate.on_text = [&](std::string_view) { give_up = true; };
    EXPECT_THROW(engine.turn(cut), Error);
    EXPECT_EQ(engine.turn(turn_of("", given_up, "fifth")).tokens.cached, 0);
    EXPECT_GT(engine.turn(turn_of("", given_up, "acme")).tokens.cached, 600);
  }
  Engine engine(options("store"));
  EXPECT_EQ(engine.turn(turn_of("", on_disk, "third")).tokens.cached, 0);
  EXPECT_GT(engine.turn(turn_of("", on_disk, "acme")).tokens.cached, 600);
  // An agent keeps its salt, whoever goes on with it, and its forks have it.
  EXPECT_GT(engine.turn(turn_of("bea", "and on", "")).tokens.cached, 600);
  engine.fork("bea", "eve");
  for (const AgentInfo& info : engine.store().list_cached_agents()) {
    EXPECT_EQ(info.lineage.salt, info.agent_id == "ada" ? "" : "acme") << info.agent_id;
    EXPECT_EQ(engine.store().agent_info(info.agent_id).lineage, info.lineage);
  }
  for (const VerifyReport& report : engine.store().verify()) EXPECT_TRUE(report.problems.empty()) << report.agent_id;
}

TEST_F(EngineBatch, ANewAgentIsMadeByOneTurnAlone) {
  Engine engine(options("store"));
  TurnRequest turn = request("ada", "the quick fox", 4, 1);
  turn.presence = TurnRequest::Presence::kThere;
  try {
    engine.turn(turn);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kNotFound);
  }
  turn.presence = TurnRequest::Presence::kNew;
  std::atomic<int> made{0}, taken{0};
  std::barrier together(4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      together.arrive_and_wait();
      try {
        engine.turn(turn);
        ++made;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        EXPECT_EQ(error.field(), kAgentTaken);
        ++taken;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(made, 1);
  EXPECT_EQ(taken, 3);
}

TEST_F(EngineBatch, ATurnThatWaitsForItsReaderHoldsUpNoneThatBeginsAlikeAndNeitherComputesWhatTheOtherHas) {
  std::mt19937 random(6);
  const std::string common = words(random, 700);
  std::vector<TurnRequest> turns;
  for (const char* agent : {"a", "b"}) turns.push_back(request(agent, common + " " + words(random, 10), 20, 1));
  std::vector<TurnResult> alone;
  int own = 0;
  {
    Engine engine(options("alone"));
    for (const TurnRequest& turn : turns) own += alone.emplace_back(engine.turn(turn)).tokens.prefilled;
  }
  EngineOptions slow = options("together");
  slow.max_stall_ms = 1;
  Engine engine(slow);
  // The first one's reader returns once the second has computed more, whose reader returns once the first has gone on.
  std::promise<void> overtaken, went_on;
  TurnResult other;
  std::thread second;
  int first_heard = 0, second_heard = 0;
  turns[0].generate.on_prefill = [&](int, int) {
    if (++first_heard == 2) went_on.set_value();
    if (first_heard > 1) return;
    second = std::thread([&] { other = engine.turn(turns[1]); });
    overtaken.get_future().wait();
  };
  turns[1].generate.on_prefill = [&](int, int) {
    if (++second_heard == 1) overtaken.set_value();
    if (second_heard == 2) went_on.get_future().wait();
  };
  const TurnResult first = engine.turn(turns[0]);
  second.join();
  EXPECT_EQ(first.text, alone[0].text);
  EXPECT_EQ(other.text, alone[1].text);
  EXPECT_GT(first.tokens.cached, 0);
  EXPECT_GT(other.tokens.cached, 0);
  EXPECT_LE(first.tokens.prefilled + other.tokens.prefilled, own + kNotWorthWaiting);
}

TEST_F(EngineBatch, APromptWhoseClientIsCutTenTimesIsComputedOnce) {
  std::mt19937 random(8);
  const std::string prompt = words(random, 1500);
  for (const bool named : {true, false}) {
    for (const bool undone : {true, false}) {  // given up, or cancelled
      EngineOptions slow = options(std::string(named ? "named" : "nameless") + (undone ? "-undone" : "-cancelled"));
      slow.max_stall_ms = 1;
      Engine engine(slow);
      if (named) engine.turn(request("a", "the quick fox", 4, 1));
      const int64_t before = engine.work().prompt_tokens;
      std::atomic<bool> cut{false};
      int total = 0, cuts = 0;
      for (bool whole = false; !whole; cuts += whole ? 0 : 1) {
        TurnRequest turn = request(named ? "a" : "", prompt, 4, 2);
        turn.save = SaveMode::kBehind;
        (undone ? turn.give_up : turn.generate.cancel) = &cut;
        cut = false;
        turn.generate.on_prefill = [&](int done, int all) {
          total = std::max(total, all);
          cut = cuts < 10 && done < all;  // after a chunk, of which there may be fewer
        };
        try {
          whole = engine.turn(turn).finish_reason != FinishReason::kCancelled;
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), ErrorCode::kCancelled);
        }
      }
      EXPECT_GE(cuts, 2);
      EXPECT_EQ(engine.work().prompt_tokens - before, total);
      if (named) continue;
      // The client has gone before it heard of the answer, and asks once more.
      TurnRequest again = request("", prompt, 4, 2);
      again.save = SaveMode::kBehind;
      EXPECT_EQ(engine.turn(again).tokens.prefilled, 1);
    }
  }
}

TEST_F(EngineBatch, AfterARestartAPromptThatWasGivenUpGoesOnFromItsWholeSegments) {
  std::mt19937 random(9);
  const std::string prompt = words(random, 700);
  for (const bool saves : {true, false}) {
    int done = 0;
    std::atomic<bool> cut{false};
    const EngineOptions store = options(saves ? "saves" : "does not");
    {
      Engine engine(store);
      TurnRequest turn = request("a", prompt, 4, 2);
      turn.save = saves ? SaveMode::kBehind : SaveMode::kNo;
      turn.give_up = &cut;
      turn.generate.on_prefill = [&](int rows, int) {
        done = rows;
        cut = rows > 300;
      };
      EXPECT_THROW(engine.turn(turn), Error);
      EXPECT_TRUE(engine.agents().empty());
    }
    Engine engine(store);
    EXPECT_EQ(engine.turn(request("a", prompt, 4, 2)).tokens.cached, saves ? done / kSegmentTokens * kSegmentTokens : 0);
  }
}

TEST_F(EngineBatch, AgentsOfSeveralFormatsAreStepped) {
  const std::array formats = {"f32", "q8 group 32 f16"};
  for (size_t i = 0; i < 4; ++i) {
    Engine engine(options("store", formats[i % 2]));
    engine.turn(request("agent" + std::to_string(i), "the quick fox", 3, 1));
    engine.save_all();
  }
  std::vector<std::vector<Said>> said;
  {
    Engine engine(options("store"));
    said = talk_at_once(engine, 4, 2, 5);
    EXPECT_LE(engine.work().most_turns, 2);
    EXPECT_GT(engine.work().turns, engine.work().passes);
  }
  Engine alone(options("store"));
  expect_same_alone(alone, said);
}

TEST(PrefillPaceTest, AStepComputesATokenOfEveryAnswerAndAChunkOfTheFirstAndTheShortestPrompts) {
  PrefillPace pace(Backend::kKernels);
  pace.took(100, 0.25 * 100 / 288);  // 288 rows in the time that there is
  ASSERT_EQ(pace.rows(), 288);
  using Rows = std::vector<int>;
  EXPECT_EQ(pace.share({}), Rows());
  EXPECT_EQ(pace.share(Rows{0, 0, 0}), (Rows{1, 1, 1}));
  EXPECT_EQ(pace.share(Rows{1000}), Rows{288});
  EXPECT_EQ(pace.share(Rows{0, 1000, 0}), (Rows{1, 286, 1}));
  EXPECT_EQ(pace.share(Rows{1000, -1, 0}), (Rows{287, 0, 1}));
  EXPECT_EQ(pace.share(Rows{1000, 900, 800}), (Rows{144, 0, 144}));  // the shortest passes, the first goes on
  EXPECT_EQ(pace.share(Rows{1000, 20, 800}), (Rows{268, 20, 0}));
  EXPECT_EQ(pace.share(Rows{100, 900, 800}), (Rows{100, 0, 188}));
  EXPECT_EQ(pace.share(Rows{1000, 1000}), (Rows{288, 0}));           // first come, first served
  EXPECT_EQ(pace.share(Rows{40, 0, 30, 20, 50}), (Rows{40, 1, 30, 20, 50}));  // short ones that came together
  EXPECT_EQ(pace.share(Rows{100, 90, 80, 70, 60}), (Rows{100, 90, 38, 0, 60}));
  // Those in the background are not read beside others, and answer all the same.
  EXPECT_EQ(pace.share(Rows{1000, 20, 0}, {}, 1), (Rows{287, 0, 1}));
  EXPECT_EQ(pace.share(Rows{0, 1000, 20}, {}, 1), (Rows{1, 267, 20}));
  EXPECT_EQ(pace.share(Rows{20, 20, 20, 20}, {}, 2), (Rows{20, 20, 0, 0}));
  EXPECT_EQ(pace.share(Rows{-1, 1000}, {}, 1), (Rows{0, 288}));
  Rows many(300, 0);
  many.push_back(1000);
  EXPECT_EQ(pace.share(many).back(), PrefillPace::kLeast);
  EXPECT_EQ(pace.share(Rows{0, 1000, 0}, Rows{3, 0, 7}), (Rows{4, 276, 8}));  // guesses take room of the prompt's chunk
  pace.took(1, 100);
  EXPECT_EQ(pace.rows(), PrefillPace::kLeast);
  PrefillPace even(Backend::kMlx);  // where bits depend on the pass
  EXPECT_EQ(even.share(Rows{0, 1000, 20, 0}, Rows{0, 0, 0, 0}), (Rows{1, PrefillPace::kMost, 0, 1}));
  EXPECT_EQ(even.share(Rows{-1, 0, 20}, Rows{0, 0, 0}), (Rows{0, 1, 20}));
  PrefillPace hasty(Backend::kKernels, 0.125);
  hasty.took(100, 0.25 * 100 / 288);
  EXPECT_EQ(hasty.rows(), 144);
}

}  // namespace
}  // namespace torpor
