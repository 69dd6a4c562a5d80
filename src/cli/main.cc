/// The command line: parses, dispatches, and turns every Error into one sentence and an exit code.

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <exception>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <mlx/version.h>

#include "base/environment.h"
#include "base/foreign_error.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "cli/server_notes.h"
#include "faces/error_table.h"
#include "kernels/cpu_target.h"
#include "torpor/error.h"
#include "torpor/log.h"
#include "torpor/model.h"
#include "torpor/store.h"
#include "torpor/version.h"

namespace {

constexpr const char* kExamples = R"(Examples:
  torpor run --model .models/smollm2-135m --agent ada --prompt "Who keeps the lamp?"
  torpor chat --agent ada
  torpor ls)";

constexpr const char* kExitCodes = R"(Exit codes: 0 done, 2 usage, 3 not found, 4 damaged, 5 another model's cache, 6 bad argument, 7 input/output,
8 agent awake elsewhere, 9 over a limit, 11 a defect of Torpor, 130 interrupted.)";

/// What the help of each command ends with, the command's own name left out.
const std::map<std::string, std::vector<const char*>> kExamplesOf{
    {"run", {"--model .models/smollm2-135m --agent ada --prompt \"Who keeps the lamp?\"", "--agent ada --prompt-file letter.txt --json"}},
    {"chat", {"--model .models/smollm2-135m --agent ada", "--agent ada --write-behind"}},
    {"ls", {"", "-q", "--json"}},
    {"show", {"ada"}},
    {"rm", {"ada eve"}},
    {"prune", {"--older-than 30d --dry-run"}},
    {"du", {""}},
    {"fork", {"ada eve", "ada eve --turn 2"}},
    {"rewind", {"ada --turns 1", "ada 1200"}},
    {"pin", {"ada", "ada --off"}},
    {"rename", {"ada eve"}},
    {"upgrade", {"ada"}},
    {"why", {"ada eve", "ada --prompt-file messages.json --messages"}},
    {"verify", {"", "ada", "--model .models/smollm2-135m"}},
    {"repair", {"ada"}},
    {"gc", {"--dry-run"}},
    {"limits", {"--disk-budget 20GB --min-free 5GB"}},
    {"export", {"ada ada.safetensors", "ada cache.safetensors --format mlx-lm"}},
    {"import", {"ada.safetensors eve", "cache.safetensors eve --model .models/smollm2-135m"}},
    {"serve", {"--model .models/smollm2-135m --port 8080"}},
    {"ps", {"", "--json"}},
    {"launch", {"claude", "codex --model qwen2.5-coder-0.5b", "opencode --print"}},
    {"remote", {"check s3://my-bucket/torpor", "ls s3://my-bucket/torpor"}},
    {"bench", {"--model .models/smollm2-135m --prefill 512 --decode 64"}},
    {"models", {"", "--json"}},
    {"setup", {""}},
    {"pull", {"HuggingFaceTB/SmolLM2-135M-Instruct", "ORG/NAME:model-Q4_K_M.gguf"}},
    {"doctor", {"", "--json"}},
    {"perplexity", {"--model .models/smollm2-135m --file examples/lighthouse-log.txt"}},
    {"rebuild", {"ada", "ada --model .models/qwen2.5-coder-0.5b"}},
    {"completions", {"bash > ~/.local/share/bash-completion/completions/torpor"}},
};

std::string footer_of(const std::string& command) {
  std::string text = "Examples:\n";
  for (const std::string example : kExamplesOf.at(command)) {
    text += "  torpor " + command + (example.empty() ? "" : " ") + example + "\n";
  }
  return text + "\n" + kExitCodes;
}

/// The command that a parse error is about: "torpor run".
std::string command_name(const CLI::App& app) {
  for (const CLI::App* sub : app.get_subcommands()) return app.get_name() + " " + sub->get_name();
  return app.get_name();
}

std::string one_line(std::string text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == '.')) text.pop_back();
  for (char& c : text) {
    if (c == '\n') c = ' ';
  }
  return text;
}

/// What `--version` prints: everything that decides what this program computes, reads and writes.
std::string version_text() {
  const auto range = [](int first, int last) {
    return std::to_string(first) + (first < last ? " to " + std::to_string(last) : std::string());
  };
  return std::string("torpor " TORPOR_VERSION "\nMLX ") + mlx::core::version() + "\nbackend " +
         torpor::backend_name(torpor::default_backend()) + "\nCPU target " + torpor::kernels::cpu_target_name() +
         "\nformat versions: reads " + range(torpor::kOldestFormatRead, torpor::kNewestFormat) + ", writes " +
         range(torpor::kNewestFormat, torpor::kNewestFormat);
}

int dispatch(int argc, char** argv) {
  using namespace torpor::cli;
  CLI::App app{"LLM agents that sleep to disk and wake in milliseconds", "torpor"};
  app.footer(std::string(kExamples) + "\n\n" + kExitCodes);
  app.set_version_flag("--version", version_text, "Print the versions, backend and CPU target, and exit");
  app.require_subcommand(0, 1);  // none is told apart from an unknown one below
  app.fallthrough();

  Invocation invocation;
  std::string store;
  app.add_option("--store", store, "Directory of the agents (default: $TORPOR_STORE, else ~/.agent_caches)")
      ->type_name("DIR");
  bool verbose = false;
  app.add_flag("--verbose", verbose, "Say on standard error what Torpor goes on without");
  add_run_command(app, invocation);
  add_chat_command(app, invocation);
  add_agent_commands(app, invocation);
  add_branch_commands(app, invocation);
  add_store_commands(app, invocation);
#ifdef TORPOR_SERVER
  add_serve_command(app, invocation);
  add_ps_command(app, invocation);
  add_launch_command(app, invocation);
#endif
#ifdef TORPOR_REMOTE
  add_remote_command(app, invocation);
  add_pull_command(app, invocation);
#endif
  add_bench_command(app, invocation);
  add_models_command(app, invocation);
  add_doctor_command(app, invocation);
  add_perplexity_command(app, invocation);
  add_rebuild_command(app, invocation);
  add_completions_command(app, invocation);
  for (CLI::App* command : app.get_subcommands({})) {
    command->footer(footer_of(command->get_name()));
    for (CLI::App* own : command->get_subcommands({})) own->footer(command->get_footer());
  }

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    complain(one_line(error.what()) + " (see '" + command_name(app) + " --help')");
    return kExitUsage;
  }
  if (!invocation.run) {
    complain("a command is required (see 'torpor --help')");
    return kExitUsage;
  }
  if (app.count("--store") > 0 && store.empty()) {
    complain("--store needs a directory (see 'torpor --help')");
    return kExitUsage;
  }
  if (verbose) {
    torpor::set_log_handler([](torpor::LogLevel level, std::string_view sentence) {
      complain(std::string(torpor::log_level_name(level)) + ": " + std::string(sentence));
    });
  }
  invocation.store = store.empty() ? torpor::default_store_root() : std::filesystem::path(torpor::expand_home(store));
  try {
    return invocation.run();
  } catch (const UsageError& error) {
    complain(one_line(error.what()) + " (see '" + command_name(app) + " --help')");
    return kExitUsage;
#ifdef TORPOR_SERVER
  } catch (const torpor::Error& error) {
    throw with_server(error, invocation.store);
#endif
  }
}

/// A program that is started with a standard stream closed would get its number for the next file that it opens, and print into
/// that. Reading then finds the end of input, and writing an answer fails.
void open_closed_streams() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::fcntl(fd, F_GETFD) == -1 && errno == EBADF) (void)::open("/dev/null", fd == STDERR_FILENO ? O_WRONLY : O_RDONLY);
  }
}

}  // namespace

int main(int argc, char** argv) {
  open_closed_streams();
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may grow no further is an error
  try {
    return dispatch(argc, argv);
  } catch (...) {
    const torpor::Error error = torpor::to_error(std::current_exception(), "the command");
    torpor::cli::complain(error);
    return torpor::faces::error_mapping(error.code()).exit_code;
  }
}
