// Times the linear kernels on weights of each format: MLX's and GGUF's, for 1, 2, 4 and 8 rows, and many.
// formats_bench [rows=512] [megabytes=96] [repeats=5] [NAME...]
// TORPOR_THREADS, TORPOR_CPU_TARGET and TORPOR_ACTIVATIONS apply. Of one thread the time is its CPU's. Weights are as
// many matrices [4864, 1024] as take so many megabytes: more than caches hold. Bits are those in memory.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/gguf.h"
#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "kernels/packed_linear.h"
#include "kernels/thread_pool.h"

using namespace torpor;
using namespace torpor::kernels;

namespace {

constexpr int kN = 4864, kK = 1024;

struct Format {
  const char* name;
  WeightSource::Type type;
  int bits, group;
  std::optional<GgmlType> blocks = std::nullopt;
};
constexpr auto kAffine = WeightSource::Type::kAffine;
const Format kFormats[] = {
    {"4 bits, group 64", kAffine, 4, 64},
    {"4 bits, group 32", kAffine, 4, 32},
    {"2 bits, group 64", kAffine, 2, 64},
    {"3 bits, group 64", kAffine, 3, 64},
    {"5 bits, group 64", kAffine, 5, 64},
    {"6 bits, group 64", kAffine, 6, 64},
    {"8 bits, group 64", kAffine, 8, 64},
    {"mxfp4", WeightSource::Type::kMxfp4, 4, 32},
    {"nvfp4", WeightSource::Type::kNvfp4, 4, 16},
    {"mxfp8", WeightSource::Type::kMxfp8, 8, 32},
    {"Q4_0", kAffine, 0, 0, GgmlType::kQ4_0},
    {"Q4_1", kAffine, 0, 0, GgmlType::kQ4_1},
    {"Q5_0", kAffine, 0, 0, GgmlType::kQ5_0},
    {"Q5_1", kAffine, 0, 0, GgmlType::kQ5_1},
    {"Q8_0", kAffine, 0, 0, GgmlType::kQ8_0},
    {"Q2_K", kAffine, 0, 0, GgmlType::kQ2_K},
    {"Q3_K", kAffine, 0, 0, GgmlType::kQ3_K},
    {"Q4_K", kAffine, 0, 0, GgmlType::kQ4_K},
    {"Q5_K", kAffine, 0, 0, GgmlType::kQ5_K},
    {"Q6_K", kAffine, 0, 0, GgmlType::kQ6_K},
    {"IQ4_NL", kAffine, 0, 0, GgmlType::kIQ4_NL},
    {"IQ4_XS", kAffine, 0, 0, GgmlType::kIQ4_XS},
    {"MXFP4", kAffine, 0, 0, GgmlType::kMXFP4},
};

/// Random codes and scales of no meaning.
std::shared_ptr<const PackedLinear> pack(const Format& format, Activations activations, std::mt19937& rng) {
  WeightSource source;
  source.type = format.type;
  source.n = kN;
  source.k = kK;
  source.bits = format.bits;
  source.group = format.group;
  source.blocks = format.blocks;
  const GgmlTypeInfo* info = format.blocks ? &ggml_type_info(*format.blocks) : nullptr;
  const size_t numbers = size_t(kN) * kK;
  std::vector<uint8_t> weight(info ? numbers / size_t(info->columns) * size_t(info->bytes)
                                   : numbers * size_t(format.bits) / 8);
  // None is NaN as f16.
  for (uint8_t& byte : weight) byte = uint8_t(rng()) & (info ? 0x3b : 0xff);
  std::vector<uint16_t> scales(info ? 0 : numbers / size_t(format.group), 0x3838);
  source.weight = weight.data();
  source.scales = source.biases = scales.data();
  return PackedLinear::pack({source}, activations);
}

double seconds() {
  timespec now{};
  clock_gettime(ThreadPool::shared().size() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

}  // namespace

int main(int argc, char** argv) {
  const int rows = argc > 1 ? std::atoi(argv[1]) : 512, megabytes = argc > 2 ? std::atoi(argv[2]) : 96;
  const int repeats = argc > 3 ? std::atoi(argv[3]) : 5;
  const std::vector<std::string> names(argv + std::min(argc, 4), argv + argc);
  const auto activations = with_environment({}).activations.value_or(fastest_activations());
  std::mt19937 rng(1);
  std::vector<float> x(size_t(rows) * kK), y(size_t(rows) * kN);
  for (float& v : x) v = std::uniform_real_distribution<float>(-1, 1)(rng);
  std::printf("target %s, %d threads, %s; medians of %d\n%-18s %6s", cpu_target_name(), ThreadPool::shared().size(),
              activations_name(activations), repeats, "", "bits");
  std::vector<int> sizes{1, 2, 4, 8, rows};
  for (const int m : sizes) std::printf(m <= 8 ? "   M=%d GB/s" : "   M=%d GFLOP/s", m);
  std::printf("\n");
  for (const Format& format : kFormats) {
    if (!names.empty() && std::find(names.begin(), names.end(), format.name) == names.end()) continue;
    std::vector<std::shared_ptr<const PackedLinear>> weights{pack(format, activations, rng)};
    const size_t bytes = weights[0]->nbytes(), count = size_t(megabytes) * 1000000 / bytes + 1;
    while (weights.size() < count) weights.push_back(pack(format, activations, rng));
    std::printf("%-18s %6.3f", format.name, double(bytes) * 8 / kN / kK);
    for (const int m : sizes) {
      const size_t of = m <= 8 ? count : 2;
      std::vector<double> times;
      for (int i = 0; i <= repeats; ++i) {
        const double start = seconds();
        for (size_t w = 0; w < of; ++w) linear(x.data(), m, *weights[w], nullptr, y.data());
        // The first warms up.
        if (const double took = seconds() - start; i > 0) times.push_back(took / double(of));
      }
      std::sort(times.begin(), times.end());
      const double median = times[times.size() / 2];
      std::printf(m <= 8 ? " %10.1f" : " %14.0f", (m <= 8 ? double(bytes) : 2.0 * m * kN * kK) / median / 1e9);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  return 0;
}
