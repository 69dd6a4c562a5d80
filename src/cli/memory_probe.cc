#include "cli/memory_probe.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "base/large_pages.h"
#include "kernels/thread_pool.h"

namespace torpor::cli {

double probe_memory() {
  const size_t size = std::min<uint64_t>(size_t(256) << 20, available_memory() / 4) / kLargePage * kLargePage;
  if (size == 0) return 0;
  const auto memory = allocate_large_pages(size);
  const size_t pages = size / kLargePage, words = kLargePage / sizeof(uint64_t);
  auto* const numbers = reinterpret_cast<uint64_t*>(memory.get());
  std::vector<uint64_t> sums(pages);
  const auto pass = [&](const std::function<void(size_t, int)>& body) {
    const auto start = std::chrono::steady_clock::now();
    kernels::ThreadPool::shared().parallel_for(pages, body);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  pass([&](size_t page, int) { std::fill_n(numbers + page * words, words, page); });
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 5; ++i) {
    best = std::min(best, pass([&](size_t page, int) {
      uint64_t sum[8] = {};  // so many additions do not wait for each other
      const uint64_t* at = numbers + page * words;
      for (size_t word = 0; word < words; word += 8) {
        for (size_t lane = 0; lane < 8; ++lane) sum[lane] += at[word + lane];
      }
      for (const uint64_t lane : sum) sums[page] += lane;
    }));
  }
  return double(size) / best;
}

}  // namespace torpor::cli
