/// many_agents_bench [AGENTS]: what a store of 10,000 agents (unless said otherwise) costs those who open it and look at it.
/// Medians of 11 runs, each with a Store of its own; the files are in the page cache.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <unistd.h>

#include "torpor/error.h"
#include "torpor/store.h"

namespace {

double median_ms(const std::function<void()>& run) {
  std::vector<double> times;
  for (int i = 0; i < 11; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + 5, times.end());
  return times[5];
}

}  // namespace

int main(int argc, char** argv) {
  const int n = argc > 1 ? std::atoi(argv[1]) : 10'000;
  const auto root = std::filesystem::temp_directory_path() / ("torpor-bench-" + std::to_string(::getpid()));
  try {
    torpor::KvSnapshot snapshot;
    snapshot.layout.tensors = {{"layer_0_keys", torpor::KvDtype::kF16, 1, 64, 0},
                               {"layer_0_values", torpor::KvDtype::kF16, 1, 64, 0}};
    const int tokens = torpor::kSegmentTokens + 1;
    for (int done = 0; done < tokens; done += torpor::kSegmentTokens) {
      const int rows = std::min(torpor::kSegmentTokens, tokens - done);
      const size_t size = snapshot.layout.offset(2, rows);
      const auto buffer = torpor::allocate_heap_buffer(size);
      std::fill_n(buffer.get(), size, std::byte(1));
      snapshot.add_run(rows, {buffer.get(), size}, buffer);
    }
    snapshot.tokens.assign(size_t(tokens), 1);
    {
      torpor::Store store(root);
      for (int i = 0; i < n; ++i) {
        snapshot.tokens.front() = i % 1000;  // a thousand segments, each of ten agents
        store.save_agent_cache("agent-" + std::to_string(i), snapshot, "some/model", {{"messages", "[]"}},
                               torpor::Durability::kRename);
      }
    }
    const auto last = "agent-" + std::to_string(n - 1);
    std::printf("%d agents\n", n);
    std::printf("open                 %8.2f ms\n", median_ms([&] { torpor::Store store(root); }));
    std::printf("open, load one       %8.2f ms\n", median_ms([&] { torpor::Store(root).load_agent_cache(last); }));
    std::printf("open, list (ls)      %8.2f ms\n", median_ms([&] { torpor::Store(root).list_cached_agents(); }));
    std::printf("open, usage (du)     %8.2f ms\n", median_ms([&] { torpor::Store(root).get_cache_disk_usage(); }));
    std::printf("save one             %8.2f ms\n", median_ms([&] {
      torpor::Store(root).save_agent_cache(last, snapshot, "some/model", {}, torpor::Durability::kRename);
    }));
    std::printf("save one, in limits  %8.2f ms\n", median_ms([&] {
      torpor::Store store(root);
      store.set_disk_limits({.budget = int64_t(1) << 40});
      store.save_agent_cache(last, snapshot, "some/model", {}, torpor::Durability::kRename);
    }));
  } catch (const torpor::Error& error) {
    std::fprintf(stderr, "many_agents_bench: %s\n", error.what());
  }
  std::filesystem::remove_all(root);
  return 0;
}
