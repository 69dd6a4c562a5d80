// Times the linear kernels on the shapes of SmolLM2-135M or Qwen2.5-0.5B (4-bit; 8-bit head), for 1 to 8 rows and many.
// kernels_bench [layers=30] [rows=512] [repeats=5] [smollm2|qwen2.5]
// TORPOR_THREADS, TORPOR_CPU_TARGET and TORPOR_ACTIVATIONS apply. Of one thread the time is its CPU's, which counts nobody else's.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/packed_linear.h"
#include "kernels/thread_pool.h"

using namespace torpor::kernels;

namespace {

struct Weights {
  std::vector<uint32_t> words;
  std::vector<uint16_t> scales, biases;
  WeightSource source;

  Weights(int n, int k, int bits, int group, std::mt19937& rng) {
    words.resize(size_t(n) * k * bits / 32);
    for (uint32_t& w : words) w = uint32_t(rng());
    scales.assign(size_t(n) * k / group, 0x1c00);  // 2^-8
    biases.assign(scales.size(), 0x9c00);
    source.type = WeightSource::Type::kAffine;
    source.n = n;
    source.k = k;
    source.weight = words.data();
    source.bits = bits;
    source.group = group;
    source.scales = scales.data();
    source.biases = biases.data();
  }
};

double seconds() {
  timespec now{};
  clock_gettime(ThreadPool::shared().size() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

/// On a machine that others use too, the least tells more than the median.
struct Seconds {
  double median, least;
};

template <class F>
Seconds time_of(int repeats, F&& f) {
  f();
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const double start = seconds();
    f();
    times.push_back(seconds() - start);
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times[0]};
}

using Packed = std::shared_ptr<const PackedLinear>;

struct Layer {
  Packed qkv, o, gate_up, down;
};

}  // namespace

int main(int argc, char** argv) {
  const int n_layers = argc > 1 ? std::atoi(argv[1]) : 30;
  const int rows = argc > 2 ? std::atoi(argv[2]) : 512;
  const int repeats = argc > 3 ? std::atoi(argv[3]) : 5;
  const bool qwen = argc > 4 && std::string_view(argv[4]) == "qwen2.5";
  const int kHidden = qwen ? 896 : 576, kQkv = qwen ? 1152 : 960, kInner = qwen ? 4864 : 1536;
  const int kVocabulary = qwen ? 151936 : 49152, kGroup = qwen ? 64 : 32;
  const auto activations = torpor::with_environment({}).activations.value_or(torpor::Activations::kF32);
  std::mt19937 rng(1);

  const double start = seconds();
  std::vector<Layer> layers;
  size_t bytes = 0;
  for (int i = 0; i < n_layers; ++i) {
    const Weights qkv(kQkv, kHidden, 4, kGroup, rng), o(kHidden, kHidden, 4, kGroup, rng),
        gate(kInner, kHidden, 4, kGroup, rng), up(kInner, kHidden, 4, kGroup, rng),
        down(kHidden, kInner, 4, kGroup, rng);
    layers.push_back({PackedLinear::pack({qkv.source}, activations), PackedLinear::pack({o.source}, activations),
                      PackedLinear::pack_gated(gate.source, up.source, activations),
                      PackedLinear::pack({down.source}, activations)});
    for (const Packed& p : {layers.back().qkv, layers.back().o, layers.back().gate_up, layers.back().down}) {
      bytes += p->nbytes();
    }
  }
  const Weights head_weights(kVocabulary, kHidden, 8, kGroup, rng);
  const Packed head = PackedLinear::pack({head_weights.source}, activations);
  bytes += head->nbytes();
  std::printf("target %s, %d threads; made and packed %.1f MB in %.2f s\n", cpu_target_name(), ThreadPool::shared().size(),
              double(bytes) / 1e6, seconds() - start);

  std::vector<float> x(size_t(rows) * kHidden), qkv(size_t(rows) * kQkv), inner(size_t(rows) * kInner),
      logits(8 * size_t(kVocabulary));
  for (float& v : x) v = std::uniform_real_distribution<float>(-1, 1)(rng);
  const std::vector<float> x0 = x;
  const double per_row = 2.0 * n_layers * (double(kQkv) * kHidden + double(kHidden) * kHidden + 3.0 * kInner * kHidden);
  auto run = [&](int m) {
    x = x0;
    for (const Layer& layer : layers) {
      linear(x.data(), m, *layer.qkv, nullptr, qkv.data());
      linear(x.data(), m, *layer.o, x.data(), qkv.data());
      gated_linear(x.data(), m, *layer.gate_up, Activation::kSilu, inner.data());
      linear(inner.data(), m, *layer.down, x.data(), qkv.data());
    }
    // Each of few rows is a sequence's last; of many one is.
    linear(x.data(), m <= 8 ? m : 1, *head, nullptr, logits.data());
  };

  struct Part {
    const char* name;
    Packed Layer::*weight;
    int n, k;
  };
  const Part parts[] = {{"qkv", &Layer::qkv, kQkv, kHidden},
                        {"o", &Layer::o, kHidden, kHidden},
                        {"gate_up", &Layer::gate_up, 2 * kInner, kHidden},
                        {"down", &Layer::down, kHidden, kInner}};
  std::vector<int> sizes;
  for (int m = 1; m <= std::min(8, rows); ++m) sizes.push_back(m);
  if (rows > 8) sizes.push_back(rows);
  double alone = 0;  // rows/s of M = 1
  for (const int m : sizes) {
    for (const Part& part : parts) {
      const auto [t, least] = time_of(repeats, [&] {
        for (const Layer& layer : layers) {
          const PackedLinear& w = *(layer.*part.weight);
          const float* in = part.k == kInner ? inner.data() : x.data();
          if (part.weight == &Layer::gate_up) {
            gated_linear(in, m, w, Activation::kSilu, inner.data());
          } else {
            linear(in, m, w, nullptr, qkv.data());
          }
        }
      });
      const double part_bytes = double((layers[0].*part.weight)->nbytes()) * n_layers;
      std::printf("  M=%-4d %-8s %8.1f GFLOP/s  %6.1f GB/s of weights; fastest %.1f GFLOP/s\n", m, part.name,
                  2.0 * m * part.n * part.k * n_layers / t / 1e9, part_bytes / t / 1e9,
                  2.0 * m * part.n * part.k * n_layers / least / 1e9);
    }
    if (m <= 8) {
      const auto [t, least] = time_of(repeats, [&] { linear(x.data(), m, *head, nullptr, logits.data()); });
      std::printf("  M=%-4d head     %8.1f GFLOP/s  %6.1f GB/s of weights; fastest %.1f GFLOP/s\n", m,
                  2.0 * m * kVocabulary * kHidden / t / 1e9, double(head->nbytes()) / t / 1e9,
                  2.0 * m * kVocabulary * kHidden / least / 1e9);
    }
    const auto [t, least] = time_of(repeats, [&] { run(m); });
    const double flop = per_row * m + 2.0 * kVocabulary * kHidden * (m <= 8 ? m : 1);
    if (m == 1) alone = 1 / least;
    std::printf("M=%-4d all linear layers: %8.2f ms  %8.1f rows/s  %7.1f GFLOP/s  %6.1f GB/s of weights; "
                "fastest %.2f ms, %.1f rows/s, %.2f times those of M=1\n",
                m, t * 1e3, m / t, flop / t / 1e9, double(bytes) / t / 1e9, least * 1e3, m / least, m / least / alone);
  }
  return 0;
}
