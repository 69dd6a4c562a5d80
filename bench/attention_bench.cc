// Attention alone, all layers of a model: a prefill's GFLOP/s, and milliseconds per decoded token at a depth.
//   attention_bench [query heads] [kv heads] [head dim] [layers] [depth] [format]
// Default: SmolLM2-135M, 9 3 64 30, at 4096, and all formats, which kFormats names. CPU time is the process's over its
// threads: on a busy machine it tells more than the clock. TORPOR_THREADS=1 leaves no waiting in it.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <string>
#include <vector>

#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/thread_pool.h"

using namespace torpor;
using namespace torpor::kernels;

namespace {

struct Times {
  std::vector<double> wall, cpu;  // ms

  static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
  }
  template <class Body>
  void take(const Body& body) {
    const auto cpu_now = [] {
      timespec t;
      clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
      return double(t.tv_sec) * 1e3 + double(t.tv_nsec) / 1e6;
    };
    const auto start = std::chrono::steady_clock::now();
    const double cpu_start = cpu_now();
    body();
    cpu.push_back((cpu_now() - cpu_start) / ThreadPool::shared().size());
    wall.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  double ms() const { return median(wall); }
  double cpu_ms() const { return median(cpu); }
};

struct Format {
  const char* name;
  KvDtype dtype = KvDtype::kF16;
  KvBits bits = 0;
  bool bias = false;
};
const Format kFormats[] = {{"f32", KvDtype::kF32},           {"f16"},
                           {"bf16", KvDtype::kBF16},         {"8", KvDtype::kF16, 8},
                           {"8,4", KvDtype::kF16, {8, 4}},   {"4", KvDtype::kF16, 4},
                           {"8+bias", KvDtype::kF16, 8, true}, {"4+bias", KvDtype::kF16, 4, true}};

/// The runs of one layer: each tensor of a run after the other, as a cache holds them.
struct Runs {
  std::vector<std::byte> memory;
  std::vector<KvRunView> views;

  Runs(const AttentionSpec& spec, int tokens) {
    const size_t elements = size_t(spec.n_kv_heads) * kSegmentTokens * size_t(spec.head_dim);
    const size_t size = kv_dtype_size(spec.kv_dtype);
    const auto bytes = [&](int bits) { return bits == 0 ? elements * size : elements * size_t(bits) / 8; };
    const size_t keys = bytes(spec.kv_bits.keys), values = bytes(spec.kv_bits.values);
    const size_t scales = spec.kv_bits == 0 ? 0 : elements / size_t(spec.kv_group) * size;
    const size_t n = size_t(tokens + kSegmentTokens - 1) / kSegmentTokens, run = keys + values + 4 * scales;
    memory.resize(n * run);
    for (size_t i = 0; i < n; ++i) {
      std::byte* at = memory.data() + i * run;
      views.push_back({.keys = at, .values = at + keys + 2 * scales});
      if (scales == 0) continue;
      views.back().key_scales = at + keys;
      views.back().key_biases = at + keys + scales;
      views.back().value_scales = at + keys + 2 * scales + values;
      views.back().value_biases = at + keys + 3 * scales + values;
    }
  }
};

/// GB/s of all threads adding up `memory`: what a kernel that reads it can't exceed.
double read_rate(const std::vector<Runs>& layers) {
  Times times;
  for (int i = 0; i < 9; ++i) {
    times.take([&] {
      ThreadPool::shared().parallel_for(layers.size(), [&](size_t layer, int) {
        const auto* words = reinterpret_cast<const uint64_t*>(layers[layer].memory.data());
        uint64_t sums[8] = {};
        for (size_t w = 0; w + 8 <= layers[layer].memory.size() / 8; w += 8) {
          for (size_t j = 0; j < 8; ++j) sums[j] += words[w + j];
        }
        volatile uint64_t sink = sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
        (void)sink;
      });
    });
  }
  double bytes = 0;
  for (const Runs& layer : layers) bytes += double(layer.memory.size());
  return bytes / times.cpu_ms() / 1e6;
}

}  // namespace

int main(int argc, char** argv) {
  const auto arg = [&](int i, int fallback) { return argc > i ? std::atoi(argv[i]) : fallback; };
  AttentionSpec spec;
  spec.n_heads = arg(1, 9);
  spec.n_kv_heads = arg(2, 3);
  spec.head_dim = arg(3, 64);
  const size_t layers = size_t(arg(4, 30));
  const int depth = arg(5, 4096);
  const std::string only = argc > 6 ? argv[6] : "";
  spec.scale = 1.0f / std::sqrt(float(spec.head_dim));
  spec.rope.dims = spec.head_dim;
  for (int i = 0; i < spec.head_dim / 2; ++i) {
    spec.rope.inv_freq.push_back(float(std::pow(10000.0, -2.0 * i / spec.head_dim)));
  }
  std::printf("%s, %d threads, %d/%d heads of %d, %zu layers\n", cpu_target_name(), ThreadPool::shared().size(),
              spec.n_heads, spec.n_kv_heads, spec.head_dim, layers);

  const size_t width = size_t(spec.n_heads + 2 * spec.n_kv_heads) * size_t(spec.head_dim);
  constexpr int kChunk = 512, kBatch = 8;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> source(kChunk * width), qkv, out(kChunk * size_t(spec.n_heads * spec.head_dim));
  for (float& x : source) x = normal(random);
  std::vector<float> bias(size_t(spec.n_kv_heads * spec.head_dim));
  for (float& x : bias) x = 20 * normal(random);

  for (const Format& format : kFormats) {
    if (!only.empty() && only != format.name) continue;
    spec.kv_dtype = format.dtype;
    spec.kv_bits = format.bits;
    spec.key_bias = format.bias ? bias.data() : nullptr;
    spec.rotate_keys = format.bits.keys == 4;
    spec.rotate_values = format.bits.values == 4;
    // Memory of its own for each layer, so that a decoded token reads as much as in a model.
    std::vector<Runs> caches;
    for (size_t layer = 0; layer < layers; ++layer) caches.emplace_back(spec, depth + 1);
    AttentionSpec append = spec;
    append.window = 1;
    for (const Runs& cache : caches) {
      for (int first = 0; first < depth; first += kChunk) {
        qkv = source;
        const AttentionSequence sequence{0, std::min(kChunk, depth - first), first, cache.views};
        attention(qkv.data(), append, std::span(&sequence, 1), out.data());
      }
    }

    Times prefill;
    const int last = std::max(0, depth - kChunk);
    for (int i = 0; i < 5; ++i) {
      qkv = source;
      const AttentionSequence sequence{0, depth - last, last, caches[0].views};
      prefill.take([&] { attention(qkv.data(), spec, std::span(&sequence, 1), out.data()); });
    }
    const double flop = 4.0 * spec.n_heads * spec.head_dim * (double(depth - last) * (depth + last + 1) / 2);

    // The batch's sequences have the prefix in common, as agents of one prompt have, and a run of their own.
    const int common = depth / kSegmentTokens * kSegmentTokens;
    std::vector<std::vector<Runs>> own;
    std::vector<std::vector<std::vector<KvRunView>>> views;
    for (size_t layer = 0; layer < layers; ++layer) {
      own.emplace_back();
      views.emplace_back();
      for (int i = 0; i < kBatch; ++i) {
        own.back().emplace_back(spec, 1);
        views.back().emplace_back(caches[layer].views.begin(), caches[layer].views.begin() + common / kSegmentTokens);
        views.back().back().push_back(own.back().back().views[0]);
      }
    }
    Times decode, batch;
    // Medians of at least 15, and of a second's worth.
    for (double spent = 0; decode.wall.size() < 15 || spent < 1000; spent += decode.wall.back() + batch.wall.back()) {
      decode.take([&] {
        for (size_t layer = 0; layer < layers; ++layer) {
          qkv.assign(source.begin(), source.begin() + std::ptrdiff_t(width));
          const AttentionSequence sequence{0, 1, depth, caches[layer].views};
          attention(qkv.data(), spec, std::span(&sequence, 1), out.data());
        }
      });
      batch.take([&] {
        for (size_t layer = 0; layer < layers; ++layer) {
          qkv.assign(source.begin(), source.begin() + std::ptrdiff_t(kBatch * width));
          std::vector<AttentionSequence> sequences;
          for (int s = 0; s < kBatch; ++s) sequences.push_back({s, 1, common, views[layer][size_t(s)]});
          attention(qkv.data(), spec, sequences, out.data());
        }
      });
    }
    const double held = double(caches[0].views.size() * kSegmentTokens);
    const double bytes = double(layers) * depth * double(caches[0].memory.size()) / held;
    std::printf("%-7s at %d: decode %.3f ms (CPU %.3f ms a thread, %.1f GB/s of KV; plain read %.1f), "
                "%d of one prefix %.3f ms (CPU %.3f), prefill of %d %.1f GFLOP/s (CPU)\n",
                format.name, depth, decode.ms(), decode.cpu_ms(), bytes / decode.cpu_ms() / 1e6, read_rate(caches),
                kBatch, batch.ms(), batch.cpu_ms(), depth - last, flop / prefill.cpu_ms() / 1e6);
    std::fflush(stdout);
  }
}
