/// The forward pass against mlx-lm's (goldens of scripts/make-goldens-model) and against itself in other shapes.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>

#include <mlx/mlx.h>
#include <nlohmann/json.hpp>

#include "torpor/error.h"
#include "torpor/model.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const fs::path kSource = TORPOR_SOURCE_DIR;
const fs::path kGoldens = kSource / "tests/goldens/model";

json read_json(const fs::path& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("no " + path.string());
  return json::parse(in);
}

/// The least a cache has to do, for both backends.
class TestCache : public KvAccess {
 public:
  TestCache(const Model& model, KvDtype dtype) : layout_(model.kv_layout(dtype)) {}

  int length() const override { return length_; }
  const KvLayout& layout() const noexcept override { return layout_; }
  std::span<const KvBuffer> reserve(int n) override {
    while (int(runs_.size()) * kSegmentTokens < length_ + n) {
      const size_t size = layout_.offset(layout_.tensors.size(), kSegmentTokens);
      const std::shared_ptr<std::byte> buffer = allocate_heap_buffer(size);
      runs_.push_back({buffer.get(), size, buffer});
    }
    return runs_;
  }
  std::pair<mx::array, mx::array> update_and_fetch(int layer, const mx::array& k, const mx::array& v) override {
    return {append(2 * layer, k), append(2 * layer + 1, v)};
  }
  void advance(int n) override { length_ += n; }

  /// The rows held, tensor by tensor and head by head (kernels backend).
  std::vector<std::byte> rows() const {
    std::vector<std::byte> bytes;
    for (size_t t = 0; t < layout_.tensors.size(); ++t) {
      const KvTensorSpec& spec = layout_.tensors[t];
      const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
      for (int at = 0; at < length_; ++at) {
        const auto* run = runs_[size_t(at / kSegmentTokens)].data;
        for (int head = 0; head < spec.n_kv_heads; ++head) {
          const std::byte* from = run + layout_.offset(t, kSegmentTokens) +
                                  (size_t(head) * kSegmentTokens + size_t(at % kSegmentTokens)) * row;
          bytes.insert(bytes.end(), from, from + row);
        }
      }
    }
    return bytes;
  }

 private:
  mx::array append(int tensor, const mx::array& rows) {
    const KvDtype dtype = layout_.tensors[size_t(tensor)].dtype;
    const mx::array stored = mx::astype(
        rows, dtype == KvDtype::kF32 ? mx::float32 : dtype == KvDtype::kF16 ? mx::float16 : mx::bfloat16);
    const auto [it, added] = tensors_.emplace(tensor, stored);
    if (!added) it->second = mx::concatenate({it->second, stored}, 2);
    return it->second;
  }

  KvLayout layout_;
  int length_ = 0;
  std::vector<KvBuffer> runs_;
  std::map<int, mx::array> tensors_;
};

std::vector<float> forward(Model& model, TestCache& cache, std::span<const int32_t> tokens, bool all = false) {
  const ForwardSequence sequence{.tokens = tokens, .kv = &cache, .all_logits = all};
  mx::array logits = model.forward({&sequence, 1});
  EXPECT_EQ(logits.shape(), (mx::Shape{all ? int(tokens.size()) : 1, model.info().vocab_size}));
  EXPECT_EQ(logits.dtype(), mx::float32);
  return {logits.data<float>(), logits.data<float>() + logits.size()};
}

int argmax(std::span<const float> row) { return int(std::ranges::max_element(row) - row.begin()); }

/// SmolLM2, loaded once.
Model& smollm2() {
  static const std::unique_ptr<Model> model = [] {
    const fs::path dir = kSource / ".models/smollm2-135m";
    if (!fs::is_directory(dir)) throw std::runtime_error("no .models/smollm2-135m; run scripts/fetch-model smollm2-135m");
    return Model::load(dir.string(), Backend::kKernels);
  }();
  return *model;
}

const json& smollm2_goldens() {
  static const json goldens = read_json(kGoldens / "smollm2-135m.json").at("prompts");
  return goldens;
}

std::vector<int32_t> prompt(const char* name) { return smollm2_goldens().at(name).at("tokens"); }

// f32 on both sides: what is left are the orders of summation. The largest difference seen was 1e-4.
constexpr float kLogitBound = 5e-4f;

TEST(SmolLM2, HasTheInfoOfItsConfig) {
  const ModelInfo& info = smollm2().info();
  EXPECT_EQ(info.architecture, "llama");
  EXPECT_EQ(info.n_layers, 30);
  EXPECT_EQ(info.n_heads, 9);
  EXPECT_EQ(info.n_kv_heads, 3);
  EXPECT_EQ(info.head_dim, 64);
  EXPECT_EQ(info.vocab_size, 49152);
  EXPECT_EQ(info.max_context, 8192);
  EXPECT_EQ(info.eos_token_ids, std::vector<int32_t>{2});
  EXPECT_GT(info.weight_bytes, 90'000'000);
  EXPECT_EQ(smollm2().default_kv_format(), KvDtype::kF16);
  EXPECT_EQ(smollm2().backend(), Backend::kKernels);

  const KvLayout layout = smollm2().kv_layout(KvDtype::kBF16);
  ASSERT_EQ(layout.tensors.size(), 60u);
  EXPECT_EQ(layout.tensors[0], (KvTensorSpec{"layer_0_keys", KvDtype::kBF16, 3, 64, 0}));
  EXPECT_EQ(layout.tensors[59], (KvTensorSpec{"layer_29_values", KvDtype::kBF16, 3, 64, 0}));
}

TEST(SmolLM2, IdentityIsStable) {
  const Identity identity = smollm2().identity();
  EXPECT_EQ(identity.architecture, "llama");
  EXPECT_EQ(identity.rope, "default theta 100000");
  EXPECT_EQ(identity.config.size(), 32u);
  EXPECT_EQ(identity.weights.size(), 32u);
  EXPECT_EQ(identity.tokenizer, "");
  EXPECT_EQ(Model::load(smollm2().info().dir.string(), Backend::kKernels)->identity(), identity);
}

TEST(SmolLM2, LogitsAgreeWithMlxLm) {
  for (const auto& [name, golden] : smollm2_goldens().items()) {
    SCOPED_TRACE(name);
    const std::vector<int32_t> tokens = golden.at("tokens");
    TestCache cache(smollm2(), KvDtype::kF32);
    const std::vector<float> logits = forward(smollm2(), cache, tokens, true);
    const size_t vocab = size_t(smollm2().info().vocab_size);
    const std::span<const float> last(logits.data() + (tokens.size() - 1) * vocab, vocab);

    const json& expected = golden.at("last");
    float worst = 0;
    for (size_t i = 0; i < expected.at("top_ids").size(); ++i) {
      const float value = expected.at("top_values")[i];
      worst = std::max(worst, std::abs(last[size_t(expected.at("top_ids")[i])] - value));
    }
    EXPECT_LT(worst, kLogitBound);
    double sum = 0, exp_sum = 0;
    const float top = *std::ranges::max_element(last);
    for (float value : last) sum += value, exp_sum += std::exp(double(value) - top);
    EXPECT_NEAR(sum / double(vocab), double(expected.at("mean")), kLogitBound);
    EXPECT_NEAR(*std::ranges::min_element(last), double(expected.at("min")), kLogitBound);
    EXPECT_NEAR(top + std::log(exp_sum), double(expected.at("logsumexp")), kLogitBound);

    // The probability of every token of the prompt, hence the perplexity.
    const json& log_probs = golden.at("log_probs");
    double worst_log_prob = 0, total = 0;
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      const std::span<const float> row(logits.data() + i * vocab, vocab);
      const float row_top = *std::ranges::max_element(row);
      double norm = 0;
      for (float value : row) norm += std::exp(double(value) - row_top);
      const double log_prob = double(row[size_t(tokens[i + 1])]) - row_top - std::log(norm);
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

TEST(SmolLM2, GreedyTokensEqualMlxLms) {
  for (const auto& [name, golden] : smollm2_goldens().items()) {
    SCOPED_TRACE(name);
    TestCache cache(smollm2(), KvDtype::kF32);
    std::vector<float> logits = forward(smollm2(), cache, std::vector<int32_t>(golden.at("tokens")));
    std::vector<int32_t> greedy;
    while (greedy.size() < golden.at("greedy").size()) {
      greedy.push_back(argmax(logits));
      logits = forward(smollm2(), cache, {&greedy.back(), 1});
    }
    EXPECT_EQ(greedy, golden.at("greedy").get<std::vector<int32_t>>());
  }
}

TEST(SmolLM2, ChunksDoNotChangeABit) {
  const std::vector<int32_t> tokens = prompt("long");
  TestCache whole(smollm2(), KvDtype::kF16);
  const std::vector<float> expected = forward(smollm2(), whole, tokens);
  const std::vector<std::byte> rows = whole.rows();
  for (size_t step : {size_t(1), size_t(7), size_t(64)}) {
    SCOPED_TRACE(step);
    // One by one is slow, so it takes the last 60 tokens only.
    TestCache cache(smollm2(), KvDtype::kF16);
    size_t at = 0;
    if (step == 1) forward(smollm2(), cache, std::span(tokens).first(at = tokens.size() - 60));
    std::vector<float> logits;
    for (; at < tokens.size(); at += step) {
      logits = forward(smollm2(), cache, std::span(tokens).subspan(at, std::min(step, tokens.size() - at)));
    }
    EXPECT_EQ(std::memcmp(logits.data(), expected.data(), expected.size() * sizeof(float)), 0);
    EXPECT_EQ(cache.rows(), rows);
  }
}

/// Rows of a cache as floats, whatever its dtype.
std::vector<float> row_values(const TestCache& cache) {
  const std::vector<std::byte> bytes = cache.rows();
  const KvDtype dtype = cache.layout().tensors.front().dtype;
  std::vector<float> values(bytes.size() / kv_dtype_size(dtype));
  const auto convert = [&]<class T>(const T*) {
    for (size_t i = 0; i < values.size(); ++i) {
      T value;
      std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
      values[i] = float(value);
    }
  };
  if (dtype == KvDtype::kF32) convert(static_cast<const float*>(nullptr));
  if (dtype == KvDtype::kF16) convert(static_cast<const mx::float16_t*>(nullptr));
  if (dtype == KvDtype::kBF16) convert(static_cast<const mx::bfloat16_t*>(nullptr));
  return values;
}

TEST(SmolLM2, RowsHaveTheDtypeOfTheCache) {
  TestCache exact(smollm2(), KvDtype::kF32);
  forward(smollm2(), exact, prompt("prose"));
  const std::vector<float> expected = row_values(exact);
  for (const auto& [dtype, bound] : {std::pair{KvDtype::kF16, 1e-3f}, std::pair{KvDtype::kBF16, 8e-3f}}) {
    SCOPED_TRACE(kv_dtype_name(dtype));
    TestCache cache(smollm2(), dtype);
    forward(smollm2(), cache, prompt("prose"));
    const std::vector<float> values = row_values(cache);
    ASSERT_EQ(values.size(), expected.size());
    // Of the first layer's keys and values: deeper ones also carry what rounding did to those before.
    const size_t n = expected.size() / size_t(smollm2().info().n_layers);
    for (size_t i = 0; i < n; ++i) ASSERT_NEAR(values[i], expected[i], bound * (std::abs(expected[i]) + 0.01f)) << i;
  }
}

TEST(SmolLM2, ABatchIsBitEqualToItsSequencesAlone) {
  // 661 + 98 rows are more than one chunk; the second sequence starts in the middle of the second.
  const std::vector<std::vector<int32_t>> prompts = {prompt("long"), prompt("code"), {prompt("cjk").front()}};
  const std::vector<bool> all = {false, true, false};
  std::vector<TestCache> alone, together;
  std::vector<float> expected;
  std::vector<ForwardSequence> batch;
  for (size_t i = 0; i < prompts.size(); ++i) {
    alone.emplace_back(smollm2(), KvDtype::kF16);
    together.emplace_back(smollm2(), KvDtype::kF16);
  }
  // The last has a past of its own.
  forward(smollm2(), alone[2], prompt("cjk"));
  forward(smollm2(), together[2], prompt("cjk"));
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto logits = forward(smollm2(), alone[i], prompts[i], all[i]);
    expected.insert(expected.end(), logits.begin(), logits.end());
    batch.push_back({.tokens = prompts[i], .kv = &together[i], .all_logits = all[i]});
  }
  const mx::array logits = smollm2().forward(batch);
  ASSERT_EQ(logits.size(), expected.size());
  EXPECT_EQ(std::memcmp(logits.data<float>(), expected.data(), expected.size() * sizeof(float)), 0);
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(together[i].length(), alone[i].length());
    EXPECT_EQ(together[i].rows(), alone[i].rows());
  }
}

TEST(SmolLM2, MlxBackendAgrees) {
  const std::unique_ptr<Model> mlx = Model::load(smollm2().info().dir.string(), Backend::kMlx);
  EXPECT_EQ(mlx->identity(), smollm2().identity());
  const std::vector<int32_t> tokens = prompt("list");
  TestCache a(smollm2(), KvDtype::kF32), b(*mlx, KvDtype::kF32);
  const std::vector<float> expected = forward(smollm2(), a, tokens);
  const std::vector<float> logits = forward(*mlx, b, tokens);
  float worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) worst = std::max(worst, std::abs(logits[i] - expected[i]));
  EXPECT_LT(worst, kLogitBound);
  EXPECT_EQ(argmax(logits), argmax(expected));
}

TEST(SmolLM2, RefusesBadSequencesAndStaysWhereItWas) {
  TestCache cache(smollm2(), KvDtype::kF16), other(smollm2(), KvDtype::kF32);
  const std::vector<int32_t> good = {1, 2, 3}, too_large = {1, 49152}, negative = {-1}, none;
  const auto code_of = [&](std::vector<ForwardSequence> batch) {
    try {
      smollm2().forward(batch);
    } catch (const Error& e) {
      return e.code();
    }
    return ErrorCode::kInternal;
  };
  EXPECT_EQ(code_of({}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{.tokens = good, .kv = nullptr}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{.tokens = none, .kv = &cache}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{.tokens = negative, .kv = &cache}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{.tokens = good, .kv = &cache}, {.tokens = too_large, .kv = &other}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{.tokens = good, .kv = &cache}, {.tokens = good, .kv = &cache}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of({{.tokens = good, .kv = &cache}, {.tokens = good, .kv = &other}}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(cache.length(), 0);
}

/// Random models of two layers: dtypes, biases, RoPE scalings, windows, quantizations, shards. Without a backend, on that of TORPOR_BACKEND.
class Tiny : public testing::TestWithParam<std::tuple<const char*, std::optional<Backend>>> {};

TEST_P(Tiny, LogitsAgreeWithMlxLm) {
  const auto [name, backend] = GetParam();
  const fs::path dir = kGoldens / name;
  const std::unique_ptr<Model> model = backend ? Model::load(dir.string(), *backend) : Model::load(dir.string());
  const json golden = read_json(dir / "golden.json");
  const std::vector<int32_t> tokens = golden.at("tokens");
  const size_t vocab = size_t(model->info().vocab_size);
  // Whole, and one token at a time.
  for (size_t step : {tokens.size(), size_t(1)}) {
    TestCache cache(*model, KvDtype::kF32);
    std::vector<float> logits;
    for (size_t at = 0; at < tokens.size(); at += step) {
      const auto part = forward(*model, cache, std::span(tokens).subspan(at, step), true);
      logits.insert(logits.end(), part.begin(), part.end());
    }
    EXPECT_EQ(cache.length(), int(tokens.size()));
    float worst = 0;
    for (const auto& [row, values] : golden.at("rows").items()) {
      ASSERT_EQ(values.size(), vocab);
      for (size_t i = 0; i < vocab; ++i) {
        worst = std::max(worst, std::abs(logits[std::stoul(row) * vocab + i] - float(values[i])));
      }
    }
    EXPECT_LT(worst, 1e-3f);  // logits reach 25
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, Tiny,
    testing::Combine(testing::Values("tiny-f16", "tiny-bf16-llama3", "tiny-f32-linear", "tiny-window", "tiny-q4-g64",
                                     "tiny-mixed-g128"),
                     testing::Values(std::nullopt, Backend::kKernels, Backend::kMlx)),
    [](const auto& info) {
      std::string name = std::get<0>(info.param);
      std::ranges::replace(name, '-', '_');
      const std::optional<Backend> backend = std::get<1>(info.param);
      return name + (!backend ? "_default" : *backend == Backend::kMlx ? "_mlx" : "_kernels");
    });

}  // namespace
}  // namespace torpor
