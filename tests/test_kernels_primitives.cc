// The kernels as MLX primitives: at once or as nodes of a graph they compute what the plain ones do.

#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include "kernels/compute.h"
#include "kernels/packed_linear.h"
#include "kernels/primitives.h"
#include "linear_reference.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

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
