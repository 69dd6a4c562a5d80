/// What agents cost, without a model: rows of SmolLM2-135M's shape (30 layers, 3 KV heads of 64, f16) with random bytes.
///
///     agents_bench save STORE TOKENS DURABILITY    first save; the save of a turn of 64 tokens on top of it; a fork
///     agents_bench wake STORE                      the same agent in a new process; and a parallel memcpy of its bytes
///     agents_bench conversation STORE TOKENS       as many tokens in 50 turns, each saved
///     agents_bench chunks STORE TOKENS             wakes two such agents in turn, whose last 255 rows are in one file and in eight
///
/// Prints one JSON object. bench/peers/agents.py drives it.

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "torpor/agents.h"
#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace {

using namespace torpor;

template <class F>
double timed(F&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

KvLayout layout() {
  KvLayout layout;
  for (int i = 0; i < 30; ++i) {
    for (const char* part : {"_keys", "_values"}) {
      layout.tensors.push_back({"layer_" + std::to_string(i) + part, KvDtype::kF16, 3, 64, 0});
    }
  }
  return layout;
}

Identity identity() {
  Identity identity;
  identity.architecture = "agents_bench";
  identity.kv = "f16";
  return identity;
}

/// "Computes" `n` tokens.
void grow(KvCache& cache, int n) {
  std::mt19937_64 random(static_cast<uint64_t>(cache.length()));
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  for (int32_t& token : tokens) token = int32_t(random() % 49152);
  const auto runs = cache.reserve(n);
  const size_t row = 64 * 2;
  for (int position = cache.length(); position < cache.length() + n; ++position) {
    std::byte* run = runs[size_t(position / kSegmentTokens)].data;
    for (int head = 0; head < 60 * 3; ++head) {
      std::byte* at = run + (size_t(head) * kSegmentTokens + size_t(position % kSegmentTokens)) * row;
      for (size_t i = 0; i < row; i += 8) {
        const uint64_t bits = random();
        std::memcpy(at + i, &bits, 8);
      }
    }
  }
  cache.record_tokens(tokens);
  cache.advance(n);
}

Durability durability(const std::string& name) {
  return name == "full" ? Durability::kFull : name == "rename" ? Durability::kRename : Durability::kNone;
}

void save(const char* root, int n_tokens, Durability durability) {
  Store store(root);
  const auto cache = KvCache::create(layout(), {}, Backend::kKernels);
  grow(*cache, n_tokens);
  SaveResult first, turn, fork;
  const double first_ms = timed([&] {
    first = store.save_agent_cache("a", cache->snapshot(identity(), /*copy_tail=*/false), "m", {}, durability);
  });
  grow(*cache, 64);
  const double turn_ms = timed([&] {
    turn = store.save_agent_cache("a", cache->snapshot(identity(), /*copy_tail=*/false), "m", {}, durability);
  });
  // At a segment's end, where no row is left to write.
  const int64_t at = n_tokens / kSegmentTokens * kSegmentTokens;
  const double fork_ms = timed([&] { fork = fork_agent(store, "a", "fork", at, durability); });
  std::unique_ptr<KvCache> clone;
  const double clone_ms = timed([&] { clone = cache->clone(); });
  std::printf(
      "{\"tokens\":%d,\"first_bytes\":%lld,\"save_ms\":%.3f,\"turn_ms\":%.3f,\"turn_bytes\":%lld,\"fork_ms\":%.3f,"
      "\"fork_bytes\":%lld,\"fork_awake_ms\":%.4f}\n",
      n_tokens, static_cast<long long>(first.bytes_written), first_ms, turn_ms,
      static_cast<long long>(turn.bytes_written), fork_ms, static_cast<long long>(fork.bytes_written), clone_ms);
}

/// A field of /proc/self/status in bytes; 0 where there is none.
int64_t status(const std::string& field) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(field + ":")) return std::atoll(line.c_str() + field.size() + 1) * 1024;
  }
  return 0;
}

/// Milliseconds to copy `size` bytes with every thread, memory touched before; the best of five.
double memcpy_ms(size_t size) {
  const size_t threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<char> from(size, 1), to(size, 2);
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    best = std::min(best, timed([&] {
      std::vector<std::jthread> copies;
      for (size_t t = 0; t < threads; ++t) {
        const size_t first = size * t / threads, last = size * (t + 1) / threads;
        copies.emplace_back([&, first, last] { std::memcpy(to.data() + first, from.data() + first, last - first); });
      }
    }));
  }
  return best;
}

void wake(const char* root) {
  Store store(root);
  const int64_t before = status("VmRSS");
  std::unique_ptr<KvCache> cache;
  const Identity expected = identity();
  int64_t bytes = 0;
  const double wake_ms = timed([&] {
    const auto lock = store.lock_agent("a");
    LoadOptions options;
    options.expected = &expected;
    options.allocate = mlx_buffer;
    options.map_rows = true;
    options.tail_in_run = true;
    const LoadedAgent loaded = store.load_agent_cache("a", options);
    cache = KvCache::restore(loaded.snapshot, Backend::kKernels);
    bytes = loaded.bytes_read;
  });
  const int64_t peak = status("VmHWM") - before;
  std::printf(
      "{\"tokens\":%d,\"read_bytes\":%lld,\"wake_ms\":%.3f,\"memcpy_ms\":%.3f,\"peak_bytes\":%lld,\"kv_bytes\":%lld}\n",
      cache->length(), static_cast<long long>(bytes), wake_ms, memcpy_ms(size_t(bytes)), static_cast<long long>(peak),
      static_cast<long long>(cache->nbytes()));
}

void converse(const char* root, int n_tokens) {
  Store store(root);
  const auto cache = KvCache::create(layout(), {}, Backend::kKernels);
  int64_t written = 0;
  for (int turn = 0; turn < 50; ++turn) {
    grow(*cache, n_tokens * (turn + 1) / 50 - cache->length());
    written += store.save_agent_cache("a", cache->snapshot(identity()), "m", {}, Durability::kRename).bytes_written;
  }
  std::printf("{\"tokens\":%d,\"written\":%lld,\"bytes\":%lld}\n", cache->length(), static_cast<long long>(written),
              static_cast<long long>(store.agent_info("a").bytes));
}

/// An agent of `n_tokens` in whole segments and 255 more, the last ones saved in as many turns as `turns` names.
void talk(Store& store, const std::string& id, int n_tokens, const std::vector<int>& turns) {
  const auto cache = KvCache::create(layout(), {}, Backend::kKernels);
  grow(*cache, n_tokens / kSegmentTokens * kSegmentTokens);
  for (const int n : turns) {
    grow(*cache, n);
    store.save_agent_cache(id, cache->snapshot(identity()), "m", {}, Durability::kRename);
  }
}

void chunks(const char* root, int n_tokens) {
  constexpr int kWakes = 101;
  const std::string ids[] = {"one", "eight"};
  {
    Store store(root);
    talk(store, ids[0], n_tokens, {255});
    // None of them is written again: they have more than 32 rows.
    talk(store, ids[1], n_tokens, {33, 33, 33, 33, 33, 33, 33, 24});
  }
  std::vector<double> times[2];
  for (int i = 0; i < 2 * kWakes; ++i) {
    Store store(root);  // one that has seen nothing
    std::unique_ptr<KvCache> cache;
    times[i % 2].push_back(timed([&] {
      const LoadedAgent loaded =
          store.load_agent_cache(ids[i % 2], {.allocate = mlx_buffer, .map_rows = true, .tail_in_run = true});
      cache = KvCache::restore(loaded.snapshot, Backend::kKernels);
    }));
  }
  std::vector<double> ratios;
  for (size_t i = 0; i < size_t(kWakes); ++i) ratios.push_back(times[1][i] / times[0][i]);
  const auto median = [](std::vector<double>& values) {
    std::nth_element(values.begin(), values.begin() + ssize(values) / 2, values.end());
    return values[values.size() / 2];
  };
  std::printf("{\"tokens\":%d,\"one_ms\":%.3f,\"eight_ms\":%.3f,\"ratio\":%.3f}\n",
              n_tokens / kSegmentTokens * kSegmentTokens + 255, median(times[0]), median(times[1]), median(ratios));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 2 ? argv[1] : "";
  try {
    if (mode == "save" && argc == 5) {
      save(argv[2], std::atoi(argv[3]), durability(argv[4]));
    } else if (mode == "wake" && argc == 3) {
      wake(argv[2]);
    } else if (mode == "conversation" && argc == 4) {
      converse(argv[2], std::atoi(argv[3]));
    } else if (mode == "chunks" && argc == 4) {
      chunks(argv[2], std::atoi(argv[3]));
    } else {
      std::fputs(
          "usage: agents_bench save STORE TOKENS DURABILITY | wake STORE | conversation STORE TOKENS | chunks STORE "
          "TOKENS\n",
          stderr);
      return 2;
    }
  } catch (const torpor::Error& error) {
    std::fprintf(stderr, "agents_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
