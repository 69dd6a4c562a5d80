/// bench: how fast a model computes, saves and wakes on this machine.

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include <CLI/CLI.hpp>
#include <mlx/memory.h>

#include "base/env.h"
#include "cli/bench_report.h"
#include "cli/commands.h"
#include "cli/disk_probe.h"
#include "cli/interrupt.h"
#include "cli/memory_probe.h"
#include "cli/model_options.h"
#include "cli/output.h"
#include "cli/text_input.h"
#include "engine/generation.h"
#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/model.h"
#include "torpor/store.h"

namespace torpor::cli {
namespace {

constexpr const char* kAgent = "bench";

struct BenchOptions : ModelOptions {
  std::string prefill = "512,2048", depth = "0,4096", agents = "1";
  int decode = 64, runs = 5;
  SamplingOptions sampling;
  bool json = false;
  std::string plot, save, compare;  // files
};

/// "512,2048" as numbers of at least `least`, in the order given.
std::vector<int> parse_list(const std::string& text, const char* option, int least) {
  std::vector<int> values;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (true) {
    int value = 0;
    const auto [stop, error] = std::from_chars(at, end, value);
    if (error != std::errc() || value < least || (stop != end && *stop != ',')) {
      throw Error(ErrorCode::kInvalidArgument, std::string(option) + " must be whole numbers of at least " +
                                                   std::to_string(least) + ", separated by commas, not '" + text + "'");
    }
    if (std::find(values.begin(), values.end(), value) != values.end()) {
      throw Error(ErrorCode::kInvalidArgument, std::string(option) + " names " + std::to_string(value) + " twice");
    }
    values.push_back(value);
    if (stop == end) return values;
    at = stop + 1;
  }
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

/// The largest resident set that this process has had.
int64_t peak_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
  return usage.ru_maxrss;
#else
  return int64_t{usage.ru_maxrss} * 1024;
#endif
}

/// Random ids that are the same in every process.
std::vector<int32_t> random_tokens(int n, int vocab) {
  std::vector<int32_t> tokens;
  uint64_t state = 42;
  for (int i = 0; i < n; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    tokens.push_back(int32_t((state >> 33) % uint64_t(vocab)));
  }
  return tokens;
}

/// A directory of its own under the system's temporary one.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::error_code error;
    const std::filesystem::path parent = std::filesystem::temp_directory_path(error);
    if (error) throw Error(ErrorCode::kIo, "can't find the system's temporary directory (see TMPDIR): " + error.message());
    std::string name = (parent / "torpor-bench.XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) {
      throw Error(ErrorCode::kIo, "can't make a temporary directory '" + name + "': " + std::strerror(errno));
    }
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Ends a benchmark at the next run after a signal.
struct Interrupted {};

class Bench {
 public:
  Bench(const BenchOptions& options, Model& model, const KvFormat& kv_format, InterruptScope& interrupt)
      : options_(options), model_(model), format_(kv_format), layout_(model.kv_layout(kv_format)),
        identity_(model.identity()), interrupt_(interrupt) {
    identity_.kv = kv_format.name();
  }

  BenchReport measure(const std::vector<int>& prefill, const std::vector<int>& depths, const std::vector<int>& agents) {
    std::set<int> moved;  // sizes that were saved and woken
    const auto move = [&](std::unique_ptr<KvCache> cache) {
      if (cache->length() > 0 && moved.insert(cache->length()).second) move_cache(std::move(cache));
    };
    for (const int n : prefill) {
      status("prefill of " + std::to_string(n));
      std::unique_ptr<KvCache> cache;
      const double ms = median_ms([&] {
        cache.reset();  // before the next one takes memory
        cache = KvCache::create(layout_, format_, model_.backend(), model_.state_layout());
        const auto tokens = random_tokens(n, model_.info().vocab_size);
        return timed([&] { forward(*cache, tokens); });
      });
      report_.rows.push_back({BenchRow::kPrefill, n, 1, n / ms * 1000});
      move(std::move(cache));
    }
    for (const int depth : options_.decode > 0 ? depths : std::vector<int>{}) {
      status("decode at depth " + std::to_string(depth));
      auto cache = KvCache::create(layout_, format_, model_.backend(), model_.state_layout());
      if (depth > 0) forward(*cache, random_tokens(depth, model_.info().vocab_size));
      for (const int n : agents) {
        status("decode by " + std::to_string(n) + " at depth " + std::to_string(depth));
        const double ms = median_ms([&] { return decode(*cache, n); });
        report_.rows.push_back({BenchRow::kDecode, depth, n, n * options_.decode / ms * 1000});
      }
      move(std::move(cache));
    }
    std::ranges::stable_sort(report_.rows, {}, &BenchRow::kind);
    report_.peak_bytes = peak_bytes();
    look_at_machine();
    status("");
    return std::move(report_);
  }

 private:
  using Clock = std::chrono::steady_clock;

  template <class F>
  static double timed(F&& work) {
    const auto start = Clock::now();
    work();
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  }

  /// The median of `run`'s milliseconds; the first run warms up.
  template <class F>
  double median_ms(F&& run) {
    std::vector<double> times;
    for (int i = 0; i <= options_.runs; ++i) {
      if (interrupt_.signal() != 0) throw Interrupted();
      const double ms = run();
      if (i > 0) times.push_back(ms);
    }
    return median(std::move(times));
  }

  /// The likeliest token after `tokens`.
  int32_t forward(KvCache& cache, std::span<const int32_t> tokens) {
    const ForwardSequence sequence{tokens, &cache, false};
    const mx::array logits = model_.forward({&sequence, 1});
    cache.record_tokens(tokens);
    return sample({logits.data<float>(), logits.size()}, options_.sampling, cache.length());
  }

  /// As many agents that begin with the cache's rows, each with another token; a step is one forward pass over all of them.
  double decode(const KvCache& cache, int agents) {
    std::vector<int32_t> tokens = random_tokens(agents, model_.info().vocab_size);
    std::vector<std::unique_ptr<KvCache>> caches;
    for (int i = 0; i < agents; ++i) caches.push_back(cache.clone());
    const size_t vocab = size_t(model_.info().vocab_size);
    return timed([&] {
      for (int step = 0; step < options_.decode; ++step) {
        std::vector<ForwardSequence> batch;
        for (size_t i = 0; i < caches.size(); ++i) batch.push_back({.tokens = {&tokens[i], 1}, .kv = caches[i].get()});
        const mx::array logits = model_.forward(batch);
        for (size_t i = 0; i < caches.size(); ++i) {
          caches[i]->record_tokens({&tokens[i], 1});
          tokens[i] = sample({logits.data<float>() + i * vocab, vocab}, options_.sampling, caches[i]->length());
        }
      }
    });
  }

  /// Saves into an empty store each time, then wakes from it.
  void move_cache(std::unique_ptr<KvCache> cache) {
    const int n = cache->length();
    status("save and wake of " + std::to_string(n));
    const TemporaryDirectory directory;
    std::filesystem::path root;
    int64_t written = 0, read = 0;
    int run = 0;
    const double save_ms = median_ms([&] {
      std::error_code ignored;
      if (!root.empty()) std::filesystem::remove_all(root, ignored);  // so that one is on disk at a time
      root = directory.path() / std::to_string(run++);
      Store store(root);
      const auto lock = store.lock_agent(kAgent);
      return timed([&] {
        written = store.save_agent_cache(kAgent, cache->snapshot(identity_, /*copy_tail=*/false), options_.model, {},
                                         options_.durability()).bytes_written;
      });
    });
    report_.rows.push_back({BenchRow::kSave, n, 1, save_ms, written});

    const double wake_ms = median_ms([&] {
      cache.reset();
      mx::clear_cache();  // a process that wakes an agent has fresh memory for its tail
      Store store(root);
      return timed([&] {
        const auto lock = store.lock_agent(kAgent);
        LoadOptions load;
        load.expected = &identity_;
        load.allocate = mlx_buffer;
        load.map_rows = true;
        load.tail_in_run = model_.backend() == Backend::kKernels;
        const LoadedAgent loaded = store.load_agent_cache(kAgent, load);
        cache = KvCache::restore(loaded.snapshot, model_.backend());
        read = loaded.bytes_read;
      });
    });
    report_.rows.push_back({BenchRow::kWake, n, 1, wake_ms, read});
  }

  void look_at_machine() {
    say("the memory and the disk...");
    report_.memory_bytes_per_s = probe_memory();
    report_.disk = probe_disk(Env::posix(), TemporaryDirectory().path());
    const double segment = double(layout_.offset(layout_.tensors.size(), kSegmentTokens));
    report_.find_limits(model_.info().weight_bytes, segment / kSegmentTokens, options_.durability() == Durability::kFull);
  }

  /// What is going on, for someone who watches.
  static void status(const std::string& what) { say(what.empty() ? "" : what + " tokens..."); }
  static void say(const std::string& what) {
    if (isatty(STDERR_FILENO)) std::fprintf(stderr, "\r\033[K%s", what.c_str());
  }

  const BenchOptions& options_;
  Model& model_;
  const KvFormat format_;
  const KvLayout layout_;
  Identity identity_;
  InterruptScope& interrupt_;
  BenchReport report_;
};

/// Told before anything is measured.
void check_files(const BenchOptions& options) {
  if (!options.plot.empty() && !options.plot.ends_with(".svg")) {
    throw Error(ErrorCode::kInvalidArgument, "--plot draws SVG; name a file that ends with .svg, not '" + options.plot + "'");
  }
  for (const std::string& file : {options.plot, options.save}) {
    if (file.empty()) continue;
    const std::filesystem::path there = std::filesystem::absolute(file).parent_path();
    if (access(there.c_str(), W_OK | X_OK) != 0) {
      throw Error(ErrorCode::kIo, "can't write '" + file + "': " + std::strerror(errno));
    }
  }
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  if (!(file << text) || !file.flush()) throw Error(ErrorCode::kIo, "can't write '" + path + "': " + std::strerror(errno));
}

int bench(const BenchOptions& options) {
  const std::vector<int> prefill = parse_list(options.prefill, "--prefill", 1);
  const std::vector<int> depths = parse_list(options.depth, "--depth", 0);
  const std::vector<int> agents = parse_list(options.agents, "--agents", 1);
  check_files(options);
  const std::vector<BenchRow> saved =
      options.compare.empty() ? std::vector<BenchRow>() : parse_bench(read_prompt_file(options.compare), options.compare);

  const auto model = Model::load(options.model, options.compute());  // this thread is the one that computes
  const int64_t longest = std::max<int64_t>(*std::max_element(prefill.begin(), prefill.end()),
                                            int64_t(*std::max_element(depths.begin(), depths.end())) + options.decode);
  if (const int limit = model->info().max_context; limit > 0 && longest > limit) {
    throw Error(ErrorCode::kResourceExhausted, std::to_string(longest) + " tokens do not fit the model's context of " +
                                                   std::to_string(limit) + "; ask for fewer");
  }
  InterruptScope interrupt;
  try {
    const KvFormat kv_format = model->refined(options.kv_format().value_or(model->default_kv_format()));
    BenchReport report = Bench(options, *model, kv_format, interrupt).measure(prefill, depths, agents);
    report.compare(saved);
    if (options.json) {
      print_json(report.json());
    } else {
      print(report.table(/*blocks=*/isatty(STDOUT_FILENO) != 0));
    }
    if (!options.save.empty()) write_file(options.save, dump_json(report.json()) + "\n");
    if (!options.plot.empty()) write_file(options.plot, report.svg(model->info().name + ", KV cache " + kv_format.name()));
  } catch (const Interrupted&) {
    return 128 + interrupt.signal();
  }
  return 0;
}

}  // namespace

void add_bench_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<BenchOptions>();
  CLI::App* bench_app = app.add_subcommand("bench", "Measure how fast a model computes, saves and wakes here");
  add_model_options(*bench_app, *options);
  bench_app->add_option("--prefill", options->prefill, "Prompt lengths to measure, in tokens")
      ->capture_default_str()
      ->type_name("N,N");
  bench_app->add_option("--decode", options->decode, "Tokens to decode one by one; 0 leaves decoding out")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 20))
      ->type_name("N");
  bench_app->add_option("--depth", options->depth, "Tokens already held when decoding begins")
      ->capture_default_str()
      ->type_name("N,N");
  bench_app->add_option("--agents", options->agents, "How many agents decode at once; their tokens per second are added up")
      ->capture_default_str()
      ->type_name("N,N");
  bench_app->add_option("--temperature", options->sampling.temperature, "How tokens are drawn; 0 takes the likeliest")
      ->capture_default_str()
      ->check(CLI::Range(0.0f, 100.0f))
      ->type_name("T");
  bench_app->add_option("--runs", options->runs, "Runs whose median is printed, after one that warms up")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000))
      ->type_name("N");
  bench_app->add_option("--plot", options->plot, "Draw the figures in a file, too; as SVG, so its name ends with .svg")
      ->type_name("FILE.svg");
  bench_app->add_option("--save", options->save, "Write what --json prints to a file, for a later --compare")
      ->type_name("FILE.json");
  bench_app->add_option("--compare", options->compare, "Say how many times as fast as a saved run each figure is")
      ->type_name("FILE.json");
  bench_app->add_flag("--json", options->json, "Print one JSON object instead of the table (docs/cli.md)");
  bench_app->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      settle_model(*options, invocation.store, "");
      return bench(*options);
    };
  });
}

}  // namespace torpor::cli
