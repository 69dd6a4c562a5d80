/// The forward passes against mlx-lm's on the same weights, in f32 (goldens of scripts/make-goldens-model), and against
/// transformers' (scripts/make-transformers-goldens); those of GGUF files against llama.cpp's on the file expanded to
/// f32 (scripts/make-goldens-gguf).

#include <gtest/gtest.h>

#include <cmath>

#include "model_fixture.h"
#include "torpor/error.h"

namespace torpor {
namespace {

// f32 on both sides: what is left are the orders of summation. The largest difference seen was 1.3e-4.
constexpr float kLogitBound = 5e-4f;

/// The models of scripts/fetch-model.
class Real : public testing::TestWithParam<const char*> {
 protected:
  const std::string name_ = GetParam();
  const std::unique_ptr<Model> model_ = load_fetched(name_);
  const json prompts_ = read_json(kGoldens / (name_ + ".json")).at("prompts");

  /// The largest difference from the kept logits of one row.
  float difference(std::span<const float> row, const json& expected) {
    float worst = 0;
    for (size_t i = 0; i < expected.at("top_ids").size(); ++i) {
      worst = std::max(worst, std::abs(row[size_t(expected.at("top_ids")[i])] - float(expected.at("top_values")[i])));
    }
    double sum = 0, exp_sum = 0;
    const float top = *std::ranges::max_element(row);
    for (float value : row) sum += value, exp_sum += std::exp(double(value) - top);
    EXPECT_NEAR(sum / double(row.size()), double(expected.at("mean")), kLogitBound);
    EXPECT_NEAR(*std::ranges::min_element(row), double(expected.at("min")), kLogitBound);
    EXPECT_NEAR(top + std::log(exp_sum), double(expected.at("logsumexp")), kLogitBound);
    return worst;
  }
};

TEST_P(Real, LogitsAgreeWithTheReferences) {
  const size_t vocab = size_t(model_->info().vocab_size);
  for (const auto& [name, golden] : prompts_.items()) {
    SCOPED_TRACE(name);
    const std::vector<int32_t> tokens = golden.at("tokens");
    TestCache cache(*model_, KvDtype::kF32);
    if (golden.contains("rows")) {
      // Some rows of a long prompt, before the window and far beyond it.
      std::map<int, json> rows;
      for (const auto& [at, row] : golden.at("rows").items()) rows[std::stoi(at)] = row;
      rows[int(tokens.size()) - 1] = golden.at("last");
      float worst = 0;
      for (const auto& [at, expected] : rows) {
        const auto part = std::span(tokens).subspan(size_t(cache.length()), size_t(at + 1 - cache.length()));
        worst = std::max(worst, difference(forward(*model_, cache, part), expected));
      }
      EXPECT_LT(worst, kLogitBound);
      RecordProperty(name + "_worst_logit", std::to_string(worst));
      continue;
    }
    const std::vector<float> logits = forward(*model_, cache, tokens, true);
    const float worst = difference({logits.data() + (tokens.size() - 1) * vocab, vocab}, golden.at("last"));
    EXPECT_LT(worst, kLogitBound);

    // The probability of every token of the prompt, hence the perplexity.
    const json& log_probs = golden.at("log_probs");
    double worst_log_prob = 0, total = 0;
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      const std::span<const float> row(logits.data() + i * vocab, vocab);
      const float top = *std::ranges::max_element(row);
      double norm = 0;
      for (float value : row) norm += std::exp(double(value) - top);
      const double log_prob = double(row[size_t(tokens[i + 1])]) - top - std::log(norm);
      worst_log_prob = std::max(worst_log_prob, std::abs(log_prob - double(log_probs[i])));
      total += log_prob;
    }
    const double perplexity = std::exp(-total / double(tokens.size() - 1));
    EXPECT_LT(worst_log_prob, kLogitBound);
    EXPECT_NEAR(perplexity, double(golden.at("perplexity")), 1e-3 * perplexity);
    RecordProperty(name + "_worst_logit", std::to_string(worst));
    RecordProperty(name + "_worst_log_prob", std::to_string(worst_log_prob));
  }
}

TEST_P(Real, GreedyTokensEqualTheReferences) {
  for (const auto& [name, golden] : prompts_.items()) {
    SCOPED_TRACE(name);
    TestCache cache(*model_, KvDtype::kF32);
    std::vector<float> logits = forward(*model_, cache, std::vector<int32_t>(golden.at("tokens")));
    std::vector<int32_t> greedy;
    while (greedy.size() < golden.at("greedy").size()) {
      greedy.push_back(argmax(logits));
      logits = forward(*model_, cache, {&greedy.back(), 1});
    }
    EXPECT_EQ(greedy, golden.at("greedy").get<std::vector<int32_t>>());
  }
}

/// For a test's name.
std::string identifier(std::string name) {
  std::ranges::replace_if(name, [](char c) { return c == '-' || c == '.'; }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Models, Real,
                         testing::Values("smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m", "smollm2-135m.gguf",
                                         "qwen2.5-coder-0.5b.gguf", "gemma3-270m.gguf"),
                         [](const auto& info) { return identifier(info.param); });

/// Random models of a few layers, in the shape of each family's published config: dtypes, biases, RoPE scalings, windows,
/// quantizations, shards.
class Tiny : public testing::TestWithParam<std::tuple<const char*, Backend>> {
 protected:
  const fs::path dir_ = kGoldens / std::get<0>(GetParam());
  const Backend backend_ = std::get<1>(GetParam());
  const json golden_ = read_json(dir_ / "golden.json");
  const std::vector<int32_t> tokens_ = golden_.at("tokens");

  std::unique_ptr<Model> load(Activations activations) const {
    const fs::path file = dir_ / "model.gguf", model = fs::exists(file) ? file : dir_;
    return Model::load(model.string(), {.backend = backend_, .activations = activations});
  }
  /// The kept logits of some rows: mlx-lm's or llama.cpp's, and transformers' where there are any.
  std::vector<json> references() const {
    std::vector<json> rows{golden_.at("rows")};
    const fs::path more = dir_ / "transformers.json";
    if (fs::exists(more)) rows.push_back(read_json(more).at("rows"));
    return rows;
  }
  /// The largest difference from the kept logits, which reach 25, when so many tokens are computed at a time.
  float difference(Model& model, size_t step) const {
    const size_t vocab = size_t(model.info().vocab_size);
    TestCache cache(model, KvDtype::kF32);
    std::vector<float> logits;
    for (size_t at = 0; at < tokens_.size(); at += step) {
      const auto part = forward(model, cache, std::span(tokens_).subspan(at, step), true);
      logits.insert(logits.end(), part.begin(), part.end());
    }
    EXPECT_EQ(cache.length(), int(tokens_.size()));
    float worst = 0;
    for (const json& rows : references()) {
      for (const auto& [row, values] : rows.items()) {
        EXPECT_EQ(values.size(), vocab);
        for (size_t i = 0; i < values.size(); ++i) {
          worst = std::max(worst, std::abs(logits[std::stoul(row) * vocab + i] - float(values[i])));
        }
      }
    }
    return worst;
  }
};

TEST_P(Tiny, LogitsAgreeWithTheReferences) {
  const auto model = load(Activations::kF32);
  const float whole = difference(*model, tokens_.size()), one_by_one = difference(*model, 1);
  EXPECT_LT(std::max(whole, one_by_one), 1e-3f);
  RecordProperty("worst_whole", std::to_string(whole));
  RecordProperty("worst_one_by_one", std::to_string(one_by_one));
}

TEST_P(Tiny, ActivationsOf16BitsAreNear) {
  if (backend_ == Backend::kMlx) GTEST_SKIP() << "of Torpor's kernels";
  const auto model = load(Activations::kInt16);
  EXPECT_LT(difference(*model, tokens_.size()), 5e-3f);
  EXPECT_LT(difference(*model, 1), 5e-3f);
}

TEST_P(Tiny, ChunksDoNotChangeABitOfTheKernels) {
  if (backend_ != Backend::kKernels) GTEST_SKIP() << "Torpor's kernels alone are batch invariant";
  const auto model = load(Activations::kF32);
  TestCache whole(*model, KvDtype::kF16);
  const std::vector<float> expected = forward(*model, whole, tokens_);
  for (const size_t step : {size_t(1), size_t(7)}) {
    TestCache cache(*model, KvDtype::kF16);
    std::vector<float> logits;
    for (size_t at = 0; at < tokens_.size(); at += step) {
      logits = forward(*model, cache, std::span(tokens_).subspan(at, std::min(step, tokens_.size() - at)));
    }
    EXPECT_EQ(logits, expected) << step;
    EXPECT_EQ(cache.rows(), whole.rows()) << step;
  }
}

TEST_P(Tiny, GreedyTokensEqualTheReferences) {
  const auto model = load(Activations::kF32);
  for (const auto& [length, expected] : golden_.at("greedy").items()) {
    SCOPED_TRACE(length);
    TestCache cache(*model, KvDtype::kF32);
    std::vector<float> logits = forward(*model, cache, std::span(tokens_).first(std::stoul(length)));
    std::vector<int32_t> greedy;
    while (greedy.size() < expected.size()) {
      greedy.push_back(argmax(logits));
      logits = forward(*model, cache, {&greedy.back(), 1});
    }
    EXPECT_EQ(greedy, expected.get<std::vector<int32_t>>());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, Tiny,
    testing::Combine(testing::Values("tiny-f16", "tiny-bf16-llama3", "tiny-f32-linear", "tiny-window", "tiny-q4-g64",
                                     "tiny-mixed-g128", "tiny-widths", "tiny-floats", "tiny-mistral", "tiny-mixtral",
                                     "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe", "tiny-gemma2", "tiny-gemma3",
                                     "tiny-gemma3-vision", "tiny-phi3", "tiny-phi4-mini", "tiny-proportional",
                                     "tiny-smollm3", "tiny-seed-oss", "tiny-granite", "tiny-olmo3", "tiny-mistral3", "tiny-cohere2",
                                     "tiny-gemma4", "tiny-gemma4-q8", "tiny-gemma4-vision", "tiny-gemma4-moe",
                                     "tiny-olmoe", "tiny-granitemoe", "tiny-glm4-moe", "tiny-glm4-moe-air",
                                     "tiny-minimax", "tiny-gpt-oss",
                                      "tiny-gpt-oss-hf", "tiny-granitemoe-hf", "tiny-gemma4-moe-hf", "tiny-lfm2",
                                      "tiny-qwen3-5", "tiny-qwen3-next", "tiny-nemotron-h",
                                      "tiny-nemotron-h-moe", "tiny-qwen3-5-moe", "tiny-lfm2-moe", "tiny-granite-hybrid",
                                      "tiny-granite-hybrid-moe", "tiny-deepseek-v2", "tiny-deepseek-v2-q4",
                                      "tiny-deepseek-v3", "tiny-glm4-moe-lite", "tiny-mistral4",
                                      "tiny-gguf-gemma4", "tiny-gguf-lfm2", "tiny-gguf-lfm2moe", "tiny-gguf-qwen35",
                                      "tiny-gguf-qwen35moe", "tiny-gguf-qwen3next"),
                     testing::Values(Backend::kKernels, Backend::kMlx)),
    [](const auto& info) {
      return identifier(std::get<0>(info.param)) + (std::get<1>(info.param) == Backend::kMlx ? "_mlx" : "_kernels");
    });

}  // namespace
}  // namespace torpor
