// attention() over quantized rows: stored is what MLX makes of them, and outputs are those of the rows as stored.

#include <memory>
#include <string>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "attention_reference.h"
#include "kernels/primitives.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

TEST(KernelsAttentionQuantized, HeadDims) {
  for (int dim : {32, 64, 96, 128, 256}) {
    for (int group : {32, 64, 128}) {
      if (dim % group != 0) continue;
      for (int bits : {8, 4}) {
        for (KvDtype dtype : {KvDtype::kF16, KvDtype::kBF16, KvDtype::kF32}) {
          SCOPED_TRACE(testing::Message() << dim << " group " << group << " bits " << bits << " " << kv_dtype_name(dtype));
          Options options;
          options.dim = dim;
          options.dtype = dtype;
          options.bits = bits;
          options.group = group;
          check_case(options, 135);
        }
      }
    }
  }
}

TEST(KernelsAttentionQuantized, KeysAndValuesOfOtherBits) {
  for (const KvBits bits : {KvBits(8, 4), KvBits(4, 8)}) {
    for (int dim : {64, 96}) {
      SCOPED_TRACE(testing::Message() << dim << " bits " << bits.keys << "," << bits.values);
      Options options;
      options.dim = dim;
      options.bits = bits;
      options.group = 32;
      check_case(options, 135);
    }
  }
}

// Dims whose greatest power of two is smaller than they are, too.
TEST(KernelsAttentionQuantized, RotatedRowsAndKeysWithoutTheirBias) {
  for (int dim : {32, 64, 96, 128, 160, 256}) {
    for (int variant = 0; variant < 6; ++variant) {
      SCOPED_TRACE(testing::Message() << dim << " variant " << variant);
      Options options;
      options.dim = dim;
      options.heads = 4;
      options.kv_heads = 2;
      options.group = 32;
      options.bits = variant % 3 == 0 ? KvBits(8, 4) : variant % 3 == 1 ? KvBits(4) : KvBits(8);
      options.rotate = variant != 2;
      options.key_bias = variant >= 2;
      if (variant == 3) options.window = 100;
      if (variant == 4) {
        options.traditional = true;
        options.softcap = 50;
      }
      if (variant == 5) options.rope_dims = dim / 2;
      check_case(options, variant == 3 ? 400 : 135);
    }
  }
}

TEST(KernelsAttentionQuantized, Variants) {
  for (int window : {0, 1, 100, 512}) {
    for (int variant = 0; variant < 3; ++variant) {
      SCOPED_TRACE(testing::Message() << "window " << window << " variant " << variant);
      Options options;
      options.window = window;
      options.bits = variant == 1 ? 4 : 8;
      options.dim = variant == 2 ? 128 : 64;
      options.group = variant == 1 ? 32 : 64;
      options.norm = options.sinks = variant == 1;
      options.softcap = variant == 2 ? 30.0f : 0.0f;
      options.heads = 4;
      options.kv_heads = 2;
      check_case(options, 700);
    }
  }
}

// Nothing between the input and the cache: what is stored must be what MLX makes of the same rows.
TEST(KernelsAttentionQuantized, QuantizesAsMlxDoes) {
  namespace mx = mlx::core;
  constexpr int kTokens = 300;
  for (int bits : {8, 4}) {
    for (auto [dim, group] : {std::pair{64, 64}, {64, 32}, {128, 128}, {128, 64}, {256, 32}}) {
      Options options;
      options.heads = options.kv_heads = 2;
      options.dim = dim;
      options.rope_dims = 0;
      options.bits = bits;
      options.group = group;
      std::vector<float> source = Model(options).tokens(kTokens, unsigned(bits * dim + group));
      const size_t row = Model(options).width();
      for (int t = 0; t < kTokens; ++t) {  // of many kinds
        for (size_t i = 0; i < row; ++i) {
          float& x = source[size_t(t) * row + i];
          switch (t % 12) {
            case 0: x = 0; break;
            case 1: x = float(t) * 0.37f; break;                 // constant
            case 2: x = -2.5f; break;
            case 3: x = std::abs(x); break;
            case 4: x = -std::abs(x) - 3; break;
            case 5: x *= 1e-8f; break;                           // below the smallest scale
            case 6: x *= 1000; break;
            case 7: x += i % 32 == 7 ? 40.0f : 0.0f; break;      // outliers
            case 8: x = std::round(x * 4) / 8; break;            // ties
            case 9: x = i % 2 == 0 ? 1.0f : -1.0f; break;        // edges of equal magnitude
            default: break;
          }
        }
      }
      for (KvDtype dtype : {KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16}) {
        SCOPED_TRACE(testing::Message() << dim << " group " << group << " bits " << bits << " " << kv_dtype_name(dtype));
        options.dtype = dtype;
        const Model model(options);
        Cache cache(model.spec, kTokens);
        run_in_chunks(ThreadPool::shared(), model, source, kTokens, 100, cache);
        const size_t width = size_t(dim), words = width * size_t(bits) / 8;
        const size_t scales = size_t(dim / group) * kv_dtype_size(dtype);
        const mx::Dtype type = dtype == KvDtype::kF32 ? mx::float32 : dtype == KvDtype::kF16 ? mx::float16 : mx::bfloat16;
        // [tokens][heads and kv heads][dim], keys and values at heads 2 to 5.
        const mx::array rows(source.data(), {kTokens, 6, dim}, mx::float32);
        std::vector<mx::array> parts = mx::quantize(rows, group, bits, "affine", std::nullopt, mx::Device::cpu);
        for (size_t i = 1; i < 3; ++i) parts[i] = mx::astype(parts[i], type, mx::Device::cpu);
        for (mx::array& part : parts) part = mx::contiguous(part, false, mx::Device::cpu);
        mx::eval(parts);
        const auto expect_equal = [&](const std::byte* got, size_t part, int t, size_t head, size_t size) {
          const auto* all = reinterpret_cast<const std::byte*>(part == 0 ? static_cast<const void*>(parts[0].data<uint32_t>())
                                                                         : parts[part].data<void>());
          const size_t at = size_t(kSegmentTokens) * (head % 2) + size_t(t % kSegmentTokens);
          ASSERT_EQ(0, std::memcmp(got + at * size, all + (size_t(t) * 6 + head) * size, size))
              << "part " << part << " token " << t << " head " << head;
        };
        for (int t = 0; t < kTokens; ++t) {
          const KvRunView& run = cache.runs[size_t(t / kSegmentTokens)];
          for (size_t head = 2; head < 6; ++head) {
            expect_equal(head < 4 ? run.keys : run.values, 0, t, head, words);
            expect_equal(head < 4 ? run.key_scales : run.value_scales, 1, t, head, scales);
            expect_equal(head < 4 ? run.key_biases : run.value_biases, 2, t, head, scales);
          }
        }
      }
    }
  }
}

// The primitive finds a layer's six tensors in a run by their offsets, at once or as a node of the graph, and leaves an input
// alone that others hold.
TEST(KernelsAttentionQuantized, NodeOverQuantizedRuns) {
  namespace mx = mlx::core;
  Options options;
  options.bits = 4;
  const Model model(options);
  constexpr int kTokens = 300;
  const std::vector<float> source = model.tokens(kTokens, 9);
  Cache cache(model.spec, kTokens);
  const std::vector<float> expected = run_in_chunks(ThreadPool::shared(), model, source, kTokens, kTokens, cache);

  const size_t rows = size_t(kSegmentTokens) * 64 / 2, scales = size_t(kSegmentTokens) * 2, before = 128;
  std::vector<std::vector<std::byte>> memory(2, std::vector<std::byte>(before + 2 * (rows + 2 * scales), std::byte{0xff}));
  SequenceRuns sequence;
  sequence.n = kTokens;
  for (auto& bytes : memory) sequence.runs.push_back({bytes.data(), bytes.size(), nullptr});
  sequence.key_offset = before;  // as in a file: keys, their scales and biases, then the values'
  sequence.key_scale_offset = before + rows;
  sequence.key_bias_offset = sequence.key_scale_offset + scales;
  sequence.value_offset = sequence.key_bias_offset + scales;
  sequence.value_scale_offset = sequence.value_offset + rows;
  sequence.value_bias_offset = sequence.value_scale_offset + scales;
  const mx::array qkv(source.data(), {kTokens, int(model.width())}, mx::float32);
  const auto spec = std::make_shared<const AttentionSpec>(model.spec);
  const mx::array out = attention(qkv, spec, {sequence});
  ASSERT_TRUE(out.is_available());
  EXPECT_EQ(0, std::memcmp(out.data<float>(), expected.data(), expected.size() * sizeof(float)));
  EXPECT_EQ(0, std::memcmp(qkv.data<float>(), source.data(), source.size() * sizeof(float)));
  mx::array later = attention(qkv + mx::array(0.0f), spec, {sequence});
  EXPECT_FALSE(later.is_available());
  mx::eval(later);
  EXPECT_EQ(0, std::memcmp(later.data<float>(), expected.data(), expected.size() * sizeof(float)));
  for (size_t i = 0; i < 2; ++i) {
    const std::byte* at = memory[i].data();
    const KvRunView& run = cache.runs[i];
    EXPECT_EQ(0, std::memcmp(at + sequence.key_offset, run.keys, rows));
    EXPECT_EQ(0, std::memcmp(at + sequence.value_offset, run.values, rows));
    EXPECT_EQ(0, std::memcmp(at + sequence.key_scale_offset, run.key_scales, scales));
    EXPECT_EQ(0, std::memcmp(at + sequence.key_bias_offset, run.key_biases, scales));
    EXPECT_EQ(0, std::memcmp(at + sequence.value_scale_offset, run.value_scales, scales));
    EXPECT_EQ(0, std::memcmp(at + sequence.value_bias_offset, run.value_biases, scales));
    EXPECT_EQ(at[before - 1], std::byte{0xff});
  }
  sequence.runs[1].size -= 1;
  EXPECT_THROW(attention(qkv, spec, {sequence}), Error);
}

TEST(KernelsAttentionQuantized, RejectsHeadsThatGroupsDontDivide) {
  const auto message = [](int dim, int bits, int group) -> std::string {
    Model model(Options{});
    model.spec.head_dim = dim;
    model.spec.kv_bits = bits;
    model.spec.kv_group = group;
    try {
      attention(nullptr, model.spec, {}, nullptr);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message(64, 8, 64), "");
  EXPECT_NE(message(80, 8, 64).find("a head of 80 dims can't be quantized in groups of 64"), std::string::npos);
  EXPECT_NE(message(64, 4, 128).find("a head of 64 dims can't be quantized in groups of 128"), std::string::npos);
  EXPECT_NE(message(80, 8, 16).find("groups of 32, 64 or 128"), std::string::npos);
  EXPECT_NE(message(64, 6, 64).find("8 or 4 bits"), std::string::npos);

  Options options;
  options.bits = 8;
  const Model model(options);
  Cache cache(model.spec, 1);
  cache.runs[0].value_biases = nullptr;
  std::vector<float> qkv(model.width()), out(model.out_width());
  const AttentionSequence sequence{0, 1, 0, cache.runs};
  EXPECT_THROW(attention(qkv.data(), model.spec, std::span(&sequence, 1), out.data()), Error);
}

}  // namespace
}  // namespace torpor::kernels
