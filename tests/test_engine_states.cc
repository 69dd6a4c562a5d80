/// Agents of a model with recurrent layers. That they wake, fork and rewind to the bit is in test_engine_kinds.cc.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "agents/rows_aside.h"
#include "store_fixture.h"
#include "tiny_lfm2.h"
#include "torpor/agents.h"
#include "torpor/cache.h"
#include "torpor/engine.h"
#include "torpor/generate.h"
#include "torpor/model.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;

std::string words(int n, int seed) {
  std::string text;
  for (int i = 0; i < n; ++i) text += "w" + std::to_string((i * 7919 + seed * 31) % 97) + " ";
  return text;
}

class EngineStates : public ::testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/torpor-test-XXXXXX";
    root_ = mkdtemp(pattern);
    testing::write_tiny_lfm2(root_ / "model");
  }
  void TearDown() override { fs::remove_all(root_); }

  Engine make(const std::string& store = "store", size_t budget = 0) const {
    EngineOptions options;
    options.model = (root_ / "model").string();
    options.store = root_ / store;
    options.memory_budget = budget;
    return Engine(options);
  }
  static TurnRequest say(const std::string& agent, const std::string& prompt, int max_tokens = 6) {
    TurnRequest turn;
    turn.agent = agent;
    turn.prompt = prompt;
    turn.raw = true;
    turn.generate.max_tokens = max_tokens;
    return turn;
  }
  /// What follows these tokens, computed at once.
  std::vector<float> oracle(const std::vector<int32_t>& tokens) {
    const auto model = Model::load((root_ / "model").string());
    const KvFormat format = model->refined(model->default_kv_format());
    const auto cache = KvCache::create(model->kv_layout(format), format, model->backend(), model->state_layout());
    const ForwardSequence sequence{.tokens = tokens, .kv = cache.get()};
    const mx::array logits = model->forward({&sequence, 1});
    return {logits.data<float>(), logits.data<float>() + logits.size()};
  }
  std::vector<float> oracle(std::vector<int32_t> tokens, int64_t n) {
    tokens.resize(size_t(n));
    return oracle(tokens);
  }
  int state_files(const std::string& store = "store") const {
    int n = 0;
    if (!fs::exists(root_ / store / "states")) return 0;
    for (const auto& entry : fs::recursive_directory_iterator(root_ / store / "states")) n += entry.is_regular_file();
    return n;
  }

  fs::path root_;
};

TEST_F(EngineStates, AnAgentThatIsAwakeWithTheRowsUpToAStateIsForkedRewoundAndPinnedWhole) {
  Engine engine = make();
  for (int i = 0; i < 2; ++i) engine.turn(say("a", words(120, i)));
  const std::vector<int32_t> tokens = engine.tokens("a");
  const int64_t first = ssize(tokens) - 100, second = first - 30, third = second - 30;
  engine.rewind("a", first);
  const auto held = [&](const std::string& id, int64_t n) {
    EXPECT_EQ(engine.tokens(id), std::vector<int32_t>(tokens.begin(), tokens.begin() + n)) << id;
    EXPECT_EQ(engine.next_logits(id), oracle(tokens, n)) << id;
  };
  held("a", first);
  engine.fork("a", "b", std::nullopt);
  held("b", first);
  engine.fork("a", "c", second);
  held("c", second);
  EXPECT_THROW(engine.fork("a", "d", first + 1), Error);
  engine.rewind("a", third);
  held("a", third);
  engine.pin("a", true);
  engine.sleep("a");
  EXPECT_TRUE(is_pinned(engine.store().agent_info("a")));
  held("a", third);
  engine.turn(say("b", words(3, 9)));
  EXPECT_EQ(engine.next_logits("b"), oracle(engine.tokens("b")));
}

TEST_F(EngineStates, ASaveAfterATurnWritesItsRowsAndOneState) {
  Engine engine = make();
  engine.turn(say("a", words(60, 1)));
  std::vector<StateRef> before = engine.store().agent_info("a").states.value();
  for (int turn = 2; turn < 12; ++turn) {
    const TurnResult result = engine.turn(say("a", words(4, turn)));
    EXPECT_EQ(result.tokens.again, 0);
    const AgentInfo info = engine.store().agent_info("a");
    std::vector<int64_t> written;
    for (const StateRef& ref : *info.states) {
      if (std::ranges::find(before, ref) == before.end()) written.push_back(ref.position);
    }
    EXPECT_EQ(written, std::vector<int64_t>{info.cache_size}) << turn << ": the one after the answer";
    EXPECT_LE(info.states->size(), 6u) << turn;
    const int64_t new_tokens = result.tokens.prefilled + result.tokens.generated;
    const int64_t row = 2 * 2 * 32 * 4;  // layers, keys and values, width, f32
    const int64_t state = info.state_bytes / int64_t(info.states->size());
    EXPECT_LE(result.bytes.written, (new_tokens + 256) * row + state + 8192);
    before = *info.states;
  }
}

TEST_F(EngineStates, AnotherAnswerToTheSamePromptGoesOnFromBeforeTheAsking) {
  TurnRequest first, second;
  first.agent = second.agent = "a";
  first.messages = {{"user", words(20, 1)}};
  first.generate.max_tokens = second.generate.max_tokens = 6;
  for (const bool is_long : {false, true}) {
    for (const bool sleeps : {false, true}) {
      const std::string store = "store" + std::to_string(2 * is_long + sleeps);
      Engine engine = make(store);
      const TurnResult answered = engine.turn(first);
      const int64_t end = ssize(engine.tokens("a"));
      second.messages = {first.messages[0], {"assistant", answered.text}, {"user", words(is_long ? 700 : 40, 2)}};
      const TurnResult result = engine.turn(second);
      ASSERT_EQ(result.tokens.cached, end);
      if (sleeps) engine.sleep("a");
      const TurnResult again = engine.turn(second);
      EXPECT_EQ(again.text, result.text);
      if (sleeps && !is_long) {
        EXPECT_EQ(again.tokens.cached, end) << "a state that a short prompt ends with is written nowhere";
        EXPECT_EQ(again.tokens.again, result.tokens.prompt - 1 - end);
      } else {
        EXPECT_GT(again.tokens.cached, result.tokens.prompt - 16) << is_long << sleeps;
      }
      EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
      engine.rewind("a", again.tokens.cached);
      engine.sleep("a");
      EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
      EXPECT_EQ(engine.store().agent_info("a").states->back().position, again.tokens.cached)
          << "whoever is cut there has it";
    }
  }
}

TEST_F(EngineStates, ATurnThatFailsOrIsGivenUpLeavesTheAgentAsItWas) {
  Engine engine = make();
  engine.turn(say("a", words(100, 1)));
  const auto tokens = engine.tokens("a");
  for (const bool cut : {false, true}) {
    TurnRequest request = say("a", words(200, 2));
    if (cut) {  // it begins with other messages, so rows are cut first
      request.raw = false;
      request.prompt.clear();
      request.messages = {{"user", words(200, 3)}};
    }
    std::atomic<bool> give_up = false;
    request.give_up = &give_up;
    request.generate.on_prefill = [&](int done, int) { give_up = done > 100; };
    EXPECT_THROW(engine.turn(request), Error);
    EXPECT_EQ(engine.tokens("a"), tokens);
    EXPECT_EQ(engine.next_logits("a"), oracle(tokens)) << cut;
  }
  engine.turn(say("a", words(5, 4)));
  EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
}

TEST_F(EngineStates, AStopStringsTokensAreTakenBack) {
  Engine engine = make();
  TurnRequest request = say("a", words(40, 1), 40);
  const std::string whole = engine.turn(say("b", words(40, 1), 40)).text;
  ASSERT_GT(whole.size(), 12u);
  request.generate.stop = {whole.substr(8, 3)};
  const TurnResult result = engine.turn(request);
  EXPECT_FALSE(result.stop.empty());
  EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
  engine.turn(say("a", words(5, 4)));
  EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
}

TEST_F(EngineStates, AStopStringCostsNoMoreThanAFewTokensComputedAgain) {
  Engine engine = make();
  const std::string whole = engine.turn(say("b", words(40, 1), 300)).text;
  const size_t at = whole.size() * 3 / 4;
  ASSERT_GT(at, 200u);
  const std::string stop = whole.substr(at, 12);
  const size_t first = whole.find(stop);
  for (const bool found : {false, true}) {
    const std::string id = found ? "found" : "given";
    TurnRequest request = say(id, words(40, 1), 300);
    std::string heard;
    if (found) {
      request.generate.find_stop = [&](std::string_view piece) -> std::optional<StopFound> {
        heard += piece;
        const size_t begin = heard.find(stop);
        return begin == std::string::npos ? std::nullopt : std::optional<StopFound>({begin, stop});
      };
    } else {
      request.generate.stop = {stop};
    }
    const EngineWork before = engine.work();
    const TurnResult result = engine.turn(request);
    EXPECT_EQ(result.stop, stop);
    EXPECT_EQ(result.text, whole.substr(0, first));
    const int64_t computed = engine.work().answer_tokens - before.answer_tokens;
    EXPECT_LE(computed, result.tokens.generated + 40) << id;
    EXPECT_EQ(engine.next_logits(id), oracle(engine.tokens(id)));
    EXPECT_LE(engine.store().agent_info(id).states->size(), 3u) << "none of them stays";
  }
}

TEST_F(EngineStates, GeneratingOverACacheLeavesNoStatesBehind) {
  const std::shared_ptr<Model> model = Model::load((root_ / "model").string());
  CacheExtractor extractor(model, Tokenizer::load((root_ / "model").string()));
  GenerateOptions options;
  options.max_tokens = 60;
  options.stop = {"never to be said"};
  std::unique_ptr<KvCache> cache;
  for (int i = 0; i < 3; ++i) cache = extractor.generate(words(20, i), std::move(cache), options).cache;
  EXPECT_EQ(cache->states().size(), 1u) << "the live one";
  const int kept = cache->length();
  cache->keep_state();
  cache = extractor.generate(words(20, 4), std::move(cache), options).cache;
  EXPECT_EQ(cache->states().size(), 2u);
  EXPECT_EQ(cache->resumable(cache->length() - 1), kept);
}

TEST_F(EngineStates, APromptThatWaitsForAnotherOnesRowsGetsThemToTheToken) {
  Engine engine = make();
  TurnRequest first = say("a", words(700, 1)), second = say("b", words(400, 1) + words(60, 9));
  TurnResult result;
  std::thread other;
  first.generate.on_prefill = [&](int, int) {
    if (!other.joinable()) other = std::thread([&] { result = engine.turn(second); });
  };
  engine.turn(first);
  other.join();
  const std::vector<int32_t> a = engine.tokens("a"), b = engine.tokens("b");
  const auto common = std::ranges::mismatch(a, b).in1 - a.begin();
  EXPECT_EQ(result.tokens.cached, common);
  EXPECT_EQ(result.tokens.again, 0);
  EXPECT_EQ(engine.next_logits("b"), oracle(b));
}

TEST_F(EngineStates, APromptGoesOnFromWhatOthersHaveInMemoryAndOnDisk) {
  const auto chat = [](const std::string& agent, const std::string& question) {
    TurnRequest request;
    request.agent = agent;
    request.messages = {{"system", words(250, 5)}, {"user", question}};
    request.generate.max_tokens = 4;
    return request;
  };
  int system = 0;
  {
    Engine engine = make();
    const TurnResult first = engine.turn(chat("", "one two three"));
    EXPECT_EQ(first.tokens.cached, 0);
    const TurnResult second = engine.turn(chat("b", "another question"));
    system = second.tokens.cached;
    EXPECT_GT(system, 500) << "to the end of the system's part, in memory";
    EXPECT_EQ(engine.next_logits("b"), oracle(engine.tokens("b")));
    const TurnResult again = engine.turn(chat("", "one two three"));
    EXPECT_GT(again.tokens.cached, system) << "the same prompt again";
  }
  EXPECT_GT(state_files(), 0);
  Engine engine = make();
  const TurnResult third = engine.turn(chat("c", "a third one"));
  EXPECT_EQ(third.tokens.cached, system / kSegmentTokens * kSegmentTokens) << "on disk, to the end of a segment";
  EXPECT_EQ(engine.next_logits("c"), oracle(engine.tokens("c")));
}

TEST_F(EngineStates, ManyAgentsUnderASmallBudgetAreAsIfEachWereAlone) {
  const int kAgents = 5;
  Engine engine = make("store", 700'000);
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < kAgents; ++i) engine.turn(say("agent-" + std::to_string(i), words(30 + 10 * i, round * 7 + i)));
  }
  EXPECT_GT(engine.memory_usage().evictions, 0);
  for (int i = 0; i < kAgents; ++i) {
    const std::string id = "agent-" + std::to_string(i);
    EXPECT_EQ(engine.next_logits(id), oracle(engine.tokens(id))) << id;
  }
  for (const VerifyReport& report : engine.store().verify()) EXPECT_TRUE(report.problems.empty());
  engine.finish_saves();
}

TEST_F(EngineStates, RowsThatWaitInAFileComeBackWithTheirStates) {
  using namespace testing;
  const KvSnapshot whole = with_states(make_snapshot(300, small_layout(KvDtype::kF16, 2, 2, 32)), {200, 256});
  auto cache = KvCache::restore(whole, Backend::kKernels);
  const RowsAside aside(Env::posix(), root_, *cache);
  cache.reset();
  EXPECT_GT(aside.bytes(*std::make_shared<KvLedger>(0), Backend::kKernels), 3 * small_state_layout().bytes());
  const auto back = aside.restore(Backend::kKernels)->snapshot(whole.identity);
  EXPECT_TRUE(same(back, whole));
  ASSERT_EQ(back.states.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(back.states[i]->position(), whole.states[i]->position());
    EXPECT_TRUE(std::ranges::equal(back.states[i]->bytes(), whole.states[i]->bytes()));
  }
}

TEST_F(EngineStates, ADamagedStateCostsTheTokensBehindTheOneBefore) {
  std::vector<int32_t> tokens;
  {
    Engine engine = make();
    for (int i = 0; i < 2; ++i) engine.turn(say("a", words(60, i)));
    tokens = engine.tokens("a");
  }
  const auto info = Store(root_ / "store").agent_info("a");
  const std::string last = info.states->back().file;
  fs::resize_file(root_ / "store/states" / last.substr(0, 2) / (last + ".safetensors"), 100);
  Engine engine = make();
  EXPECT_EQ(engine.next_logits("a"), oracle(tokens));
  const TurnResult result = engine.turn(say("a", words(4, 2)));
  ASSERT_TRUE(result.damage);
  EXPECT_NE(result.damage->find(last), std::string::npos);
  EXPECT_GT(result.tokens.again, 0);
  EXPECT_GT(result.tokens.cached, 0) << "from the state before";
  EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
  EXPECT_TRUE(engine.store().verify("a")[0].problems.empty());
}

}  // namespace
}  // namespace torpor
