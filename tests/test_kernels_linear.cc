// linear() and gated_linear() against a plain f64 reference, and rows against themselves: a row's bits must depend on
// neither M nor the number of threads. CTest runs this program once per forced CPU target as well.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "guarded_memory.h"
#include "kernels/compute.h"
#include "kernels/packed_layout.h"
#include "kernels/packed_linear.h"
#include "kernels/thread_pool.h"
#include "linear_reference.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

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

TEST(KernelsLinear, GatedProjections) {
  const RestoreThreads restore;
  std::mt19937 rng(6);
  for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    // Of 3 bits with 16-bit activations: of every number of rows, those that meet weights as bytes among them.
    for (const auto& [n, k, bits, up_bits] :
         {std::tuple{8, 32, 4, 4}, {43, 160, 4, 4}, {20, 64, 4, 8}, {299, 96, 3, 3}}) {
      const Activations activations = bits == 3 ? Activations::kInt16 : Activations::kF32;
      const TestWeight gate(Type::kAffine, n, k, rng, bits, 32, Type::kF16, n == 43),
          up(Type::kAffine, n, k, rng, up_bits, 32, Type::kF16, n == 43);
      const auto packed = PackedLinear::pack_gated(gate.source, up.source, activations);
      ASSERT_EQ(packed->n(), n);
      const int most = kRows.back();
      const std::vector<float> x = random_rows(most, k, rng);
      std::vector<float> whole(size_t(most) * n), y(size_t(most) * n);
      ThreadPool::resize_shared(2);
      gated_linear(x.data(), most, *packed, activation, whole.data());
      for (int row = 0; row < most; row += 19) {
        for (int column = 0; column < n; ++column) {
          const auto [g, g_bound] = gate.reference(x.data() + size_t(row) * k, column, activations);
          const auto [u, u_bound] = up.reference(x.data() + size_t(row) * k, column, activations);
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

// Of every format, in every number of rows that has a kernel of its own. What else lies there is another's.
TEST(KernelsLinear, NothingBehindAWeightItsSourceOrItsRowsIsTouched) {
  const RestoreThreads restore;
  std::mt19937 rng(20);
  std::vector<Format> all = formats();
  for (const Type type : {Type::kF32, Type::kF16, Type::kBF16}) all.push_back({0, 0, type});
  for (const Type type : {Type::kMxfp4, Type::kMxfp8, Type::kNvfp4}) all.push_back({0, 32, type});
  testing::GuardedWeights memory;
  ThreadPool::resize_shared(2);
  constexpr int kN = 19;
  for (const auto& [bits, group, type] : all) {
    const int k = group == 0 ? 13 : 4 * group;
    SCOPED_TRACE(std::string(type_name(type)) + " " + std::to_string(bits) + " bits, group " + std::to_string(group));
    const TestWeight w(type, kN, k, rng, bits, group, Type::kF16, true);
    testing::Guarded<std::byte> weight(w.weight), scales(w.scales), biases(w.biases), bias(w.bias);
    WeightSource source = w.source;
    source.weight = weight.data();
    source.scales = scales.data();
    source.biases = type == Type::kAffine ? biases.data() : nullptr;
    source.bias = bias.data();
    for (const Activations activations : {Activations::kF32, Activations::kInt16}) {
      const auto packed = PackedLinear::pack({source}, activations, memory);
      const auto plain = PackedLinear::pack({w.source}, activations);
      for (const int m : {1, 2, 3, 4, 5, 8, 9, 33, 150}) {
        const std::vector<float> x = random_rows(m, k, rng), residual = random_rows(m, kN, rng);
        testing::Guarded<float> guarded_x(x), guarded_residual(residual), y(residual.size());
        std::vector<float> want(residual.size());
        linear(x.data(), m, *plain, residual.data(), want.data());
        linear(guarded_x.data(), m, *packed, guarded_residual.data(), y.data());
        ASSERT_EQ(std::memcmp(y.data(), want.data(), want.size() * sizeof(float)), 0) << "M " << m;
      }
    }
  }
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

}  // namespace
}  // namespace torpor::kernels
