/// The forward pass against itself in other shapes: chunks, batches, dtypes, backends. (Against mlx-lm: test_model_goldens.cc.)

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include <unistd.h>

#include "model_fixture.h"
#include "tiny_model.h"
#include "torpor/error.h"

namespace torpor {
namespace {

/// SmolLM2, loaded once.
Model& smollm2() {
  static const std::unique_ptr<Model> model = load_fetched("smollm2-135m");
  return *model;
}

const json& smollm2_goldens() {
  static const json goldens = read_json(kGoldens / "smollm2-135m.json").at("prompts");
  return goldens;
}

std::vector<int32_t> prompt(const char* name) { return smollm2_goldens().at(name).at("tokens"); }

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
  EXPECT_EQ(identity.kv, "") << "the caller's to add";
  EXPECT_TRUE(smollm2().numerics().starts_with("f32/kernels/l")) << smollm2().numerics();
  EXPECT_EQ(Model::load(smollm2().info().dir.string(), {.backend = Backend::kKernels})->identity(), identity);
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

TEST(Model, AFailedForwardPassHasAdvancedByWholeChunksOnMlxAndNotAtAllOnTheKernels) {
  /// Has room for so many layers' rows, or runs.
  class Full : public TestCache {
   public:
    Full(const Model& model, int room) : TestCache(model, KvDtype::kF32), room_(room) {}
    std::pair<mx::array, mx::array> update_and_fetch(int layer, const mx::array& k, const mx::array& v) override {
      if (room_-- == 0) throw std::runtime_error("full");
      return TestCache::update_and_fetch(layer, k, v);
    }
    std::span<const KvBuffer> reserve(int n) override {
      if (room_-- == 0) throw Error(ErrorCode::kResourceExhausted, "full");
      return TestCache::reserve(n);
    }

   private:
    int room_;
  };
  const fs::path directory = fs::temp_directory_path() / ("torpor-test-" + std::to_string(::getpid()));
  testing::write_tiny_model(directory);
  const std::vector<int32_t> tokens(600, 7);
  for (const Backend backend : {Backend::kMlx, Backend::kKernels}) {
    const auto model = Model::load(directory.string(), {.backend = backend});
    for (const int room : {1, 3}) {  // of two layers
      Full first(*model, 2 * (backend == Backend::kKernels)), second(*model, backend == Backend::kKernels ? 0 : room);
      const std::vector<ForwardSequence> one{{.tokens = tokens, .kv = &second}}, two{{.tokens = tokens, .kv = &first}, one[0]};
      EXPECT_ANY_THROW(model->forward(backend == Backend::kKernels ? two : one));
      EXPECT_EQ(first.length(), 0);
      EXPECT_EQ(second.length(), backend == Backend::kMlx && room == 3 ? 512 : 0);
    }
  }
  fs::remove_all(directory);
}

TEST(Model, ASoftCapOfLogitsCountsInEveryFamily) {
  const fs::path directory = fs::temp_directory_path() / ("torpor-test-cap-" + std::to_string(::getpid()));
  testing::write_tiny_model(directory);
  json config = read_json(directory / "config.json");
  config["final_logit_softcapping"] = 0.5;
  std::ofstream(directory / "config.json") << config;
  for (const Backend backend : {Backend::kMlx, Backend::kKernels}) {
    const auto model = Model::load(directory.string(), {.backend = backend});
    TestCache cache(*model, KvDtype::kF32);
    const std::vector<float> logits = forward(*model, cache, std::vector<int32_t>{7});
    EXPECT_LE(*std::ranges::max_element(logits), 0.5f);
    EXPECT_GE(*std::ranges::min_element(logits), -0.5f);
  }
  fs::remove_all(directory);
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
  const std::unique_ptr<Model> mlx = Model::load(smollm2().info().dir.string(), {.backend = Backend::kMlx});
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

TEST(SmolLM2, ModelsOfOneProcessMayDifferInTheirActivations) {
  const std::unique_ptr<Model> int16 = load_fetched("smollm2-135m", Activations::kInt16);
  EXPECT_EQ(int16->identity(), smollm2().identity());
  EXPECT_TRUE(int16->numerics().starts_with("int16/")) << int16->numerics();
  EXPECT_TRUE(smollm2().numerics().starts_with("f32/")) << smollm2().numerics();
  const std::vector<int32_t> tokens = prompt("list");
  const auto logits_of = [&](Model& model) {
    TestCache cache(model, KvDtype::kF32);
    return forward(model, cache, tokens);
  };
  const std::vector<float> f32_first = logits_of(smollm2()), rounded = logits_of(*int16), f32_again = logits_of(smollm2());
  EXPECT_EQ(f32_first, f32_again);
  EXPECT_NE(f32_first, rounded);
  EXPECT_EQ(logits_of(*int16), rounded);
}

TEST(SmolLM2, AnotherNumberOfThreadsInOneProcessIsRefused) {
  try {
    Model::load(smollm2().info().dir.string(), {.threads = 61});
    FAIL() << "loaded";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_EQ(error.field(), "ComputeOptions::threads");
    EXPECT_EQ(error.found(), "61");
  }
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

}  // namespace
}  // namespace torpor
