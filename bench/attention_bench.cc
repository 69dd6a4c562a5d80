// Attention alone: GFLOP/s of a prefill and milliseconds per decoded token (all layers) at a depth, f16 KV.
//   attention_bench [query heads] [kv heads] [head dim] [layers]      default: SmolLM2-135M, 9 3 64 30

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/thread_pool.h"

using namespace torpor;
using namespace torpor::kernels;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const auto arg = [&](int i, int fallback) { return argc > i ? std::atoi(argv[i]) : fallback; };
  AttentionSpec spec;
  spec.n_heads = arg(1, 9);
  spec.n_kv_heads = arg(2, 3);
  spec.head_dim = arg(3, 64);
  const int layers = arg(4, 30);
  spec.scale = 1.0f / std::sqrt(float(spec.head_dim));
  spec.kv_dtype = KvDtype::kF16;
  spec.rope.dims = spec.head_dim;
  for (int i = 0; i < spec.head_dim / 2; ++i) {
    spec.rope.inv_freq.push_back(float(std::pow(10000.0, -2.0 * i / spec.head_dim)));
  }
  std::printf("%s, %d threads, %d/%d heads of %d, %d layers\n", cpu_target_name(), ThreadPool::shared().size(),
              spec.n_heads, spec.n_kv_heads, spec.head_dim, layers);

  constexpr int kMaxTokens = 4096 + 256;
  const size_t run_half = size_t(spec.n_kv_heads) * kSegmentTokens * size_t(spec.head_dim) * 2;
  // One buffer for each layer, so that a decoded token reads as much memory as in a model.
  std::vector<std::vector<std::byte>> caches(size_t(layers), std::vector<std::byte>(kMaxTokens / kSegmentTokens * 2 * run_half));
  std::vector<std::vector<KvRunView>> runs;
  for (auto& cache : caches) {
    runs.emplace_back();
    for (int i = 0; i < kMaxTokens / kSegmentTokens; ++i) {
      std::byte* at = cache.data() + size_t(i) * 2 * run_half;
      runs.back().push_back({at, at + run_half});
    }
  }
  const size_t width = size_t(spec.n_heads + 2 * spec.n_kv_heads) * size_t(spec.head_dim);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> source(4096 * width), qkv, out(4096 * size_t(spec.n_heads * spec.head_dim));
  for (float& x : source) x = normal(random);

  const auto prefill = [&](int tokens, int chunk, size_t layer) {
    for (int first = 0; first < tokens; first += chunk) {
      const int n = std::min(chunk, tokens - first);
      const AttentionSequence sequence{first, n, first, runs[layer]};
      attention(qkv.data(), spec, std::span(&sequence, 1), out.data());
    }
  };
  for (auto [tokens, chunk] : {std::pair{512, 512}, std::pair{2048, 512}, std::pair{4096, 512}, std::pair{4096, 4096}}) {
    std::vector<double> times;
    for (int i = 0; i < 5; ++i) {
      qkv = source;
      const double start = now();
      prefill(tokens, chunk, 0);
      times.push_back(now() - start);
    }
    const double flop = 4.0 * spec.n_heads * spec.head_dim * (double(tokens) * (tokens + 1) / 2);
    std::printf("prefill %d in chunks of %d: %.1f GFLOP/s, %.3f s for all layers\n", tokens, chunk,
                flop / median(times) / 1e9, median(times) * layers);
  }
  for (int layer = 1; layer < layers; ++layer) {
    qkv = source;
    prefill(4096, 4096, size_t(layer));
  }
  for (int depth : {64, 512, 4096}) {
    std::vector<double> times;
    for (int i = 0; i < 20; ++i) {
      qkv.assign(source.begin(), source.begin() + std::ptrdiff_t(width));
      const double start = now();
      for (int layer = 0; layer < layers; ++layer) {
        const AttentionSequence sequence{0, 1, depth, runs[size_t(layer)]};
        attention(qkv.data(), spec, std::span(&sequence, 1), out.data());
      }
      times.push_back(now() - start);
    }
    std::printf("decode at depth %d: %.3f ms for all layers, %.1f GB/s of KV\n", depth, median(times) * 1e3,
                double(depth) * layers * double(run_half) * 2 / kSegmentTokens / median(times) / 1e9);
  }
}
