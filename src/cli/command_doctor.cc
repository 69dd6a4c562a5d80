/// doctor: what this machine and the store's file system are like for Torpor, each with what to do about it.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <mlx/version.h>

#include "base/environment.h"
#include "base/large_pages.h"
#include "cli/commands.h"
#include "cli/disk_probe.h"
#include "cli/memory_probe.h"
#include "cli/output.h"
#include "faces/error_table.h"
#include "kernels/cpu_target.h"
#include "kernels/thread_pool.h"
#include "kernels/usable_cores.h"
#include "torpor/model_info.h"

namespace torpor::cli {
namespace {

namespace fs = std::filesystem;

struct Check {
  std::string name, found;  ///< found: a part of a sentence
  std::string advice;       ///< what to do, a part of a sentence; empty: nothing
  std::optional<ErrorCode> fails;  ///< set where Torpor can't do its work so
  Json values = Json::object();
  const char* state() const { return fails ? "fails" : advice.empty() ? "ok" : "note"; }
};

/// Torpor can't do its work: a sentence of an error's, and what to do.
Check& fail(Check& check, ErrorCode code, std::string sentence, std::string advice) {
  while (sentence.ends_with('.')) sentence.pop_back();
  check.fails = code;
  check.found = std::move(sentence);
  check.advice = std::move(advice);
  return check;
}

/// What `look` finds, or its error.
Check checked(const char* name, const std::function<Check()>& look) {
  try {
    return look();
  } catch (const Error& error) {
    Check check{.name = name};
    return fail(check, error.code(), error.what(), "");
  }
}

std::string rounded(double value, const char* format = "%.1f") {
  char text[32];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::string rate(double bytes_per_s) { return human_bytes(int64_t(bytes_per_s)) + "/s"; }

Check cpu() {
  const std::string target = kernels::cpu_target_name(), asked = environment("TORPOR_CPU_TARGET");
  Check check{.name = "cpu", .found = target + (asked.empty() ? "" : ", by TORPOR_CPU_TARGET")};
  const bool slow = target == "EMU128" || target.starts_with("S");  // SCALAR, SSE2 to SSE4
  if (!asked.empty()) {
    check.advice = "unset TORPOR_CPU_TARGET to use the best that the CPU has";
  } else if (slow) {
    check.advice = "expect a few tokens a second of small models only: this CPU has neither AVX2 nor NEON";
  }
  check.values = {{"target", target}};
  return check;
}

Check threads() {
  const int cpus = int(std::thread::hardware_concurrency());
  const double quota = kernels::cpu_quota();
  const int used = kernels::ThreadPool::shared().size();
  const std::string asked = environment("TORPOR_THREADS");
  Check check{.name = "threads",
              .found = std::to_string(used) + " of " + std::to_string(cpus) + " CPUs" +
                       (std::isinf(quota) ? "" : ", the control group's quota is " + rounded(quota) + " CPUs")};
  if (used > std::min(double(cpus), std::ceil(quota))) {
    check.advice = "unset TORPOR_THREADS: each kernel waits for its slowest thread, and not all of these run at once";
  } else if (used > quota) {
    if (quota >= 1) check.advice = "set TORPOR_THREADS to " + std::to_string(int(quota)) + ", or ";
    check.advice += "make the quota a whole number: threads beyond it are stopped now and then";
  } else if (!std::isinf(quota) && std::ceil(quota) < cpus) {
    check.advice = "give the control group (container, systemd unit) a larger CPU quota to use the others";
  } else if (!asked.empty() && used < cpus) {
    check.advice = "unset TORPOR_THREADS to use one thread for each core";
  }
  check.values = {{"threads", used}, {"cpus", cpus}, {"quota", std::isinf(quota) ? Json() : Json(quota)}};
  return check;
}

Check memory() {
  const uint64_t available = available_memory(), all = physical_memory();
  const double bandwidth = probe_memory();
  Check check{.name = "memory",
              .found = human_bytes(int64_t(available)) + " available of " + human_bytes(int64_t(all)) + "; " +
                       rate(bandwidth) + " now, so 1 GB of weights gives at most " +
                       rounded(bandwidth / 1e9, "%.0f") + " tokens a second"};
  if (available < uint64_t(1) << 30) {
    check.advice = "close other programs, or take a model that `torpor setup` says fits";
  }
  check.values = {{"available", available}, {"physical", all}, {"bytes_per_s", int64_t(bandwidth)}};
  return check;
}

Check mlx_library() {
  const std::string found = mlx::core::version();
  const std::string built = std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." +
                            std::to_string(MLX_VERSION_PATCH);
  const std::string backend = backend_name(default_backend());
  Check check{.name = "mlx", .found = found + ", backend " + backend};
  if (!found.starts_with(built)) {
    check.fails = ErrorCode::kIncompatible;
    check.advice = "install mlx " + built + ", which this program was built with";
  }
  check.values = {{"version", found}, {"built_with", built}, {"backend", backend}};
  return check;
}

/// The directory, or where it would be made: the nearest one above that is there.
fs::path existing(fs::path path) {
  std::error_code error;
  path = fs::absolute(path, error);
  while (!fs::exists(path, error) && path.has_relative_path()) path = path.parent_path();
  return path;
}

void also(Check& check, const std::string& advice) { check.advice += (check.advice.empty() ? "" : "; ") + advice; }

Check disk(const fs::path& directory) {
  Env& env = Env::posix();
  Check check{.name = "disk"};
  const DiskProbe probe = probe_disk(env, directory);
  check.values = {{"directory", directory.string()}, {"writable", probe.writable}};
  if (!probe.problem.empty()) {
    return fail(check, ErrorCode::kIo, probe.problem,
                "choose a directory that you may write to with --store or TORPOR_STORE");
  }
  const auto room = int64_t(env.free_space(directory));
  check.values.update({{"free", room},
                       {"locks", probe.locks},
                       {"tells_case", probe.tells_case},
                       {"remote", probe.remote}});
  check.found = human_bytes(room) + " free";
  if (probe.measured) {
    check.found += ", writes " + rate(probe.write_bytes_per_s) + ", reads " + rate(probe.read_bytes_per_s) +
                   ", a flush takes " + human_ms(probe.flush_ms);
    check.values.update({{"write_bytes_per_s", int64_t(probe.write_bytes_per_s)},
                         {"read_bytes_per_s", int64_t(probe.read_bytes_per_s)},
                         {"flush_ms", probe.flush_ms}});
  }
  if (!probe.locks) {
    check.fails = ErrorCode::kIo;
    also(check, "put the store on a file system with flock: here two processes can't be kept from one agent");
  }
  if (room < int64_t(1) << 30) also(check, "free some space, or let old agents go with `torpor prune` and `torpor gc`");
  if (probe.remote) also(check, "expect slow wakes: files of a network or of FUSE are read, never mapped");
  if (!probe.tells_case) also(check, "give agents names that differ by more than upper and lower case");
  if (probe.measured && probe.flush_ms > 50) {
    also(check, "`--durability rename` saves without flushes, safe against kill -9 but not against a power cut");
  }
  return check;
}

Check store_state(const fs::path& root) {
  Check check{.name = "store", .found = root.string()};
  check.values = {{"root", root.string()}};
  try {
    const auto store = open_existing_store(root);
    if (!store) {
      check.found += " is not there yet; the first save makes it";
      check.values["exists"] = false;
      return check;
    }
    const std::vector<AgentInfo> agents = store->list_cached_agents();
    const std::vector<int64_t> missing = store->count_missing_files(agents);
    const DiskUsage usage = store->get_cache_disk_usage();
    const auto damaged = std::ranges::count_if(agents, [](const AgentInfo& agent) { return agent.hash.empty(); });
    const auto incomplete = std::ranges::count_if(missing, [](int64_t files) { return files > 0; });
    const int64_t freed = usage.orphan_bytes + usage.temporary_bytes;
    check.found += ": " + std::to_string(agents.size()) + " agents, " + human_bytes(usage.total_bytes);
    check.values.update({{"exists", true},
                         {"agents", agents.size()},
                         {"damaged", damaged},
                         {"incomplete", incomplete},
                         {"bytes", usage.total_bytes},
                         {"gc_frees", freed}});
    if (damaged > 0) {
      check.fails = ErrorCode::kCorruption;
      check.found += ", " + std::to_string(damaged) + " damaged";
      also(check, "see `torpor verify`, then `torpor repair` or `torpor rebuild` each, or `torpor rm` it");
    }
    if (incomplete > 0) {
      check.found += ", " + std::to_string(incomplete) + " with files missing";
      also(check, "copy the missing files back, or let the agents' next turns compute what they held again");
    }
    if (freed > std::max<int64_t>(int64_t(64) << 20, usage.total_bytes / 10)) {
      also(check, "`torpor gc` frees " + human_bytes(freed));
    }
  } catch (const Error& error) {
    fail(check, error.code(), error.what(), "choose another store with --store or TORPOR_STORE");
  }
  return check;
}

int doctor(const fs::path& root, bool json) {
  const std::vector<Check> checks{checked("cpu", cpu), checked("threads", threads), checked("memory", memory),
                                  checked("mlx", mlx_library), checked("disk", [&] { return disk(existing(root)); }),
                                  store_state(root)};
  const auto failed = std::ranges::find_if(checks, [](const Check& check) { return check.fails.has_value(); });
  if (json) {
    Json list = Json::array();
    for (const Check& check : checks) {
      Json one{{"name", check.name}, {"state", check.state()}, {"found", check.found}, {"advice", check.advice}};
      one.update(check.values);
      list.push_back(std::move(one));
    }
    print_json(Json{{"ok", failed == checks.end()}, {"checks", std::move(list)}});
  } else {
    std::string text;
    for (const Check& check : checks) {
      char line[32];
      std::snprintf(line, sizeof line, "%-5s  %-7s  ", check.state(), check.name.c_str());
      text += line + printable_name(check.found) + "\n";
      if (!check.advice.empty()) text += std::string(16, ' ') + "-> " + printable_name(check.advice) + "\n";
    }
    print(text);
  }
  return failed == checks.end() ? 0 : faces::error_mapping(*failed->fails).exit_code;
}

}  // namespace

void add_doctor_command(CLI::App& app, Invocation& invocation) {
  const auto json = std::make_shared<bool>(false);
  CLI::App* command =
      app.add_subcommand("doctor", "Look at the machine, MLX, the disk and the store, and say what to do");
  command->add_flag("--json", *json, "Print a JSON object");
  command->callback([&invocation, json] {
    invocation.run = [&invocation, json] { return doctor(invocation.store, *json); };
  });
}

}  // namespace torpor::cli
