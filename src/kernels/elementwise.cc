#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/elementwise.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <hwy/highway.h>

#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/thread_pool.h"
#include "torpor/error.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

void RmsNormRows(const float* x, size_t rows, size_t k, const float* weight, float eps, float* y) {
  const hn::CappedTag<float, kSumLanes> d;
  constexpr size_t lanes = hn::MaxLanes(d), kParts = kSumLanes / lanes;
  using Sums = hn::Vec<decltype(d)>[kParts];
  const auto add_squares = [&](const float* from, Sums& sums) HWY_ATTR {
    for (size_t p = 0; p < kParts; ++p) {
      const auto v = hn::LoadU(d, from + p * lanes);
      sums[p] = hn::MulAdd(v, v, sums[p]);
    }
  };
  for (size_t r = 0; r < rows; ++r, x += k, y += k) {
    Sums s[4];
    for (Sums& sums : s) {
      for (auto& sum : sums) sum = hn::Zero(d);
    }
    size_t i = 0;
    for (; i + 4 * kSumLanes <= k; i += 4 * kSumLanes) {
      for (size_t n = 0; n < 4; ++n) add_squares(x + i + n * kSumLanes, s[n]);
    }
    for (; i + kSumLanes <= k; i += kSumLanes) add_squares(x + i, s[0]);
    HWY_ALIGN float sums[kSumLanes];
    for (size_t p = 0; p < kParts; ++p) {
      hn::Store(hn::Add(hn::Add(s[0][p], s[1][p]), hn::Add(s[2][p], s[3][p])), d, sums + p * lanes);
    }
    float sum = sum_of_lanes(sums);
    for (; i < k; ++i) sum += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(sum / float(k) + eps);
    const auto f = hn::Set(d, factor);
    for (i = 0; i + lanes <= k; i += lanes) {
      hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), f), hn::LoadU(d, weight + i)), d, y + i);
    }
    for (; i < k; ++i) y[i] = x[i] * factor * weight[i];
  }
}

/// The largest of `n` values; NaN when one is NaN or +infinity.
float Largest(const float* values, size_t n) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto infinity = hn::Set(d, kInfinity);
  auto top0 = hn::Set(d, -kInfinity), top1 = top0, top2 = top0, top3 = top0;
  auto numbers = hn::Lt(top0, infinity);
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    const auto a = hn::LoadU(d, values + i), b = hn::LoadU(d, values + i + lanes);
    const auto c = hn::LoadU(d, values + i + 2 * lanes), e = hn::LoadU(d, values + i + 3 * lanes);
    numbers = hn::And(numbers, hn::And(hn::And(hn::Lt(a, infinity), hn::Lt(b, infinity)),
                                       hn::And(hn::Lt(c, infinity), hn::Lt(e, infinity))));
    top0 = hn::Max(top0, a);
    top1 = hn::Max(top1, b);
    top2 = hn::Max(top2, c);
    top3 = hn::Max(top3, e);
  }
  bool all = hn::AllTrue(d, numbers);
  float top = hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(top0, top1), hn::Max(top2, top3))));
  for (; i < n; ++i) {
    all = all && values[i] < kInfinity;
    top = std::max(top, values[i]);
  }
  return all ? top : std::numeric_limits<float>::quiet_NaN();
}

/// Where `wanted` first is among `n` values, which hold it.
size_t Find(const float* values, size_t n, float wanted) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  const auto same = hn::Set(d, wanted);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const intptr_t at = hn::FindFirstTrue(d, hn::Eq(hn::LoadU(d, values + i), same));
    if (at >= 0) return i + size_t(at);
  }
  return size_t(std::find(values + i, values + n, wanted) - values);
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace torpor::kernels {

HWY_EXPORT(RmsNormRows);
HWY_EXPORT(Largest);
HWY_EXPORT(Find);

namespace {

constexpr size_t kFloatsPerTask = 16 * 1024;

/// Calls body(first, last) over [0, m) in pieces worth waking a worker for.
template <class Body>
void over_rows(int m, size_t floats_per_row, const Body& body) {
  if (m <= 0) return;
  const size_t rows = std::max<size_t>(1, kFloatsPerTask / std::max<size_t>(1, floats_per_row));
  const size_t tasks = (size_t(m) + rows - 1) / rows;
  if (tasks == 1) {
    body(size_t(0), size_t(m));
    return;
  }
  ThreadPool::shared().parallel_for(
      tasks, [&](size_t task, int) { body(task * rows, std::min(size_t(m), (task + 1) * rows)); });
}

}  // namespace

void rms_norm(const float* x, int m, int k, const float* weight, float eps, float* y) {
  ensure_cpu_target();
  if (k <= 0) return;
  const size_t width = size_t(k);
  const auto rows = HWY_DYNAMIC_DISPATCH(RmsNormRows);
  over_rows(m, width, [&](size_t first, size_t last) {
    rows(x + first * width, last - first, width, weight, eps, y + first * width);
  });
}

void embedding(const int32_t* tokens, int m, const PackedLinear& w, float* y) {
  const size_t width = size_t(w.k());
  for (int i = 0; i < m; ++i) {
    if (tokens[i] < 0 || tokens[i] >= w.n()) {
      throw Error(ErrorCode::kInvalidArgument, "Token " + std::to_string(tokens[i]) + " is not in the vocabulary of " +
                                                   std::to_string(w.n()) + ".");
    }
  }
  over_rows(m, width, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) w.dequantize_row(tokens[i], y + i * width);
  });
}

int argmax(const float* values, int n) {
  ensure_cpu_target();
  const size_t size = size_t(std::max(n, 0));
  const auto largest = HWY_DYNAMIC_DISPATCH(Largest);
  std::vector<float> tops((size + kFloatsPerTask - 1) / kFloatsPerTask);
  over_rows(int(size), 1, [&](size_t first, size_t last) {
    tops[first / kFloatsPerTask] = largest(values + first, last - first);
  });
  if (std::ranges::any_of(tops, [](float top) { return std::isnan(top); })) return -1;
  const auto top = std::ranges::max_element(tops);
  if (top == tops.end() || !std::isfinite(*top)) return -1;
  const size_t first = size_t(top - tops.begin()) * kFloatsPerTask;
  return int(first + HWY_DYNAMIC_DISPATCH(Find)(values + first, std::min(kFloatsPerTask, size - first), *top));
}

}  // namespace torpor::kernels
#endif  // HWY_ONCE
