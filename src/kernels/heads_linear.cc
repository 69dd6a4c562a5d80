#include "kernels/heads_linear.h"

#include <cstring>

#include "kernels/compute.h"
#include "torpor/error.h"

namespace torpor::kernels {

void heads_linear(const float* x, int m, const HeadWeights& heads, float* y) {
  if (m <= 0 || heads.empty()) return;
  const size_t k = size_t(heads.front()->k()), n = size_t(heads.front()->n()), count = heads.size();
  for (const auto& head : heads) {
    if (size_t(head->k()) == k && size_t(head->n()) == n) continue;
    throw Error(ErrorCode::kInvalidArgument, "The weights of heads have different shapes.");
  }
  static thread_local std::vector<float> rows, results;
  if (m > 1) {
    rows.resize(size_t(m) * k);
    results.resize(size_t(m) * n);
  }
  for (size_t h = 0; h < count; ++h) {
    if (m == 1) {
      linear(x + h * k, 1, *heads[h], nullptr, y + h * n);
      continue;
    }
    for (size_t row = 0; row < size_t(m); ++row) {
      std::memcpy(rows.data() + row * k, x + (row * count + h) * k, k * sizeof(float));
    }
    linear(rows.data(), m, *heads[h], nullptr, results.data());
    for (size_t row = 0; row < size_t(m); ++row) {
      std::memcpy(y + (row * count + h) * n, results.data() + row * n, n * sizeof(float));
    }
  }
}

}  // namespace torpor::kernels
