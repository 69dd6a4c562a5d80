// Formats of weights: what a weight stands for, and its products with activations of both kinds.

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/packed_linear.h"
#include "linear_reference.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

namespace mx = mlx::core;

TEST(KernelsFormats, EveryFormatHoldsWhatMlxDequantizes) {
  std::mt19937 rng(14);
  for (const auto& [bits, group, type] : formats()) {
    if (group == 16) continue;  // not MLX's
    for (const auto& [n, k] : {std::pair{17, group}, {3, 5 * 128}}) {
      SCOPED_TRACE(std::to_string(bits) + " bits, group " + std::to_string(group) + ", K " + std::to_string(k));
      const TestWeight w(type, n, k, rng, bits, group);
      const auto packed = PackedLinear::pack({w.source});
      const mx::array words(reinterpret_cast<const uint32_t*>(w.weight.data()), {n, k * bits / 32}, mx::uint32);
      const mx::array scales(w.group_scales.data(), {n, k / group}, mx::float32);
      const mx::array biases(w.group_biases.data(), {n, k / group}, mx::float32);
      mx::array want = mx::dequantize(words, scales, biases, group, bits, "affine", {}, {}, mx::Device::cpu);
      want.eval();
      std::vector<float> row(static_cast<size_t>(k));
      for (int i = 0; i < n; ++i) {
        packed->dequantize_row(i, row.data());
        for (int j = 0; j < k; ++j) ASSERT_EQ(row[j], want.data<float>()[i * k + j]) << "row " << i << " column " << j;
      }
      // In as many bits as it has: and per group and row two f16 numbers.
      EXPECT_EQ(packed->nbytes(), size_t((n + 15) / 16 * 16) * size_t(k * bits / 8 + k / group * 4));
    }
  }
}

TEST(KernelsFormats, FloatsOfFewBitsAreWhatMlxDequantizes) {
  for (const auto& [type, bits, group] : {std::tuple{Type::kMxfp4, 4, 32}, {Type::kMxfp8, 8, 32}, {Type::kNvfp4, 4, 16}}) {
    SCOPED_TRACE(type_name(type));
    // Every code, with every scale: a row for each of these.
    const int k = 256;
    std::vector<uint8_t> codes(size_t(256 * k * bits / 8)), scales(size_t(256 * k / group));
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = uint8_t(bits == 8 ? i : (i % 8 * 2) | (i % 8 * 2 + 1) << 4);
    for (size_t i = 0; i < scales.size(); ++i) scales[i] = uint8_t(i / size_t(k / group));
    WeightSource source;
    source.type = type;
    source.n = 256;
    source.k = k;
    source.bits = bits;
    source.group = group;
    source.weight = codes.data();
    source.scales = scales.data();
    const auto packed = PackedLinear::pack({source});
    EXPECT_EQ(packed->nbytes(), codes.size() + scales.size());
    const mx::array words(reinterpret_cast<const uint32_t*>(codes.data()), {256, k * bits / 32}, mx::uint32);
    const mx::array of_groups(scales.data(), {256, k / group}, mx::uint8);
    mx::array want = mx::dequantize(words, of_groups, {}, group, bits, type_name(type), {}, mx::float32, mx::Device::cpu);
    want.eval();
    std::vector<float> row(static_cast<size_t>(k));
    for (int i = 0; i < 256; ++i) {
      packed->dequantize_row(i, row.data());
      for (int j = 0; j < k; ++j) {
        const float expected = want.data<float>()[i * k + j];
        if (std::isnan(expected)) {
          ASSERT_TRUE(std::isnan(row[j])) << "scale " << i << " column " << j;
        } else {
          ASSERT_EQ(std::bit_cast<uint32_t>(row[j]), std::bit_cast<uint32_t>(expected)) << "scale " << i << " column " << j;
        }
      }
    }
    // A code that is no number reaches the outputs of its row, and only those.
    if (bits != 8) continue;
    const std::vector<float> x(size_t(k), 0.0f);
    std::vector<float> y(256);
    linear(x.data(), 1, *packed, nullptr, y.data());
    EXPECT_TRUE(std::isnan(y[127]));
    codes[127 * 256 + 127] = codes[127 * 256 + 255] = 0;
    linear(x.data(), 1, *PackedLinear::pack({source}), nullptr, y.data());
    EXPECT_EQ(y[127], 0);
    EXPECT_TRUE(std::isnan(y[126]));
  }
}

TEST(KernelsFormats, FloatsOfFewBits) {
  const RestoreThreads restore;
  std::mt19937 rng(16);
  for (const Type type : {Type::kMxfp4, Type::kMxfp8, Type::kNvfp4}) {
    for (const auto& [n, k] : {std::pair{17, 32}, {16 * 9 + 5, 96}, {40, 640}}) {
      SCOPED_TRACE(std::string(type_name(type)) + ", N " + std::to_string(n) + " K " + std::to_string(k));
      const TestWeight w(type, n, k, rng, 0, 0, Type::kF16, n == 40);
      check_linear({&w}, n == 40, rng, n == 17 ? Activations::kInt16 : Activations::kF32, kFewerRows, {1, 3});
      if (HasFatalFailure()) return;
    }
  }
  // Beside others, and as gate and up.
  const TestWeight a(Type::kMxfp4, 20, 128, rng), b(Type::kNvfp4, 7, 128, rng), c(Type::kAffine, 9, 128, rng, 5, 64),
      d(Type::kMxfp8, 9, 128, rng);
  check_linear({&a, &b, &c, &d}, false, rng, Activations::kF32, kFewerRows, {2});
}

TEST(KernelsFormats, WeightsThatAreReadAsBytes) {
  const RestoreThreads restore;
  std::mt19937 rng(15);
  std::vector<Format> all = formats({2, 3, 5, 6});
  for (const int bits : {4, 8}) all.push_back({bits, 16});
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& [bits, group, type] = all[i];
    const Type scale_type = std::array{Type::kF32, Type::kF16, Type::kBF16}[i % 3];
    const auto [n, k] = std::array{std::pair{17, group}, std::pair{16 * 9 + 5, 384}, std::pair{40, 256 + group}}[i % 3];
    SCOPED_TRACE(std::to_string(bits) + " bits, group " + std::to_string(group) + ", scales " + type_name(scale_type) +
                 ", N " + std::to_string(n) + " K " + std::to_string(k));
    const TestWeight w(type, n, k, rng, bits, group, scale_type, i % 2 == 0);
    check_linear({&w}, i % 2 == 0, rng, Activations::kF32, kFewerRows, {1, 3});
    if (HasFatalFailure()) return;
  }
}

TEST(KernelsFormats, QuantizedWeightsWith16BitActivations) {
  const RestoreThreads restore;
  std::mt19937 rng(12);
  for (const int bits : {4, 8}) {
    for (const int group : {32, 64, 128}) {
      for (const Type scale_type : {Type::kF32, Type::kF16, Type::kBF16}) {
        SCOPED_TRACE(std::to_string(bits) + " bits, group " + std::to_string(group) + ", scales " + type_name(scale_type));
        const TestWeight w(Type::kAffine, 39, 3 * 128, rng, bits, group, scale_type, true);
        check_linear({&w}, true, rng, Activations::kInt16);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// So every target has the same integers, and those that fuse multiply-adds the same bits.
TEST(KernelsFormats, SumsOf16BitActivationsAreTheSpecifiedOnesToTheBit) {
  const bool fused = lane_class().ends_with("-fma");
  std::mt19937 rng(13);
  std::vector<Format> all = formats();
  for (const Type type : {Type::kMxfp4, Type::kNvfp4}) all.push_back({4, type == Type::kMxfp4 ? 32 : 16, type});
  for (const auto& [bits, group, type] : all) {
    const bool in_place = bits % 4 == 0 && type == Type::kAffine;
    for (const auto& [n, k] : {std::pair{in_place ? 16 * 5 + 3 : 19, in_place ? 1152 : 384}, {40, 128}}) {
      SCOPED_TRACE(std::string(type_name(type)) + ", " + std::to_string(bits) + " bits, group " + std::to_string(group) +
                   ", K " + std::to_string(k));
      const TestWeight w(type, n, k, rng, bits, group);
      const auto packed = PackedLinear::pack({w.source}, Activations::kInt16);
      const int most = 45;
      const std::vector<float> x = random_rows(most, k, rng);
      std::vector<float> want(size_t(most) * n), y(size_t(most) * n);
      for (size_t i = 0; i < want.size(); ++i) want[i] = w.of_16_bits(x.data() + i / n * k, int(i % n), fused);
      for (const int m : {1, 2, 3, 4, 5, 8, 9, 16, 33, most}) {
        linear(x.data(), m, *packed, nullptr, y.data());
        for (size_t i = 0; i < size_t(m) * n; ++i) {
          ASSERT_EQ(y[i], want[i]) << "M " << m << " row " << i / n << " column " << i % n;
        }
      }
    }
  }
}

TEST(KernelsFormats, Activations16AtTheExtremes) {
  // All weights 1 (q = 255, scale = 1, bias = -254): a sum of the largest products, then zeros, then what isn't finite.
  const std::vector<uint32_t> words(16 * 128 / 4, 0xffffffffu);
  const std::vector<float> scales(16, 1.0f), biases(16, -254.0f);
  WeightSource source;
  source.type = Type::kAffine;
  source.n = 16;
  source.k = source.group = 128;
  source.bits = 8;
  source.scale_type = Type::kF32;
  source.weight = words.data();
  source.scales = scales.data();
  source.biases = biases.data();
  const auto packed = PackedLinear::pack({source}, Activations::kInt16);
  // One row, and enough for the kernel of many.
  for (const int m : {1, 17}) {
    std::vector<float> x(size_t(m) * 128, -2.0f), y(size_t(m) * 16);
    linear(x.data(), m, *packed, nullptr, y.data());
    EXPECT_NEAR(y.back(), -256.0f, 1e-2);
    for (const float small : {0.0f, 1e-38f, 1e-44f}) {
      x.assign(x.size(), small);
      linear(x.data(), m, *packed, nullptr, y.data());
      EXPECT_NEAR(y.back(), 0.0f, 1e-30) << small;
    }
    for (const float odd : {NAN, -NAN, INFINITY, -INFINITY}) {
      for (int i = 0; i < 128; ++i) {
        x.assign(x.size(), 1.0f);
        x[size_t(m - 1) * 128 + i] = odd;
        linear(x.data(), m, *packed, nullptr, y.data());
        EXPECT_FALSE(std::isfinite(y.back())) << odd << " at " << i;
        if (m > 1) {
          EXPECT_NEAR(y[15], 128.0f, 1e-2) << "the first row";
        }
      }
    }
  }
}

TEST(KernelsFormats, DequantizeRow) {
  std::mt19937 rng(7);
  const TestWeight a(Type::kAffine, 20, 128, rng, 4, 64), b(Type::kAffine, 21, 128, rng, 8, 32, Type::kBF16),
      c(Type::kF16, 3, 128, rng);
  const auto packed = PackedLinear::pack({a.source, b.source, c.source});
  EXPECT_GT(packed->nbytes(), size_t(128 * (10 + 21)));
  std::vector<float> row(128);
  int at = 0;
  for (const TestWeight* w : {&a, &b, &c}) {
    for (int i = 0; i < w->source.n; ++i, ++at) {
      packed->dequantize_row(at, row.data());
      for (int k = 0; k < 128; ++k) {
        ASSERT_NEAR(row[k], w->values[size_t(i) * 128 + k], 2 * kUnit * w->magnitudes[size_t(i) * 128 + k]);
      }
    }
  }
  EXPECT_THROW(packed->dequantize_row(at, row.data()), Error);
  EXPECT_THROW(packed->dequantize_row(-1, row.data()), Error);
}

}  // namespace
}  // namespace torpor::kernels
