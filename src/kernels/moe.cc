#include "kernels/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "kernels/thread_pool.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

/// Rows of one expert that are computed at once: their activations stay small, and weights are unpacked for many.
constexpr int kRowsAtOnce = 576;

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

void softmax(float* values, int n) {
  // A NaN passes: it makes the sum one.
  const float top = *std::max_element(values, values + n);
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += values[i] = std::exp(values[i] - top);
  for (int i = 0; i < n; ++i) values[i] /= sum;
}

/// The largest of those that are not taken, the lower index of equals; a NaN before all, so that it shows.
int largest(const float* scores, const std::vector<char>& taken) {
  int best = -1;
  for (int i = 0; i < int(taken.size()); ++i) {
    if (taken[size_t(i)]) continue;
    if (std::isnan(scores[i])) return i;
    if (best < 0 || scores[i] > scores[best]) best = i;
  }
  return best;
}

/// Takes the experts of all groups but the best, so that none of them is chosen.
void take_other_groups(const float* ranked, const Routing& r, std::vector<char>& taken) {
  const size_t size = taken.size() / size_t(r.groups);
  std::vector<float> scores;
  for (size_t first = 0; first < taken.size(); first += size) {
    float top = -std::numeric_limits<float>::infinity(), second = top;
    bool poisoned = false;
    for (size_t i = first; i < first + size; ++i) {
      poisoned = poisoned || std::isnan(ranked[i]);
      second = std::max(second, std::min(top, ranked[i]));
      top = std::max(top, ranked[i]);
    }
    const bool both = r.group_score == Routing::GroupScore::kTwoLargest && size > 1;
    scores.push_back(poisoned ? std::numeric_limits<float>::quiet_NaN() : both ? top + second : top);
  }
  std::vector<char> kept(scores.size(), 0);
  for (int i = 0; i < r.chosen_groups; ++i) kept[size_t(largest(scores.data(), kept))] = 1;
  for (size_t i = 0; i < taken.size(); ++i) taken[i] = char(kept[i / size] == 0);
}

void route_row(const float* logits, int n_experts, const Routing& r, int32_t* experts, float* weights) {
  std::vector<float> scores(logits, logits + n_experts);
  if (r.scores == Routing::Scores::kSoftmax) softmax(scores.data(), n_experts);
  if (r.scores == Routing::Scores::kSigmoid) std::ranges::transform(scores, scores.begin(), sigmoid);
  std::vector<float> ranked = scores;
  for (size_t i = 0; i < r.selection_bias.size(); ++i) ranked[i] += r.selection_bias[i];
  std::vector<char> taken(size_t(n_experts), 0);
  if (r.groups > 1) take_other_groups(ranked.data(), r, taken);
  for (int i = 0; i < r.chosen; ++i) {
    experts[i] = largest(ranked.data(), taken);
    taken[size_t(experts[i])] = 1;
  }
  std::sort(experts, experts + r.chosen);
  for (int i = 0; i < r.chosen; ++i) weights[i] = scores[size_t(experts[i])];
  if (r.weights == Routing::Weights::kSoftmax) softmax(weights, r.chosen);
  if (r.weights == Routing::Weights::kNormalised) {
    const float sum = std::accumulate(weights, weights + r.chosen, 0.0f) + r.epsilon;
    for (int i = 0; i < r.chosen; ++i) weights[i] /= sum;
  }
  for (int i = 0; i < r.chosen; ++i) {
    weights[i] *= r.scale;
    if (!r.expert_scale.empty()) weights[i] *= r.expert_scale[size_t(experts[i])];
  }
}

/// body(first, last) over [0, m), in pieces worth waking a worker for where a row is `width` floats.
template <class Body>
void over_rows(int m, int width, const Body& body) {
  const int rows = std::max(1, 16 * 1024 / std::max(1, width)), tasks = (m + rows - 1) / rows;
  if (tasks <= 1) return body(0, m);
  ThreadPool::shared().parallel_for(size_t(tasks),
                                    [&](size_t task, int) { body(int(task) * rows, std::min(m, int(task + 1) * rows)); });
}

/// Memory of the calling thread's, kept between calls.
struct Scratch {
  std::vector<float> x, stacked, hidden, y, gate;
};
Scratch& scratch_of_this_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

void clamped_swiglu(const float* stacked, int m, int size, float limit, float* out) {
  over_rows(m, size, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      const float *gates = stacked + size_t(row) * 2 * size, *ups = gates + size;
      for (int i = 0; i < size; ++i) {
        const float gate = gates[i] > limit ? limit : gates[i];
        const float up = ups[i] > limit ? limit : ups[i] < -limit ? -limit : ups[i];
        out[size_t(row) * size + i] = gate * sigmoid(1.702f * gate) * (up + 1);
      }
    }
  });
}

/// out [M, N] = the expert's output of x [M, K].
void run_expert(const Moe& w, const Expert& expert, const float* x, int m, Scratch& scratch, float* out) {
  const int width = expert.down->k();
  scratch.hidden.resize(size_t(m) * width);
  float* hidden = scratch.hidden.data();
  switch (w.activation) {
    case ExpertActivation::kSilu:
    case ExpertActivation::kGeluTanh:
      gated_linear(x, m, *expert.up, w.activation == ExpertActivation::kSilu ? Activation::kSilu : Activation::kGeluTanh, hidden);
      break;
    case ExpertActivation::kClampedSwiGlu:
      scratch.stacked.resize(size_t(m) * 2 * width);
      linear(x, m, *expert.up, nullptr, scratch.stacked.data());
      clamped_swiglu(scratch.stacked.data(), m, width, w.limit, hidden);
      break;
    case ExpertActivation::kRelu2:
      linear(x, m, *expert.up, nullptr, hidden);
      for (float& v : scratch.hidden) v = v < 0 ? 0 : v * v;  // NaN stays
      break;
  }
  linear(hidden, m, *expert.down, nullptr, out);
}

void check(const Moe& w) {
  const auto invalid = [](const std::string& what) { throw Error(ErrorCode::kInvalidArgument, what); };
  const int n_experts = int(w.experts.size());
  if (w.routing.chosen < 1 || w.routing.chosen > n_experts) {
    invalid("A row goes to " + std::to_string(w.routing.chosen) + " experts, but there are " + std::to_string(n_experts) + ".");
  }
  const int groups = w.routing.groups, kept = w.routing.chosen_groups;
  if (groups < 1 || n_experts % groups != 0 || kept < 1 || kept > groups ||
      w.routing.chosen > n_experts / groups * kept) {
    invalid("A router's groups don't fit its experts.");
  }
  for (const auto* per_expert : {&w.routing.selection_bias, &w.routing.expert_scale}) {
    if (!per_expert->empty() && int(per_expert->size()) != n_experts) invalid("A router's bias or scale is not one per expert.");
  }
  const int per_output = w.activation == ExpertActivation::kClampedSwiGlu ? 2 : 1;
  const auto fits = [&](const Expert& e) {
    return e.up->k() == w.experts[0].up->k() && e.down->n() == w.experts[0].down->n() && e.up->n() == per_output * e.down->k();
  };
  if (!std::ranges::all_of(w.experts, fits) || (w.shared && !fits(*w.shared))) invalid("Experts have shapes that don't fit each other.");
  if (w.shared_gate && (w.shared_gate->n() != 1 || w.shared_gate->k() != w.experts[0].up->k())) {
    invalid("A shared expert's gate has one row, as wide as the input.");
  }
}

}  // namespace

void route(const float* logits, int m, int n_experts, const Routing& routing, int32_t* experts, float* weights) {
  over_rows(m, n_experts * (routing.chosen + 16), [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      const size_t at = size_t(row) * size_t(routing.chosen);
      route_row(logits + size_t(row) * n_experts, n_experts, routing, experts + at, weights + at);
    }
  });
}

void moe(const float* x, const float* logits, int m, const Moe& w, float* y) {
  check(w);
  if (m <= 0) return;
  Scratch& scratch = scratch_of_this_thread();
  const int n_experts = int(w.experts.size()), chosen = w.routing.chosen;
  const int k = w.experts[0].up->k(), n = w.experts[0].down->n();
  std::vector<int32_t> experts(size_t(m) * chosen);
  std::vector<float> weights(experts.size());
  route(logits, m, n_experts, w.routing, experts.data(), weights.data());
  // The rows of each expert, with their weights.
  std::vector<std::vector<std::pair<int, float>>> rows_of(static_cast<size_t>(n_experts));
  for (int row = 0; row < m; ++row) {
    for (int i = 0; i < chosen; ++i) {
      const size_t at = size_t(row) * chosen + i;
      rows_of[size_t(experts[at])].emplace_back(row, weights[at]);
    }
  }
  std::fill_n(y, size_t(m) * n, 0.0f);
  for (int e = 0; e < n_experts; ++e) {
    const auto& all = rows_of[size_t(e)];
    for (size_t begin = 0; begin < all.size(); begin += kRowsAtOnce) {
      const auto* rows = all.data() + begin;
      const int count = int(std::min(all.size() - begin, size_t(kRowsAtOnce)));
      // All rows of the call are consecutive; a few are brought together.
      const float* from = x;
      if (count < m) {
        scratch.x.resize(size_t(count) * k);
        over_rows(count, k, [&](int first, int last) {
          for (int i = first; i < last; ++i) {
            std::memcpy(scratch.x.data() + size_t(i) * k, x + size_t(rows[i].first) * k, size_t(k) * sizeof(float));
          }
        });
        from = scratch.x.data();
      }
      scratch.y.resize(size_t(count) * n);
      run_expert(w, w.experts[size_t(e)], from, count, scratch, scratch.y.data());
      over_rows(count, n, [&](int first, int last) {
        for (int i = first; i < last; ++i) {
          const float *out = scratch.y.data() + size_t(i) * n, weight = rows[i].second;
          float* to = y + size_t(rows[i].first) * n;
          for (int j = 0; j < n; ++j) to[j] += weight * out[j];
        }
      });
    }
  }
  if (!w.shared) return;
  scratch.y.resize(size_t(m) * n);
  run_expert(w, *w.shared, x, m, scratch, scratch.y.data());
  scratch.gate.assign(size_t(m), 1.0f);
  if (w.shared_gate) {
    linear(x, m, *w.shared_gate, nullptr, scratch.gate.data());
    std::ranges::transform(scratch.gate, scratch.gate.begin(), sigmoid);
  }
  over_rows(m, n, [&](int first, int last) {
    for (int row = first; row < last; ++row) {
      const float *out = scratch.y.data() + size_t(row) * n, gate = scratch.gate[size_t(row)];
      for (int j = 0; j < n; ++j) y[size_t(row) * n + j] += gate * out[j];
    }
  });
}

}  // namespace torpor::kernels
