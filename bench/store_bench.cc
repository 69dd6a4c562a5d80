/// store_bench STORE AGENT: for every line on standard input, loads the agent as waking does (every checksum, into MLX's
/// memory, up to a KvCache that generation could go on from), and prints the milliseconds. After the line "fresh" MLX's
/// allocator has no memory to recycle, as in a new process; after "recycled" it has that of the load before.
/// bench/load_vs_mlx_lm.py drives it.

#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>

#include <mlx/memory.h>

#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/store.h"

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fputs("usage: store_bench STORE AGENT\n", stderr);
    return 2;
  }
  try {
    const torpor::Store store(argv[1]);
    std::string line;
    while (std::getline(std::cin, line)) {
      if (line == "fresh") mlx::core::clear_cache();
      const auto start = std::chrono::steady_clock::now();
      torpor::LoadOptions options;
      options.allocate = torpor::mlx_buffer;
      options.map_rows = true;
      const torpor::LoadedAgent agent = store.load_agent_cache(argv[2], options);
      const auto cache = torpor::KvCache::restore(agent.snapshot, torpor::default_backend());
      const double ms =
          std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
      std::printf("%.3f %d\n", ms, cache->length());
      std::fflush(stdout);
    }
  } catch (const torpor::Error& error) {
    std::fprintf(stderr, "store_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
