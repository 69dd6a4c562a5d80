/// Agents of a model whose long windows' rows are kept apart sleep, wake, fork and rewind, and go on as if they had
/// never stopped.

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "store_fixture.h"
#include "tiny_model.h"
#include "torpor/agents.h"
#include "torpor/cache.h"
#include "torpor/engine.h"
#include "torpor/exchange.h"
#include "torpor/generate.h"
#include "torpor/model.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;

constexpr int kWindow = 1024;

std::string words(int n, int seed) {
  std::string text;
  for (int i = 0; i < n; ++i) text += "w" + std::to_string((i * 7919 + seed * 31) % 97) + " ";
  return text;
}

/// The parameter is a KV format's name.
class EngineWindows : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/torpor-test-XXXXXX";
    root_ = mkdtemp(pattern);
    testing::write_tiny_model(root_ / "model", testing::TinyAttention::kPlain, kWindow);
  }
  void TearDown() override { fs::remove_all(root_); }

  Engine make(const std::string& store = "store") const {
    EngineOptions options;
    options.model = (root_ / "model").string();
    options.store = root_ / store;
    options.kv_format = KvFormat::parse(GetParam()).value();
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
  /// What follows the first `n` of these tokens, computed at once.
  std::vector<float> oracle(const std::vector<int32_t>& tokens, int64_t n) {
    const auto model = Model::load((root_ / "model").string());
    const KvFormat format = model->refined(KvFormat::parse(GetParam()).value());
    const auto cache = KvCache::create(model->kv_layout(format), format, model->backend());
    const ForwardSequence sequence{.tokens = std::span(tokens).first(size_t(n)), .kv = cache.get()};
    const mx::array logits = model->forward({&sequence, 1});
    return {logits.data<float>(), logits.data<float>() + logits.size()};
  }
  std::vector<float> oracle(const std::vector<int32_t>& tokens) { return oracle(tokens, ssize(tokens)); }

  fs::path root_;
};

INSTANTIATE_TEST_SUITE_P(Formats, EngineWindows, ::testing::Values("f16", "q4 group 32 f16"));

TEST_P(EngineWindows, WakingForkingAndRewindingGoOnAsIfNothingHadBeen) {
  std::vector<int32_t> tokens;
  {
    Engine engine = make();
    for (int i = 0; i < 3; ++i) engine.turn(say("a", words(i == 1 ? 800 : 60, i)));
    tokens = engine.tokens("a");
    ASSERT_GT(tokens.size(), 2500u);
    EXPECT_EQ(engine.next_logits("a"), oracle(tokens)) << "awake";
  }
  EXPECT_EQ(make().next_logits("a"), oracle(tokens)) << "woken";
  const AgentInfo info = Store(root_ / "store").agent_info("a");
  EXPECT_EQ(info.window, kWindow);
  bool again = false;
  const std::vector<int64_t> lengths{ssize(tokens) - 1200, 1, 255, 256, 257, 1300, ssize(tokens) - 3};
  for (size_t i = 0; i < lengths.size(); i += testing::every()) {
    const int64_t n = lengths[i];
    const std::vector<float> expected = oracle(tokens, n);
    const std::string id = "fork-" + std::to_string(n);
    {
      Store store(root_ / "store");
      fork_agent(store, "a", id, n);  // without a model
    }
    Engine engine = make();
    EXPECT_EQ(engine.next_logits(id), expected) << "forked asleep at " << n;
    engine.next_logits("a");
    engine.fork("a", "awake-" + id, n);
    EXPECT_EQ(engine.next_logits("awake-" + id), expected) << "forked at " << n;
    // The next turn computes what its windows lack, says so, and the agent is as if it had never had more.
    const TurnResult result = engine.turn(say(id, words(3, 9)));
    // Another agent's window files may serve, too.
    EXPECT_LE(result.tokens.again, n - resumable_tokens(info, n)) << n;
    EXPECT_EQ(result.notices.size(), result.tokens.again > 0 ? 1u : 0u);
    if (result.tokens.again > 0) {
      again = true;
      EXPECT_NE(result.notices.at(0).find("no rows of the sliding windows between "), std::string::npos)
          << result.notices[0];
    }
    const std::vector<int32_t> held = engine.tokens(id);
    EXPECT_EQ(engine.next_logits(id), oracle(held));
    EXPECT_TRUE(std::equal(tokens.begin(), tokens.begin() + n, held.begin()));
    engine.rewind("awake-" + id, n - n / 3);
    EXPECT_EQ(engine.next_logits("awake-" + id), oracle(tokens, n - n / 3)) << "rewound to " << n - n / 3;
    engine.turn(say("awake-" + id, words(3, 9)));
    EXPECT_EQ(engine.next_logits("awake-" + id), oracle(engine.tokens("awake-" + id)));
    for (const VerifyReport& report : engine.store().verify()) EXPECT_TRUE(report.problems.empty());
  }
  EXPECT_TRUE(again);
}

TEST_P(EngineWindows, ATurnAfterAWakeWritesItsRowsAndTheRunsThatItSeals) {
  make().turn(say("a", words(900, 1)));
  Engine engine = make();
  for (int turn = 2; turn < 5; ++turn) {
    const TurnResult result = engine.turn(say("a", words(30, turn)));
    EXPECT_EQ(result.tokens.again, 0);
    const auto model = Model::load((root_ / "model").string());
    const KvFormat format = model->refined(KvFormat::parse(GetParam()).value());
    const auto row = int64_t(model->kv_layout(format).bytes_per_token());
    EXPECT_LE(result.bytes.written, (result.tokens.prefilled + result.tokens.generated + 288) * row + 24'000);
    engine.sleep("a");
    EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
  }
  const AgentInfo info = engine.store().agent_info("a");
  EXPECT_LT(info.states->size(), info.segments.size());
}

TEST_P(EngineWindows, AnAgentThatWasSavedWithAllRowsInItsSegmentsGoesOnAndIsWrittenAnew) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < 2000; ++i) tokens.push_back((i * 7919) % 600);
  KvLayout old;
  {
    Engine engine = make();
    engine.turn(say("model", words(3, 1)));
    const auto model = Model::load((root_ / "model").string());
    const KvFormat format = model->refined(KvFormat::parse(GetParam()).value());
    const auto cache = KvCache::create(model->kv_layout(format), format, model->backend());
    const ForwardSequence sequence{.tokens = tokens, .kv = cache.get()};
    model->forward({&sequence, 1});
    cache->record_tokens(tokens);
    const LoadedAgent like = Store(root_ / "store").load_agent_cache("model");
    KvSnapshot snapshot = cache->snapshot(like.info.identity);
    snapshot.lineage = like.info.lineage;
    snapshot.conversation = like.info.conversation;
    old = snapshot.layout;
    std::ranges::rotate(old.tensors, old.tensors.begin() + ptrdiff_t(old.n_together()));
    for (KvTensorSpec& tensor : old.tensors) tensor.apart = false;
    Store(root_ / "store").save_agent_cache("a", in_layout(snapshot, old).value(), "m");
    EXPECT_FALSE(Store(root_ / "store").agent_info("a").states);
  }
  Engine engine = make();
  EXPECT_EQ(engine.next_logits("a"), oracle(tokens));
  engine.fork("a", "b", 1500);
  EXPECT_EQ(engine.next_logits("b"), oracle(tokens, 1500));
  engine.turn(say("a", words(3, 2)));
  const AgentInfo info = engine.store().agent_info("a");
  EXPECT_EQ(info.window, kWindow);
  EXPECT_GE(info.states.value().size(), 4u);
  engine.sleep("a");
  EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
}

TEST_P(EngineWindows, DamageIsComputedAgain) {
  std::vector<int32_t> tokens;
  {
    Engine engine = make();
    engine.turn(say("a", words(900, 1)));
    tokens = engine.tokens("a");
  }
  const AgentInfo info = Store(root_ / "store").agent_info("a");
  const std::string name = info.states->back().file;
  const fs::path file = root_ / "store/states" / name.substr(0, 2) / (name + ".safetensors");
  std::string bytes = testing::read_all(file);
  bytes[bytes.size() / 2] ^= 1;
  testing::write_all(file, bytes);
  Engine engine = make();
  EXPECT_EQ(engine.next_logits("a"), oracle(tokens));
  const TurnResult result = engine.turn(say("a", words(3, 2)));
  EXPECT_NE(result.damage.value_or("").find("damaged"), std::string::npos);
  engine.sleep("a");
  EXPECT_TRUE(engine.store().verify("a")[0].problems.empty());
  EXPECT_EQ(engine.next_logits("a"), oracle(engine.tokens("a")));
}

TEST_P(EngineWindows, ANewAgentBeginsWithThePrefixOfOneThatIsAsleep) {
  std::vector<int32_t> tokens;
  {
    Engine engine = make();
    engine.turn(say("a", words(900, 1)));
    tokens = engine.tokens("a");
  }
  Engine engine = make();
  const TurnResult result = engine.turn(say("b", words(900, 1) + words(5, 3)));
  EXPECT_GT(result.tokens.cached, 2000);
  EXPECT_EQ(engine.next_logits("b"), oracle(engine.tokens("b")));
  engine.sleep("b");
  EXPECT_EQ(engine.next_logits("b"), oracle(engine.tokens("b")));
}

}  // namespace
}  // namespace torpor
