#pragma once
/// linear() as its definition says it, in f64, on random weights of every format, and what its tests run it on.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/compute.h"
#include "kernels/packed_linear.h"
#include "kernels/thread_pool.h"

namespace torpor::kernels {

using Type = WeightSource::Type;

inline constexpr double kUnit = 0x1p-24;  // half an ulp of 1 in f32

inline const char* type_name(Type type) {
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

inline Stored store(float value, Type type) {
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

inline void append(std::vector<std::byte>& out, uint32_t bits, Type type) {
  const size_t size = type == Type::kF32 ? 4 : 2, at = out.size();
  out.resize(at + size);
  std::memcpy(out.data() + at, &bits, size);
}

/// The `i`-th of a stream of `bits` each, low bits first.
inline uint32_t in_stream(const std::vector<uint32_t>& words, size_t i, int bits) {
  const size_t at = i * size_t(bits), word = at / 32;
  const uint64_t two = words[word] | uint64_t(word + 1 < words.size() ? words[word + 1] : 0) << 32;
  return uint32_t(two >> (at % 32)) & ((1u << bits) - 1);
}

/// A float of `bits` in all with so many of exponent and mantissa, as the specification of the OCP's formats has it.
inline double small_float(uint32_t code, int bits, int mantissa_bits, int bias) {
  const uint32_t magnitude = code & ((1u << (bits - 1)) - 1), mantissa = magnitude & ((1u << mantissa_bits) - 1);
  const int exponent = int(magnitude >> mantissa_bits);
  const double value = exponent == 0 ? std::ldexp(double(mantissa), 1 - bias - mantissa_bits)
                                     : std::ldexp(double(mantissa + (1u << mantissa_bits)), exponent - bias - mantissa_bits);
  return code >> (bits - 1) != 0 ? -value : value;
}
inline double e2m1(uint32_t code) { return small_float(code, 4, 1, 1); }
inline double e4m3(uint32_t code) { return small_float(code, 8, 3, 7); }

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

inline std::vector<float> random_rows(int m, int k, std::mt19937& rng) {
  std::vector<float> x(size_t(m) * k);
  for (float& v : x) v = std::uniform_real_distribution<float>(-1, 1)(rng);
  return x;
}

inline double activate(Activation activation, double x) {
  if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

struct RestoreThreads {
  int before = ThreadPool::shared().size();
  ~RestoreThreads() { ThreadPool::resize_shared(before); }
};

inline const std::vector<int> kRows{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 24, 513};
/// Of formats whose products are other formats': each kernel, and two blocks of rows.
inline const std::vector<int> kFewerRows{1, 2, 5, 8, 9, 150};

/// linear() of every M against the reference, against its own rows one at a time, and with as many threads.
inline void check_linear(const std::vector<const TestWeight*>& weights, bool with_residual, std::mt19937& rng,
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
inline std::vector<Format> formats(std::initializer_list<int> widths = {2, 3, 4, 5, 6, 8}) {
  std::vector<Format> all;
  for (const int bits : widths) {
    for (const int group : {16, 32, 64, 128}) all.push_back({bits, group});
  }
  return all;
}

}  // namespace torpor::kernels
