// Every linear kernel against a plain f64 reference, and rows against themselves: a row's bits must depend on neither M
// nor the number of threads. CTest runs this program once per forced CPU target as well.

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/moe.h"
#include "kernels/packed_layout.h"
#include "kernels/packed_linear.h"
#include "kernels/primitives.h"
#include "kernels/thread_pool.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

using Type = WeightSource::Type;

constexpr double kUnit = 0x1p-24;  // half an ulp of 1 in f32

const char* type_name(Type type) {
  switch (type) {
    case Type::kF32: return "f32";
    case Type::kF16: return "f16";
    case Type::kBF16: return "bf16";
    case Type::kAffine: return "affine";
    case Type::kMxfp4: return "mxfp4";
    case Type::kMxfp8: return "mxfp8";
    case Type::kNvfp4: return "nvfp4";
  }
  return "";
}

/// `value` in one of the three float types, and what it became.
struct Stored {
  uint32_t bits;
  double value;
};

Stored store(float value, Type type) {
  if (type == Type::kF32) return {std::bit_cast<uint32_t>(value), value};
  if (type == Type::kBF16) {
    const uint32_t top = std::bit_cast<uint32_t>(value) & 0xffff0000u;
    return {top >> 16, std::bit_cast<float>(top)};
  }
  // Truncated to 10 bits of mantissa; the tests' values are normal f16 numbers or zero.
  if (value == 0) return {0, 0.0};
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const int exponent = int((u >> 23) & 0xff) - 127;
  if (exponent < -14) return {0, 0.0};
  const uint32_t half = ((u >> 16) & 0x8000) | (uint32_t(exponent + 15) << 10) | ((u >> 13) & 0x3ff);
  return {half, std::bit_cast<float>(u & 0xffffe000u)};
}

void append(std::vector<std::byte>& out, uint32_t bits, Type type) {
  const size_t size = type == Type::kF32 ? 4 : 2, at = out.size();
  out.resize(at + size);
  std::memcpy(out.data() + at, &bits, size);
}

/// The `i`-th of a stream of `bits` each, low bits first.
uint32_t in_stream(const std::vector<uint32_t>& words, size_t i, int bits) {
  const size_t at = i * size_t(bits), word = at / 32;
  const uint64_t two = words[word] | uint64_t(word + 1 < words.size() ? words[word + 1] : 0) << 32;
  return uint32_t(two >> (at % 32)) & ((1u << bits) - 1);
}

/// A float of `bits` in all with so many of exponent and mantissa, as the specification of the OCP's formats has it.
double small_float(uint32_t code, int bits, int mantissa_bits, int bias) {
  const uint32_t magnitude = code & ((1u << (bits - 1)) - 1), mantissa = magnitude & ((1u << mantissa_bits) - 1);
  const int exponent = int(magnitude >> mantissa_bits);
  const double value = exponent == 0 ? std::ldexp(double(mantissa), 1 - bias - mantissa_bits)
                                     : std::ldexp(double(mantissa + (1u << mantissa_bits)), exponent - bias - mantissa_bits);
  return code >> (bits - 1) != 0 ? -value : value;
}
double e2m1(uint32_t code) { return small_float(code, 4, 1, 1); }
double e4m3(uint32_t code) { return small_float(code, 8, 3, 7); }

/// A random weight in a checkpoint's form, its exact values, and the magnitudes a rounding error is relative to.
struct TestWeight {
  std::vector<std::byte> weight, scales, biases, bias;
  std::vector<double> values, magnitudes, bias_values;
  std::vector<int> q;                               // of quantized weights: the integers, and per group
  std::vector<float> group_scales, group_biases;  // what they stand for
  WeightSource source;

  TestWeight(Type type, int n, int k, std::mt19937& rng, int bits = 0, int group = 0, Type scale_type = Type::kF16,
             bool with_bias = false, Type bias_type = Type::kF32) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    source.type = type;
    source.n = n;
    source.k = k;
    if (type == Type::kMxfp4 || type == Type::kMxfp8 || type == Type::kNvfp4) {
      make_small_floats(rng, type == Type::kMxfp8 ? 8 : 4, type == Type::kNvfp4 ? 16 : 32);
    } else if (type != Type::kAffine) {
      for (int i = 0; i < n * k; ++i) {
        const Stored s = store(uniform(rng), type);
        append(weight, s.bits, type);
        values.push_back(s.value);
        magnitudes.push_back(std::abs(s.value));
      }
    } else {
      source.bits = bits;
      source.group = group;
      source.scale_type = scale_type;
      std::vector<uint32_t> words(size_t(n) * k * bits / 32);
      for (uint32_t& w : words) w = uint32_t(rng());
      weight.resize(words.size() * 4);
      std::memcpy(weight.data(), words.data(), weight.size());
      for (int g = 0; g < n * k / group; ++g) {
        const Stored s = store(uniform(rng) / float(1 << bits), scale_type), b = store(uniform(rng), scale_type);
        append(scales, s.bits, scale_type);
        append(biases, b.bits, scale_type);
        group_scales.push_back(float(s.value));
        group_biases.push_back(float(b.value));
        for (int i = g * group; i < (g + 1) * group; ++i) {
          q.push_back(int(in_stream(words, size_t(i), bits)));
          values.push_back(s.value * q.back() + b.value);
          magnitudes.push_back(std::abs(s.value * q.back()) + std::abs(b.value));
        }
      }
      source.scales = scales.data();
      source.biases = biases.data();
    }
    source.weight = weight.data();
    if (with_bias) {
      for (int i = 0; i < n; ++i) {
        const Stored s = store(uniform(rng), bias_type);
        append(bias, s.bits, bias_type);
        bias_values.push_back(s.value);
      }
      source.bias = bias.data();
      source.bias_type = bias_type;
    }
  }

  void make_small_floats(std::mt19937& rng, int bits, int group) {
    source.bits = bits;
    source.group = group;
    std::vector<uint32_t> words(size_t(source.n) * source.k * bits / 32);
    for (uint32_t& w : words) {
      w = uint32_t(rng());
      if (bits == 8) w &= ~0x08080808u;  // no NaN
    }
    weight.resize(words.size() * 4);
    std::memcpy(weight.data(), words.data(), weight.size());
    for (int g = 0; g < source.n * source.k / group; ++g) {
      // Of the size of what they multiply's inverse.
      const uint8_t byte = uint8_t(group == 16 ? 0x08 + rng() % 0x30 : 127 - (bits == 8 ? 8 : 2) - rng() % 4);
      scales.push_back(std::byte(byte));
      const double scale = group == 16 ? e4m3(byte) : std::ldexp(1.0, byte - 127);
      // Kernels multiply codes of 4 bits as integers, 12 more than twice the code.
      group_scales.push_back(float(scale / 2));
      group_biases.push_back(float(scale * -6));
      for (int i = g * group; i < (g + 1) * group; ++i) {
        const uint32_t code = in_stream(words, size_t(i), bits);
        values.push_back((bits == 8 ? e4m3(code) : e2m1(code)) * scale);
        magnitudes.push_back(bits == 8 ? std::abs(values.back()) : std::abs(values.back()) + 12 * scale);
        q.push_back(bits == 8 ? 0 : int(2 * e2m1(code)) + 12);
      }
    }
    source.scales = scales.data();
  }

  /// Output `column` of input row `x`, and the bound on an f32 kernel's error: a rounding of the sum of
  /// magnitudes per multiply-add (k, and one per group) and a few for the weights and the groups' sums.
  std::pair<double, double> reference(const float* x, int column, Activations activations = Activations::kF32) const {
    const std::vector<double> row = as_multiplied(x, activations);
    double sum = 0, magnitude = 0;
    const size_t at = size_t(column) * source.k;
    for (int i = 0; i < source.k; ++i) {
      sum += row[i] * values[at + i];
      magnitude += std::abs(row[i]) * magnitudes[at + i];
    }
    if (source.bias != nullptr) {
      sum += bias_values[column];
      magnitude += std::abs(bias_values[column]);
    }
    return {sum, (source.k * 33.0 / 32 + 20) * kUnit * magnitude};
  }

  /// What the kernel takes row `x` for: quantized weights meet 32767ths of a group's largest magnitude with kInt16.
  std::vector<double> as_multiplied(const float* x, Activations activations) const {
    std::vector<double> row(x, x + source.k);
    if (activations == Activations::kF32 || source.group == 0 || source.type == Type::kMxfp8) return row;
    for (int g = 0; g < source.k / source.group; ++g) {
      const Rounded group = rounded(x, g);
      for (int i = 0; i < source.group; ++i) {
        double& value = row[g * source.group + i];
        EXPECT_LE(std::abs(group.values[i] * double(group.scale) - value), 0.51 * double(group.scale));
        value = group.values[i] * double(group.scale);
      }
    }
    return row;
  }

  /// Group `g` of row `x` as 16-bit integers.
  struct Rounded {
    std::vector<int> values;
    float scale;
  };
  Rounded rounded(const float* x, int g) const {
    float most = 0;
    for (int i = g * source.group; i < (g + 1) * source.group; ++i) most = std::max(most, std::abs(x[i]));
    Rounded out{{}, most / 32767};
    for (int i = g * source.group; i < (g + 1) * source.group; ++i) out.values.push_back(int(std::lrint(x[i] * (32767 / most))));
    return out;
  }

  /// Output `column` of input row `x` as docs/models.md says that 16-bit activations are computed, to the bit.
  float of_16_bits(const float* x, int column, bool fused) const {
    const auto add = [&](float a, float b, float sum) { return fused ? std::fma(a, b, sum) : a * b + sum; };
    const int groups = source.k / source.group;
    float sum = 0;
    for (int g = 0; g < groups; ++g) {
      const Rounded group = rounded(x, g);
      int32_t dot = 0, total = 0;
      for (int i = 0; i < source.group; ++i) {
        dot += group.values[i] * q[size_t(column) * source.k + g * source.group + i];
        total += group.values[i];
      }
      sum = add(float(dot), group_scales[size_t(column) * groups + g] * group.scale, sum);
      sum = add(group.scale * float(total), group_biases[size_t(column) * groups + g], sum);
    }
    return sum;
  }
};

std::vector<float> random_rows(int m, int k, std::mt19937& rng) {
  std::vector<float> x(size_t(m) * k);
  for (float& v : x) v = std::uniform_real_distribution<float>(-1, 1)(rng);
  return x;
}

struct RestoreThreads {
  int before = ThreadPool::shared().size();
  ~RestoreThreads() { ThreadPool::resize_shared(before); }
};

const std::vector<int> kRows{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 24, 513};
/// Of formats whose products are other formats': each kernel, and two blocks of rows.
const std::vector<int> kFewerRows{1, 2, 5, 8, 9, 150};

/// linear() of every M against the reference, against its own rows one at a time, and with as many threads.
void check_linear(const std::vector<const TestWeight*>& weights, bool with_residual, std::mt19937& rng,
                  Activations activations = Activations::kF32, const std::vector<int>& numbers_of_rows = kRows,
                  const std::vector<int>& numbers_of_threads = {1, 2, 3, 16}) {
  std::vector<WeightSource> sources;
  for (const TestWeight* w : weights) sources.push_back(w->source);
  const auto packed = PackedLinear::pack(sources, activations);
  const int n = packed->n(), k = packed->k(), most = numbers_of_rows.back();
  const std::vector<float> x = random_rows(most, k, rng), residual = random_rows(most, n, rng);
  const float* added = with_residual ? residual.data() : nullptr;

  ThreadPool::resize_shared(2);
  std::vector<float> whole(size_t(most) * n, NAN);
  linear(x.data(), most, *packed, added, whole.data());
  for (int row = 0; row < most; row += row < 20 ? 1 : 37) {
    int column = 0;
    for (const TestWeight* w : weights) {
      for (int i = 0; i < w->source.n; ++i, ++column) {
        auto [want, bound] = w->reference(x.data() + size_t(row) * k, i, activations);
        const size_t at = size_t(row) * n + column;
        if (with_residual) {
          want += residual[at];
          bound += kUnit * (std::abs(want) + 1);
        }
        ASSERT_NEAR(whole[at], want, bound) << "row " << row << " column " << column;
      }
    }
  }
  std::vector<float> y(size_t(most) * n);
  for (const int threads : numbers_of_threads) {
    ThreadPool::resize_shared(threads);
    for (const int m : numbers_of_rows) {
      std::fill(y.begin(), y.end(), -7.0f);
      linear(x.data(), m, *packed, added, y.data());
      ASSERT_EQ(std::memcmp(y.data(), whole.data(), size_t(m) * n * sizeof(float)), 0) << "M " << m << " threads " << threads;
      for (size_t i = size_t(m) * n; i < y.size(); ++i) ASSERT_EQ(y[i], -7.0f) << "wrote past M " << m;
    }
    for (int row = 0; row < most; row += 29) {
      linear(x.data() + size_t(row) * k, 1, *packed, added ? added + size_t(row) * n : nullptr, y.data());
      ASSERT_EQ(std::memcmp(y.data(), whole.data() + size_t(row) * n, size_t(n) * sizeof(float)), 0)
          << "row " << row << " alone, threads " << threads;
    }
  }
}

struct Format {
  int bits, group;
  Type type = Type::kAffine;
};
/// All that there are. Those of 4 and 8 bits are read in place, the others as bytes.
std::vector<Format> formats(std::initializer_list<int> widths = {2, 3, 4, 5, 6, 8}) {
  std::vector<Format> all;
  for (const int bits : widths) {
    for (const int group : {16, 32, 64, 128}) all.push_back({bits, group});
  }
  return all;
}

TEST(KernelsLinear, EveryFormatHoldsWhatMlxDequantizes) {
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

TEST(KernelsLinear, FloatsOfFewBitsAreWhatMlxDequantizes) {
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

TEST(KernelsLinear, FloatsOfFewBits) {
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

TEST(KernelsLinear, WeightsThatAreReadAsBytes) {
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

TEST(KernelsLinear, QuantizedWeights) {
  const RestoreThreads restore;
  std::mt19937 rng(1);
  for (const int bits : {4, 8}) {
    for (const int group : {32, 64, 128}) {
      for (const Type scale_type : {Type::kF32, Type::kF16, Type::kBF16}) {
        for (const auto& [n, k] : {std::pair{17, group}, {40, 9 * 128}, {16 * 15 + 5, 128}}) {
          SCOPED_TRACE(std::to_string(bits) + " bits, group " + std::to_string(group) + ", scales " + type_name(scale_type) +
                       ", N " + std::to_string(n) + " K " + std::to_string(k));
          const TestWeight w(Type::kAffine, n, k, rng, bits, group, scale_type);
          check_linear({&w}, false, rng);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(KernelsLinear, QuantizedWeightsWith16BitActivations) {
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
TEST(KernelsLinear, SumsOf16BitActivationsAreTheSpecifiedOnesToTheBit) {
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

TEST(KernelsLinear, Activations16AtTheExtremes) {
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

TEST(KernelsLinear, FloatWeightsOfOddSizes) {
  const RestoreThreads restore;
  std::mt19937 rng(2);
  for (const Type type : {Type::kF32, Type::kF16, Type::kBF16}) {
    for (const auto& [n, k] : {std::pair{1, 1}, {16, 7}, {15, 64}, {33, 301}, {70, 600}}) {
      SCOPED_TRACE(std::string(type_name(type)) + " N " + std::to_string(n) + " K " + std::to_string(k));
      const TestWeight w(type, n, k, rng);
      check_linear({&w}, false, rng);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(KernelsLinear, BiasAndResidual) {
  const RestoreThreads restore;
  std::mt19937 rng(3);
  for (const Type bias_type : {Type::kF32, Type::kF16, Type::kBF16}) {
    const TestWeight w(Type::kAffine, 50, 96, rng, 4, 32, Type::kF16, true, bias_type);
    check_linear({&w}, true, rng);
    if (HasFatalFailure()) return;
  }
}

TEST(KernelsLinear, StackedProjections) {
  const RestoreThreads restore;
  std::mt19937 rng(4);
  const TestWeight q(Type::kAffine, 36, 128, rng, 4, 32, Type::kF16, true), k(Type::kAffine, 12, 128, rng, 4, 32),
      v(Type::kAffine, 12, 128, rng, 8, 64, Type::kBF16), f(Type::kF32, 5, 128, rng);
  check_linear({&q, &k}, true, rng);
  check_linear({&q, &k, &v, &f}, true, rng);
}

TEST(KernelsLinear, ResidualInPlace) {
  std::mt19937 rng(5);
  const TestWeight w(Type::kAffine, 40, 64, rng, 4, 32);
  const auto packed = PackedLinear::pack({w.source});
  const std::vector<float> x = random_rows(9, 64, rng), residual = random_rows(9, 40, rng);
  std::vector<float> apart(9 * 40), in_place = residual;
  linear(x.data(), 9, *packed, residual.data(), apart.data());
  linear(x.data(), 9, *packed, in_place.data(), in_place.data());
  EXPECT_EQ(apart, in_place);
}

double activate(Activation activation, double x) {
  if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

TEST(KernelsLinear, GatedProjections) {
  const RestoreThreads restore;
  std::mt19937 rng(6);
  for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    for (const auto& [n, k, mixed] : {std::tuple{8, 32, false}, {43, 160, false}, {20, 64, true}}) {
      const TestWeight gate(Type::kAffine, n, k, rng, 4, 32, Type::kF16, n == 43),
          up(Type::kAffine, n, k, rng, mixed ? 8 : 4, 32, Type::kF16, n == 43);
      const auto packed = PackedLinear::pack_gated(gate.source, up.source);
      ASSERT_EQ(packed->n(), n);
      const int most = kRows.back();
      const std::vector<float> x = random_rows(most, k, rng);
      std::vector<float> whole(size_t(most) * n), y(size_t(most) * n);
      ThreadPool::resize_shared(2);
      gated_linear(x.data(), most, *packed, activation, whole.data());
      for (int row = 0; row < most; row += 19) {
        for (int column = 0; column < n; ++column) {
          const auto [g, g_bound] = gate.reference(x.data() + size_t(row) * k, column);
          const auto [u, u_bound] = up.reference(x.data() + size_t(row) * k, column);
          const double a = activate(activation, g), want = a * u;
          // The slope of either activation stays below 1.13; 16 roundings for the activation itself.
          const double bound = (1.2 * g_bound + 16 * kUnit * (std::abs(a) + kUnit)) * (std::abs(u) + u_bound) + std::abs(a) * u_bound;
          ASSERT_NEAR(whole[size_t(row) * n + column], want, bound) << "row " << row << " column " << column;
        }
      }
      for (const int threads : {1, 2}) {
        ThreadPool::resize_shared(threads);
        for (const int m : kRows) {
          std::fill(y.begin(), y.end(), -7.0f);
          gated_linear(x.data(), m, *packed, activation, y.data());
          ASSERT_EQ(std::memcmp(y.data(), whole.data(), size_t(m) * n * sizeof(float)), 0) << "M " << m;
        }
        for (int row = 0; row < most; row += 31) {
          gated_linear(x.data() + size_t(row) * k, 1, *packed, activation, y.data());
          ASSERT_EQ(std::memcmp(y.data(), whole.data() + size_t(row) * n, size_t(n) * sizeof(float)), 0) << "row " << row;
        }
      }
    }
  }
}

TEST(KernelsLinear, ActivationsAtTheExtremes) {
  // x * [1 0] through gate, constant 1 through up.
  const std::vector<float> gate{1, 0}, up{0, 1};
  WeightSource g, u;
  g.n = u.n = 1;
  g.k = u.k = 2;
  g.weight = gate.data();
  u.weight = up.data();
  const auto packed = PackedLinear::pack_gated(g, u);
  for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    for (const float v : {-3e4f, -200.0f, -88.5f, -20.0f, -1e-20f, 0.0f, 1e-20f, 3.0f, 20.0f, 90.0f, 3e4f}) {
      const float x[2] = {v, 1};
      float y = NAN;
      gated_linear(x, 1, *packed, activation, &y);
      const double want = activate(activation, v);
      EXPECT_NEAR(y, want, 1e-6 * std::abs(want) + 1e-6) << v;
    }
    const float nan[2] = {NAN, 1};
    float y = 0;
    gated_linear(nan, 1, *packed, activation, &y);
    EXPECT_TRUE(std::isnan(y));
  }
}

TEST(KernelsLinear, DequantizeRow) {
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

TEST(KernelsLinear, WrongWeightsAreNamed) {
  std::mt19937 rng(8);
  const TestWeight good(Type::kAffine, 16, 64, rng, 4, 32), other(Type::kAffine, 16, 32, rng, 4, 32);
  auto throws = [](const WeightSource& source) {
    try {
      PackedLinear::pack({source});
    } catch (const Error& error) {
      return error.code() == ErrorCode::kInvalidArgument;
    }
    return false;
  };
  EXPECT_FALSE(throws(good.source));
  for (auto change : std::vector<void (*)(WeightSource&)>{
           [](WeightSource& s) { s.bits = 7; }, [](WeightSource& s) { s.group = 48; }, [](WeightSource& s) { s.k = 48; },
           [](WeightSource& s) { s.n = 0; }, [](WeightSource& s) { s.scales = nullptr; },
           [](WeightSource& s) { s.weight = nullptr; }}) {
    WeightSource bad = good.source;
    change(bad);
    EXPECT_TRUE(throws(bad));
  }
  EXPECT_THROW(PackedLinear::pack({good.source, other.source}), Error);
  EXPECT_THROW(PackedLinear::pack({}), Error);
  EXPECT_THROW(PackedLinear::pack_gated(good.source, other.source), Error);
  const auto plain = PackedLinear::pack({good.source}), gated = PackedLinear::pack_gated(good.source, good.source);
  std::vector<float> x(64), y(64);
  EXPECT_THROW(linear(x.data(), 1, *gated, nullptr, y.data()), Error);
  EXPECT_THROW(gated_linear(x.data(), 1, *plain, Activation::kSilu, y.data()), Error);
}

TEST(KernelsLinear, WorkIsCutForTheThreadsThereAre) {
  for (const int threads : {1, 2, 3, 8, 16, 24, 32, 64}) {
    for (const int n : {576, 960, 2048, 3072, 9728, 49152, 151936}) {
      using Cut = std::tuple<int, int, int>;
      for (const auto& [rows, at_once, tile] : {Cut{1, 8, 1}, {1, 4, 1}, {144, 2, 12}, {144, 2, 6}, {96, 2, 12}}) {
        SCOPED_TRACE(std::to_string(threads) + " threads, " + std::to_string(n) + " outputs, " + std::to_string(rows) +
                     " rows");
        const int panels = n / 16;
        const LinearTask task = linear_task(panels, at_once, rows, tile, threads);
        const auto pieces = [](int all, int one) { return (all + one - 1) / one; };
        const int tasks = pieces(panels, task.panels) * pieces(rows, task.rows);
        EXPECT_EQ(task.rows % tile, 0);
        // Four a thread, or a panel and a tile each.
        EXPECT_GE(tasks, std::min(4 * threads, panels * pieces(rows, tile)));
        EXPECT_LE(tasks, 2 * std::max(32, 4 * threads));
        // The thread that is last has at most a third more than its share.
        const double longest = double(pieces(tasks, threads)) * task.panels * std::min(rows, task.rows);
        if (tasks >= 4 * threads) {
          EXPECT_LT(longest, 1.34 * panels * rows / threads);
        }
      }
    }
  }
  // Not 5 tasks of 8 panels, and not 18 of all rows.
  EXPECT_EQ(linear_task(36, 8, 1, 1, 24).panels, 1);
  EXPECT_EQ(linear_task(36, 2, 144, 12, 24).rows, 48);
}

/// Experts of random weights: gate, up and down; the MLP in f64.
struct TestExpert {
  TestWeight gate, up, down;
  ExpertActivation activation;

  TestExpert(ExpertActivation activation, int k, int width, std::mt19937& rng)
      : gate(Type::kMxfp4, width, k, rng, 0, 0, Type::kF16, activation == ExpertActivation::kClampedSwiGlu),
        up(Type::kMxfp4, width, k, rng, 0, 0, Type::kF16, activation == ExpertActivation::kClampedSwiGlu),
        down(Type::kAffine, k, width, rng, 4, 32, Type::kF16, activation == ExpertActivation::kClampedSwiGlu),
        activation(activation) {}

  Expert packed() const {
    const auto both = activation == ExpertActivation::kRelu2           ? PackedLinear::pack({up.source})
                      : activation == ExpertActivation::kClampedSwiGlu ? PackedLinear::pack({gate.source, up.source})
                                                                       : PackedLinear::pack_gated(gate.source, up.source);
    return {both, PackedLinear::pack({down.source})};
  }
  std::vector<double> reference(const float* x) const {
    std::vector<float> hidden;
    for (int i = 0; i < up.source.n; ++i) {
      const double g = gate.reference(x, i).first, u = up.reference(x, i).first;
      if (activation == ExpertActivation::kRelu2) {
        hidden.push_back(float(std::max(u, 0.0) * std::max(u, 0.0)));
      } else if (activation == ExpertActivation::kClampedSwiGlu) {
        const double low = std::min(g, 7.0), clamped = std::clamp(u, -7.0, 7.0);
        hidden.push_back(float(low / (1 + std::exp(-1.702 * low)) * (clamped + 1)));
      } else {
        hidden.push_back(float(activate(activation == ExpertActivation::kSilu ? Activation::kSilu : Activation::kGeluTanh, g) * u));
      }
    }
    std::vector<double> out;
    for (int i = 0; i < down.source.n; ++i) out.push_back(down.reference(hidden.data(), i).first);
    return out;
  }
};

TEST(KernelsMoe, RowsGetTheWeightedSumOfTheirExpertsWhateverIsBesideThem) {
  const RestoreThreads restore;
  std::mt19937 rng(17);
  using Scores = Routing::Scores;
  using Weights = Routing::Weights;
  constexpr int kExperts = 6, kWide = 64, kInner = 32, kMost = 70;
  const std::vector<float> per_expert = random_rows(1, kExperts, rng);
  struct Kind {
    ExpertActivation activation;
    Routing routing;
    bool shared, gated;
  };
  for (const Kind& kind : {Kind{ExpertActivation::kSilu, {Scores::kSoftmax, Weights::kNormalised, 2}, false, false},
                           Kind{ExpertActivation::kSilu, {Scores::kSigmoid, Weights::kNormalised, 3, 1e-6f, 2.5f, per_expert}, true, false},
                           Kind{ExpertActivation::kGeluTanh, {Scores::kSoftmax, Weights::kScores, 2, 0, 1, {}, per_expert}, true, true},
                           Kind{ExpertActivation::kClampedSwiGlu, {Scores::kLinear, Weights::kSoftmax, 4}, false, false},
                           Kind{ExpertActivation::kRelu2, {Scores::kSigmoid, Weights::kScores, 1}, false, false}}) {
    SCOPED_TRACE(int(kind.activation) * 10 + int(kind.routing.scores));
    std::vector<TestExpert> experts;
    for (int e = 0; e <= kExperts; ++e) experts.emplace_back(kind.activation, kWide, kInner, rng);
    const TestWeight gate(Type::kF32, 1, kWide, rng);
    Moe w{.routing = kind.routing, .activation = kind.activation};
    for (int e = 0; e < kExperts; ++e) w.experts.push_back(experts[size_t(e)].packed());
    if (kind.shared) w.shared = experts.back().packed();
    if (kind.gated) w.shared_gate = PackedLinear::pack({gate.source});
    const std::vector<float> x = random_rows(kMost, kWide, rng), logits = random_rows(kMost, kExperts, rng);

    std::vector<float> whole(kMost * kWide, NAN), y(whole.size());
    moe(x.data(), logits.data(), kMost, w, whole.data());
    for (int row = 0; row < kMost; row += 7) {
      const float *in = x.data() + row * kWide, *scored = logits.data() + row * kExperts;
      // The choice and the weights, in f64.
      std::vector<double> scores(scored, scored + kExperts);
      double sum = 0;
      for (const double score : scores) sum += std::exp(score);
      for (double& score : scores) {
        if (kind.routing.scores == Scores::kSoftmax) score = std::exp(score) / sum;
        if (kind.routing.scores == Scores::kSigmoid) score = 1 / (1 + std::exp(-score));
      }
      std::vector<int> order(kExperts);
      std::iota(order.begin(), order.end(), 0);
      const auto ranked = [&](int e) { return scores[size_t(e)] + (kind.routing.selection_bias.empty() ? 0 : per_expert[size_t(e)]); };
      std::ranges::sort(order, [&](int a, int b) { return ranked(a) > ranked(b); });
      order.resize(size_t(kind.routing.chosen));
      double total = kind.routing.weights == Weights::kNormalised ? double(kind.routing.epsilon) : 0;
      for (const int e : order) {
        if (kind.routing.weights == Weights::kNormalised) total += scores[size_t(e)];
        if (kind.routing.weights == Weights::kSoftmax) total += std::exp(scores[size_t(e)]);
      }
      std::vector<double> want(kWide, 0.0);
      const auto add = [&](const TestExpert& expert, double weight) {
        const std::vector<double> out = expert.reference(in);
        for (int i = 0; i < kWide; ++i) want[size_t(i)] += weight * out[size_t(i)];
      };
      for (const int e : order) {
        double weight = kind.routing.weights == Weights::kSoftmax ? std::exp(scores[size_t(e)]) : scores[size_t(e)];
        if (total > 0) weight /= total;
        weight *= double(kind.routing.scale) * (kind.routing.expert_scale.empty() ? 1 : per_expert[size_t(e)]);
        add(experts[size_t(e)], weight);
      }
      if (kind.shared) add(experts.back(), kind.gated ? 1 / (1 + std::exp(-gate.reference(in, 0).first)) : 1);
      for (int i = 0; i < kWide; ++i) {
        ASSERT_NEAR(whole[size_t(row * kWide + i)], want[size_t(i)], 1e-5 * (1 + std::abs(want[size_t(i)])))
            << "row " << row << " column " << i;
      }
    }
    for (const int threads : {1, 3}) {
      ThreadPool::resize_shared(threads);
      for (const int m : {1, 2, 9, 33}) {
        const int first = kMost - m;  // not where the whole begins
        moe(x.data() + first * kWide, logits.data() + first * kExperts, m, w, y.data());
        ASSERT_EQ(std::memcmp(y.data(), whole.data() + first * kWide, size_t(m) * kWide * sizeof(float)), 0) << "M " << m;
      }
    }
  }
}

TEST(KernelsMoe, OfEqualScoresTheLowerIndexIsChosenAndANaNShows) {
  const float logits[3][4] = {{1, 2, 2, 2}, {5, 5, 5, 5}, {0, 1, NAN, 3}};
  for (const auto scores : {Routing::Scores::kLinear, Routing::Scores::kSoftmax, Routing::Scores::kSigmoid}) {
    int32_t experts[6];
    float weights[6];
    route(logits[0], 3, 4, {.scores = scores, .weights = Routing::Weights::kNormalised, .chosen = 2}, experts, weights);
    EXPECT_EQ(std::vector(experts, experts + 4), (std::vector<int32_t>{1, 2, 0, 1}));
    EXPECT_EQ(std::vector(weights, weights + 4), (std::vector<float>{0.5f, 0.5f, 0.5f, 0.5f}));
    EXPECT_TRUE(std::isnan(weights[4]) || std::isnan(weights[5]));
  }
}

TEST(KernelsMoe, ExpertsComeFromTheBestGroups) {
  // The largest of all is in the group that is worst as a pair.
  const float logits[2][6] = {{9, 0, 5, 5, 6, 4}, {1, 1, 1, 1, 1, 1}};
  const auto chosen = [&](Routing::GroupScore score, int groups) {
    int32_t experts[4];
    float weights[4];
    route(logits[0], 2, 6, {.scores = Routing::Scores::kLinear, .chosen = 2, .groups = 3, .chosen_groups = groups,
                            .group_score = score}, experts, weights);
    return std::vector(experts, experts + 4);
  };
  using Score = Routing::GroupScore;
  EXPECT_EQ(chosen(Score::kTwoLargest, 1), (std::vector<int32_t>{2, 3, 0, 1}));
  EXPECT_EQ(chosen(Score::kTwoLargest, 2), (std::vector<int32_t>{2, 4, 0, 1}));
  EXPECT_EQ(chosen(Score::kLargest, 1), (std::vector<int32_t>{0, 1, 0, 1}));
  EXPECT_EQ(chosen(Score::kLargest, 2), (std::vector<int32_t>{0, 4, 0, 1}));
}

TEST(KernelsMoe, ExpertsAreSummedInTheOrderOfTheirIndices) {
  std::mt19937 rng(18);
  constexpr int kExperts = 5, kWide = 64;
  Moe w{.routing = {.scores = Routing::Scores::kLinear, .chosen = kExperts}};
  std::vector<TestExpert> experts;
  for (int e = 0; e < kExperts; ++e) experts.emplace_back(ExpertActivation::kSilu, kWide, 32, rng);
  for (const TestExpert& expert : experts) w.experts.push_back(expert.packed());
  const std::vector<float> x = random_rows(1, kWide, rng), logits{0.3f, 9.0f, -0.7f, 5.0f, 1.1f};
  std::vector<float> want(kWide, 0.0f), hidden(32), out(kWide), y(kWide);
  for (int e = 0; e < kExperts; ++e) {
    gated_linear(x.data(), 1, *w.experts[size_t(e)].up, Activation::kSilu, hidden.data());
    linear(hidden.data(), 1, *w.experts[size_t(e)].down, nullptr, out.data());
    for (int i = 0; i < kWide; ++i) {
      volatile const float part = logits[size_t(e)] * out[size_t(i)];  // no contraction
      want[size_t(i)] = want[size_t(i)] + part;
    }
  }
  moe(x.data(), logits.data(), 1, w, y.data());
  EXPECT_EQ(y, want);
  // The primitive is the plain kernel.
  mx::array got = moe(mx::array(x.data(), {1, kWide}, mx::float32), mx::array(logits.data(), {1, kExperts}, mx::float32),
                      std::make_shared<const Moe>(w));
  got.eval();
  EXPECT_EQ(std::memcmp(got.data<float>(), want.data(), want.size() * sizeof(float)), 0);
}

TEST(KernelsMoe, ExpertsThatDontFitAreNamed) {
  std::mt19937 rng(19);
  const Expert expert = TestExpert(ExpertActivation::kSilu, 64, 32, rng).packed(), other = TestExpert(ExpertActivation::kSilu, 64, 64, rng).packed();
  std::vector<float> x(64), logits(2), y(64);
  EXPECT_NO_THROW(moe(x.data(), logits.data(), 1, {.experts = {expert, other}}, y.data()));
  EXPECT_THROW(moe(x.data(), logits.data(), 1, {.routing = {.chosen = 3}, .experts = {expert, other}}, y.data()), Error);
  EXPECT_THROW(moe(x.data(), logits.data(), 1, {.experts = {{expert.up, other.down}}}, y.data()), Error);
  EXPECT_THROW(moe(x.data(), logits.data(), 1, {.routing = {.selection_bias = {1}}, .experts = {expert, other}}, y.data()), Error);
}

TEST(KernelsPrimitives, LinearEqualsThePlainKernel) {
  std::mt19937 rng(9);
  const TestWeight w(Type::kAffine, 40, 64, rng, 4, 32);
  const auto packed = PackedLinear::pack({w.source});
  const std::vector<float> x = random_rows(6, 64, rng), residual = random_rows(6, 40, rng);
  std::vector<float> want(6 * 40);
  const mx::array x_array(x.data(), {6, 64}, mx::float32), residual_array(residual.data(), {6, 40}, mx::float32);
  const auto lazy = [](const mx::array& a) { return a + mx::array(0.0f); };
  auto expect = [&](mx::array got) {
    got.eval();
    ASSERT_EQ(got.shape(), (mx::Shape{6, 40}));
    EXPECT_EQ(std::memcmp(got.data<float>(), want.data(), want.size() * sizeof(float)), 0);
  };
  linear(x.data(), 6, *packed, nullptr, want.data());
  EXPECT_TRUE(linear(x_array, packed).is_available());
  expect(linear(x_array, packed));
  EXPECT_FALSE(linear(lazy(x_array), packed).is_available());
  expect(linear(lazy(x_array), packed));
  // A lazy, transposed input.
  expect(linear(mx::transpose(mx::contiguous(mx::transpose(x_array))), packed));
  linear(x.data(), 6, *packed, residual.data(), want.data());
  expect(linear_add(x_array, packed, residual_array));
  // A residual that may be overwritten.
  expect(linear_add(x_array, packed, mx::contiguous(lazy(residual_array))));
  EXPECT_EQ(std::memcmp(residual_array.data<float>(), residual.data(), residual.size() * sizeof(float)), 0);

  const auto gated = PackedLinear::pack_gated(w.source, w.source);
  gated_linear(x.data(), 6, *gated, Activation::kSilu, want.data());
  expect(gated_linear(x_array, gated, Activation::kSilu));

  mx::array none = linear(mx::zeros({0, 64}), packed);
  none.eval();
  EXPECT_EQ(none.shape(), (mx::Shape{0, 40}));
  EXPECT_THROW(linear(mx::zeros({2, 63}), packed), Error);
  EXPECT_THROW(linear_add(x_array, packed, mx::zeros({5, 40})), Error);
}

TEST(KernelsPrimitives, NormAndEmbeddingEqualThePlainKernels) {
  std::mt19937 rng(10);
  const TestWeight w(Type::kAffine, 40, 64, rng, 8, 32);
  const auto packed = PackedLinear::pack({w.source});
  const std::vector<int32_t> tokens{3, 39, 0, 3};
  std::vector<float> rows(4 * 64), want(4 * 64);
  embedding(tokens.data(), 4, *packed, rows.data());
  const std::vector<float> weight = random_rows(1, 64, rng);
  rms_norm(rows.data(), 4, 64, weight.data(), 1e-5f, want.data());
  mx::array got = rms_norm(embedding(mx::array(tokens.data(), {4}, mx::int32), packed),
                           mx::array(weight.data(), {64}, mx::float32), 1e-5f);
  got.eval();
  EXPECT_EQ(std::memcmp(got.data<float>(), want.data(), want.size() * sizeof(float)), 0);
}

TEST(KernelsPrimitives, ErrorsReachTheCallerOrEval) {
  std::mt19937 rng(11);
  const TestWeight w(Type::kAffine, 40, 64, rng, 8, 32);
  const auto packed = PackedLinear::pack({w.source});
  EXPECT_THROW(embedding(mx::array({40}, mx::int32), packed), Error);
  mx::array bad = embedding(mx::array({39}, mx::int32) + mx::array(1), packed);
  try {
    bad.eval();
    FAIL() << "token 40 of 40 was accepted";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("Token 40"), std::string::npos) << error.what();
  }
  mx::array good = embedding(mx::array({39}, mx::int32), packed);
  EXPECT_NO_THROW(good.eval());
}

}  // namespace
}  // namespace torpor::kernels
