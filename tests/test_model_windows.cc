/// Models with long windows: that rows are kept apart changes where they lie, and no bit that is computed from them.

#include <fstream>

#include <unistd.h>

#include "model_fixture.h"
#include "torpor/cache.h"

namespace torpor {
namespace {

constexpr int kLeastApart = 1024;

class LongWindows : public ::testing::TestWithParam<std::tuple<const char*, Backend, const char*>> {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "torpor-windows-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
  }
  void TearDown() override { fs::remove_all(root_); }

  std::unique_ptr<Model> with_window(int window) const {
    const auto& [name, backend, format] = GetParam();
    const fs::path directory = root_ / std::to_string(window);
    fs::copy(kGoldens / name, directory);
    json config = read_json(directory / "config.json");
    json& text = config.contains("text_config") ? config["text_config"] : config;
    text["sliding_window"] = window;
    text["max_position_embeddings"] = 4096;
    std::ofstream(directory / "config.json") << config;
    return Model::load(directory.string(), {.backend = backend, .activations = Activations::kF32});
  }
  static std::vector<float> forward(Model& model, KvCache& cache, std::span<const int32_t> tokens) {
    const ForwardSequence sequence{.tokens = tokens, .kv = &cache};
    const mx::array logits = model.forward({&sequence, 1});
    cache.record_tokens(tokens);
    return {logits.data<float>(), logits.data<float>() + logits.size()};
  }

  fs::path root_;
};

TEST_P(LongWindows, RowsKeptApartAreComputedAndComeBackAsOthersDo) {
  const auto plain = with_window(kLeastApart - 1), apart = with_window(kLeastApart);
  const KvFormat format = apart->refined(KvFormat::parse(std::get<2>(GetParam())).value());
  ASSERT_FALSE(plain->kv_layout(format).has_apart());
  ASSERT_TRUE(apart->kv_layout(format).has_apart());
  std::vector<int32_t> tokens;
  for (int i = 0; i < 704; ++i) tokens.push_back((i * 7919 + i / 13) % plain->info().vocab_size);
  auto expected = KvCache::create(plain->kv_layout(format), format, plain->backend());
  auto found = KvCache::create(apart->kv_layout(format), format, apart->backend());
  const auto go_on = [&](size_t first, size_t n) {
    const std::span part = std::span(tokens).subspan(first, n);
    EXPECT_EQ(forward(*apart, *found, part), forward(*plain, *expected, part)) << first;
  };
  go_on(0, 300);
  go_on(300, 1);
  go_on(301, 399);
  // As from disk: in snapshots, and in the other layout.
  const KvSnapshot snapshot = found->snapshot({.kv = format.name()});
  KvLayout other = plain->kv_layout(format);
  for (KvTensorSpec& tensor : other.tensors) tensor.window += tensor.window > 0;
  auto moved = in_layout(snapshot, other);
  ASSERT_TRUE(moved);
  moved->layout = plain->kv_layout(format);
  found = KvCache::restore(snapshot, apart->backend());
  expected = KvCache::restore(*moved, plain->backend());
  go_on(700, 4);
}

INSTANTIATE_TEST_SUITE_P(
    Floats, LongWindows,
    ::testing::Combine(::testing::Values("tiny-gemma2", "tiny-gemma3", "tiny-gemma3-vision", "tiny-gemma4",
                                         "tiny-gemma4-moe", "tiny-olmo3", "tiny-cohere2", "tiny-gpt-oss"),
                       ::testing::Values(Backend::kKernels, Backend::kMlx), ::testing::Values("f32")));
INSTANTIATE_TEST_SUITE_P(Quantized, LongWindows,  // heads of 32 dims and more
                         ::testing::Combine(::testing::Values("tiny-gemma2", "tiny-gemma3", "tiny-gpt-oss"),
                                            ::testing::Values(Backend::kKernels, Backend::kMlx),
                                            ::testing::Values("q4 group 32 f16")));

}  // namespace
}  // namespace torpor
