#pragma once
/// The command line's commands, one file per group. Each `add_*` describes its commands to CLI11; the one that the user
/// named fills in `Invocation::run`, which main calls once parsing is over.

#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>

namespace CLI {
class App;
}

namespace torpor::cli {

/// What the user asked for.
struct Invocation {
  std::filesystem::path store;  ///< --store, else default_store_root()
  std::function<int()> run;     ///< gives the exit code; may throw torpor::Error
};

/// A command line that only its files show to be incomplete: exit code kExitUsage.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// run and chat: the two that load a model.
void add_run_command(CLI::App& app, Invocation& invocation);
void add_chat_command(CLI::App& app, Invocation& invocation);
/// fork, rewind, pin, rename, upgrade and why.
void add_branch_commands(CLI::App& app, Invocation& invocation);
/// ls, show, rm, prune and du.
void add_agent_commands(CLI::App& app, Invocation& invocation);
/// verify, repair, gc, limits, export and import.
void add_store_commands(CLI::App& app, Invocation& invocation);
/// bench.
void add_bench_command(CLI::App& app, Invocation& invocation);
/// serve. Only where the server is built (TORPOR_SERVER).
void add_serve_command(CLI::App& app, Invocation& invocation);
/// ps: what a running server does. Likewise.
void add_ps_command(CLI::App& app, Invocation& invocation);
/// launch: a coding agent on a running server. Likewise.
void add_launch_command(CLI::App& app, Invocation& invocation);
/// remote: stores of objects. Only where their client is built (TORPOR_REMOTE).
void add_remote_command(CLI::App& app, Invocation& invocation);
/// doctor: the machine, the disk and the store.
void add_doctor_command(CLI::App& app, Invocation& invocation);
/// pull: fetches a model. Only where the hub's client is built (TORPOR_REMOTE).
void add_pull_command(CLI::App& app, Invocation& invocation);
/// models and setup: what lies in the local caches, and what of it fits.
void add_models_command(CLI::App& app, Invocation& invocation);
/// perplexity.
void add_perplexity_command(CLI::App& app, Invocation& invocation);
/// rebuild.
void add_rebuild_command(CLI::App& app, Invocation& invocation);
/// completions.
void add_completions_command(CLI::App& app, Invocation& invocation);

/// Exit code for a command line that can't be understood.
inline constexpr int kExitUsage = 2;

}  // namespace torpor::cli
