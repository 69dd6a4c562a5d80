/// Agents of every kind of cache and state sleep, wake, fork and rewind, and go on as if they had never stopped. The
/// models are the random ones in the shapes of published families.

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/json.h"
#include "store_fixture.h"
#include "torpor/agents.h"
#include "torpor/cache.h"
#include "torpor/engine.h"
#include "torpor/model.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

struct Kind {
  const char* name;    ///< of the test
  const char* model;   ///< tests/goldens/model/tiny-MODEL
  const char* format;  ///< of the cache
};

/// Text of `n` characters, each of which is a token.
std::string letters(int n, int seed) {
  std::string text;
  for (int i = 0; i < n; ++i) text += char('A' + (i * 7919 + i / 57 + seed * 31) % 57);
  return text;
}

/// A copy of a golden model that reads long texts, with a tokenizer of the ASCII characters that are no spaces.
void write_model(const std::string& name, const fs::path& directory) {
  fs::copy(fs::path(TORPOR_SOURCE_DIR) / "tests/goldens/model" / ("tiny-" + name), directory);
  std::ifstream in(directory / "config.json");
  json config = json::parse(in);
  (config.contains("text_config") ? config["text_config"] : config)["max_position_embeddings"] = 4096;
  std::ofstream(directory / "config.json") << config;
  json vocabulary;
  for (int i = 0; i < 94; ++i) vocabulary[std::string(1, char('!' + i))] = i;
  const json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  std::ofstream(directory / "tokenizer.json") << json{
      {"version", "1.0"}, {"added_tokens", json::array()}, {"normalizer", nullptr}, {"pre_tokenizer", byte_level},
      {"post_processor", nullptr}, {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", json::array()}}}};
}

class EngineKinds : public ::testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/torpor-test-XXXXXX";
    root_ = mkdtemp(pattern);
    write_model(GetParam().model, root_ / "model");
    model_ = Model::load((root_ / "model").string());
  }
  void TearDown() override { fs::remove_all(root_); }

  KvFormat format() const { return model_->refined(KvFormat::parse(GetParam().format).value()); }
  Engine make() const {
    EngineOptions options;
    options.model = (root_ / "model").string();
    options.store = root_ / "store";
    options.kv_format = KvFormat::parse(GetParam().format).value();
    return Engine(options);
  }
  static TurnRequest say(const std::string& agent, const std::string& prompt) {
    TurnRequest turn;
    turn.agent = agent;
    turn.prompt = prompt;
    turn.raw = true;
    turn.generate.max_tokens = 4;
    return turn;
  }
  /// What follows each of these tokens, computed at once.
  std::vector<std::vector<float>> oracles(const std::vector<int32_t>& tokens, bool all = true) {
    const KvLayout layout = model_->kv_layout(format());
    const auto cache = KvCache::create(layout, format(), model_->backend(), model_->state_layout());
    const ForwardSequence sequence{.tokens = tokens, .kv = cache.get(), .all_logits = all};
    const mx::array logits = model_->forward({&sequence, 1});
    const size_t vocabulary = size_t(model_->info().vocab_size);
    std::vector<std::vector<float>> rows;
    for (size_t i = 0; i < logits.size(); i += vocabulary) {
      rows.emplace_back(logits.data<float>() + i, logits.data<float>() + i + vocabulary);
    }
    return rows;
  }
  std::vector<float> oracle(const std::vector<int32_t>& tokens) { return oracles(tokens, false).back(); }

  fs::path root_;
  std::unique_ptr<Model> model_;
};

TEST_P(EngineKinds, WakingForkingAndRewindingGoOnAsIfNothingHadBeen) {
  std::vector<int32_t> tokens;
  {
    Engine engine = make();
    for (int i = 0; i < 3; ++i) engine.turn(say("a", letters(i == 1 ? 1000 : 200, i)));
    tokens = engine.tokens("a");
    ASSERT_GT(tokens.size(), 1400u);
  }
  const std::vector<std::vector<float>> expected = oracles(tokens);
  EXPECT_EQ(make().next_logits("a"), expected.back()) << "woken";
  const AgentInfo info = Store(root_ / "store").agent_info("a");
  EXPECT_EQ(info.states.has_value(), !model_->state_layout().empty());
  std::vector<int64_t> lengths{1300, 1, 255, 256, 257, ssize(tokens) - 3};
  if (info.states) {  // between two states, and at one
    ASSERT_GT(info.states->size(), 2u);
    const int64_t earlier = (*info.states)[0].position, later = (*info.states)[1].position;
    ASSERT_GT(later, earlier + 1);
    lengths.push_back((earlier + later) / 2);
    lengths.push_back(later);
  }
  bool again = false;
  for (size_t i = 0; i < lengths.size(); i += testing::every()) {
    const int64_t n = lengths[i];
    const std::string id = "fork-" + std::to_string(n);
    {
      Store store(root_ / "store");
      fork_agent(store, "a", id, n);  // without a model
    }
    Engine engine = make();
    EXPECT_EQ(engine.next_logits(id), expected[size_t(n - 1)]) << "forked asleep at " << n;
    engine.next_logits("a");
    engine.fork("a", "awake-" + id, n);
    EXPECT_EQ(engine.next_logits("awake-" + id), expected[size_t(n - 1)]) << "forked at " << n;
    // The next turn computes what is behind the last state, and the agent is as if it had never had more.
    const TurnResult result = engine.turn(say(id, letters(3, 9)));
    const int64_t from = resumable_tokens(info, n);
    EXPECT_EQ(result.tokens.again, n - from) << n;
    EXPECT_EQ(result.notices.size(), n > from ? 1u : 0u);
    if (n > from) {
      again = true;
      EXPECT_NE(result.notices.at(0).find("no state between " + std::to_string(from)), std::string::npos)
          << result.notices[0];
    }
    const std::vector<int32_t> held = engine.tokens(id);
    EXPECT_TRUE(std::equal(tokens.begin(), tokens.begin() + n, held.begin()));
    EXPECT_EQ(engine.next_logits(id), oracle(held));
    const int64_t rewound = n - n / 3;
    engine.rewind("awake-" + id, rewound);
    EXPECT_EQ(engine.next_logits("awake-" + id), expected[size_t(rewound - 1)]) << "rewound to " << rewound;
    engine.turn(say("awake-" + id, letters(3, 9)));
    EXPECT_EQ(engine.next_logits("awake-" + id), oracle(engine.tokens("awake-" + id)));
  }
  EXPECT_EQ(again, info.states.has_value());
  for (const VerifyReport& report : Store(root_ / "store").verify()) EXPECT_TRUE(report.problems.empty());
}

INSTANTIATE_TEST_SUITE_P(All, EngineKinds,
                         ::testing::Values(Kind{"rows", "qwen3", "f16"}, Kind{"windows", "gemma3", "q8 group 32 f16"},
                                           Kind{"shared_rows", "gemma4", "f16"},
                                           Kind{"sinks", "gpt-oss", "q4 group 32 f16"},
                                           Kind{"latents", "deepseek-v3", "f16"},
                                           Kind{"quantized_latents", "glm4-moe-lite", "q4 group 32 f16"},
                                           Kind{"short_convolutions", "lfm2-moe", "f16"},
                                           Kind{"gated_deltas", "qwen3-5-moe", "f16"},
                                           Kind{"gated_deltas_quantized", "qwen3-next", "q8 group 32 f16"},
                                           Kind{"mamba2", "nemotron-h-moe", "f16"},
                                           Kind{"mamba2_granite", "granite-hybrid", "f16"}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace torpor
