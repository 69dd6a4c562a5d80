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
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  const auto most = hn::Set(d, top), by = hn::Set(d, factor);
  const auto weigh = [&](const float* from, float* to) HWY_ATTR {
    const auto weight = hn::Exp(d, hn::Mul(hn::Sub(hn::LoadU(d, from), most), by));
    hn::StoreU(weight, d, to);
    return weight;
  };
  double total = 0;
  size_t i = 0;
  while (i + lanes <= n) {
    auto sum = hn::Zero(d);  // of so few that narrow vectors, too, round little
    for (int j = 0; j < 16 && i + lanes <= n; ++j, i += lanes) sum = hn::Add(sum, weigh(logits + i, weights + i));
    total += double(hn::GetLane(hn::SumOfLanes(d, sum)));
  }
  float last[16] = {}, last_weights[16] = {};
  std::copy(logits + i, logits + n, last);
  if (i < n) weigh(last, last_weights);
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
