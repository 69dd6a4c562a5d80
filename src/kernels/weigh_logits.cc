#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/weigh_logits.cc"
#include <hwy/foreach_target.h>  // must come before highway.h

#include "kernels/weigh_logits.h"

#include <algorithm>
#include <cmath>

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include "kernels/cpu_target.h"
#include "kernels/thread_pool.h"

HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

double WeighLogits(const float* HWY_RESTRICT logits, size_t n, float top, float factor, float* HWY_RESTRICT weights) {
  const hn::CappedTag<float, kSumLanes> d;
  constexpr size_t lanes = hn::MaxLanes(d), kParts = kSumLanes / lanes;
  const auto most = hn::Set(d, top), by = hn::Set(d, factor);
  const auto weigh = [&](const float* from, float* to) HWY_ATTR {
    const auto weight = hn::Exp(d, hn::Mul(hn::Sub(hn::LoadU(d, from), most), by));
    hn::StoreU(weight, d, to);
    return weight;
  };
  double total = 0;
  size_t i = 0;
  while (i + kSumLanes <= n) {
    hn::Vec<decltype(d)> sums[kParts];
    for (auto& sum : sums) sum = hn::Zero(d);
    for (int j = 0; j < 16 && i + kSumLanes <= n; ++j, i += kSumLanes) {  // so few that little is rounded
      for (size_t p = 0; p < kParts; ++p) sums[p] = hn::Add(sums[p], weigh(logits + i + p * lanes, weights + i + p * lanes));
    }
    HWY_ALIGN float of_lanes[kSumLanes];
    for (size_t p = 0; p < kParts; ++p) hn::Store(sums[p], d, of_lanes + p * lanes);
    total += double(sum_of_lanes(of_lanes));
  }
  float last[kSumLanes] = {}, last_weights[kSumLanes] = {};
  std::copy(logits + i, logits + n, last);
  for (size_t p = 0; i < n && p < kParts; ++p) weigh(last + p * lanes, last_weights + p * lanes);
  for (size_t j = 0; i < n; ++i, ++j) total += double(weights[i] = last_weights[j]);
  return total;
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace torpor::kernels {

HWY_EXPORT(WeighLogits);

void weigh_logits(const float* logits, size_t n, float top, double temperature, float* weights, double* sums) {
  ensure_cpu_target();
  const auto weigh = HWY_DYNAMIC_DISPATCH(WeighLogits);
  const auto factor = float(std::min(1 / temperature, 3e38));  // of the largest logit 0 times this is 0
  constexpr size_t kPerTask = 4 * kWeightsPerSum;  // worth waking a worker for
  ThreadPool::shared().parallel_for((n + kPerTask - 1) / kPerTask, [&](size_t task, int) {
    for (size_t first = task * kPerTask; first < std::min(n, (task + 1) * kPerTask); first += kWeightsPerSum) {
      const size_t count = std::min(n - first, kWeightsPerSum);
      sums[first / kWeightsPerSum] = weigh(logits + first, count, top, factor, weights + first);
    }
  });
}

}  // namespace torpor::kernels
#endif  // HWY_ONCE
