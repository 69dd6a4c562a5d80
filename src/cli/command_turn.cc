/// run and chat.

#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <sstream>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/model_options.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "torpor/engine.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

struct TurnOptions : ModelOptions {
  std::string agent, system, prompt, prompt_file;
  bool has_system = false, has_prompt_file = false;
  bool raw = false, json = false, no_save = false;
  int max_tokens = 256;
  double temperature = 0, top_p = 1;
  uint64_t seed = 0;
  std::vector<std::string> stop;
};

std::string read_prompt(const TurnOptions& options) {
  if (!options.has_prompt_file) return options.prompt;
  std::ostringstream text;
  if (options.prompt_file == "-") {
    text << std::cin.rdbuf();
    return text.str();
  }
  std::error_code error;
  if (std::filesystem::is_directory(options.prompt_file, error)) {
    throw Error(ErrorCode::kIo, "can't read prompt file '" + options.prompt_file + "': it is a directory");
  }
  std::ifstream file(options.prompt_file, std::ios::binary);
  if (!file) {
    const int why = errno;
    throw Error(why == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo,
                "can't read prompt file '" + options.prompt_file + "': " + std::strerror(why));
  }
  text << file.rdbuf();
  if (file.bad()) throw Error(ErrorCode::kIo, "can't read prompt file '" + options.prompt_file + "'");
  return text.str();
}

void check_text(std::string_view text, const char* what) {
  const size_t offset = find_invalid_utf8(text);
  if (offset != std::string_view::npos) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string(what) + " is not valid UTF-8 (byte " + std::to_string(offset) + ")");
  }
}

/// Finds out before a model is loaded that nothing could be saved.
void check_writable(const std::filesystem::path& root) {
  std::error_code error;
  std::filesystem::path there = std::filesystem::absolute(root, error);
  while (!std::filesystem::exists(there, error) && there.has_parent_path() && there != there.parent_path()) {
    if (error && error != std::errc::no_such_file_or_directory) break;
    there = there.parent_path();
  }
  const bool directory = std::filesystem::is_directory(there, error);
  if (!directory || access(there.c_str(), W_OK | X_OK) != 0) {
    throw Error(ErrorCode::kIo, "can't write to the store '" + root.string() + "': " +
                                    (error ? error.message()
                                     : !directory ? "'" + there.string() + "' is not a directory"
                                                  : std::string(std::strerror(errno))));
  }
}

/// Everything that can be known to be wrong before the model's weights are read. Changes nothing on disk.
void check_early(const TurnOptions& options, const std::filesystem::path& root) {
  check_agent_id(options.agent);
  check_text(options.agent, "the agent's id");
  check_text(options.system, "the system message");
  for (const std::string& stop : options.stop) {
    if (stop.empty()) throw Error(ErrorCode::kInvalidArgument, "a stop string can't be empty");
    check_text(stop, "a stop string");
  }
  resolve_model(options.model);
  if (!options.no_save) check_writable(root);
  // An agent that is awake elsewhere: say so at once. (The engine takes the lock for good.)
  if (const auto store = open_existing_store(root); store && store->contains(options.agent)) {
    store->lock_agent(options.agent);
  }
}

/// Microseconds are enough.
double rounded(double ms) { return std::round(ms * 1000) / 1000; }

Json result_json(const TurnResult& result) {
  Json object{
      {"agent", result.agent},
      {"model", result.model},
      {"text", result.text},
      {"finish_reason", finish_reason_name(result.finish_reason)},
      {"tokens", Json{{"prompt", result.tokens.prompt},
                      {"cached", result.tokens.cached},
                      {"prefilled", result.tokens.prefilled},
                      {"generated", result.tokens.generated},
                      {"context", result.tokens.context}}},
      {"timing_ms", Json{{"load", rounded(result.timing_ms.load)},
                         {"wake", rounded(result.timing_ms.wake)},
                         {"ttft", rounded(result.timing_ms.ttft)},
                         {"decode", rounded(result.timing_ms.decode)},
                         {"save", rounded(result.timing_ms.save)}}},
      {"bytes", Json{{"read", result.bytes.read}, {"written", result.bytes.written}}}};
  if (result.damage) object["damage"] = *result.damage;
  return object;
}

void print_summary(const TurnResult& result, bool saved) {
  const double seconds = result.timing_ms.decode / 1000;
  std::fprintf(stderr, "[%s: %d tokens, %d reused, %d read; first token after %s; %d generated", result.agent.c_str(),
               result.tokens.context, result.tokens.cached, result.tokens.prefilled,
               human_ms(result.timing_ms.ttft).c_str(), result.tokens.generated);
  if (seconds > 0 && result.tokens.generated > 1) {
    std::fprintf(stderr, " at %.1f/s", (result.tokens.generated - 1) / seconds);
  }
  if (saved) {
    std::fprintf(stderr, "; %s saved in %s", human_bytes(result.bytes.written).c_str(),
                 human_ms(result.timing_ms.save).c_str());
  }
  std::fputs("]\n", stderr);
}

EngineOptions engine_options(const TurnOptions& options, const std::filesystem::path& root) {
  EngineOptions engine;
  engine.model = options.model;
  engine.store = root;
  engine.kv_format = options.kv_format();
  engine.durability = options.durability();
  return engine;
}

/// One turn with its streaming, progress bar and report.
TurnResult take_turn(Engine& engine, const TurnOptions& options, const std::string& prompt, bool first,
                     InterruptScope& interrupt) {
  ProgressBar progress;
  bool closed = false;
  TurnRequest request;
  request.agent = options.agent;
  request.prompt = prompt;
  if (options.has_system && first) request.system = options.system;
  request.raw = options.raw;
  request.save = !options.no_save;
  request.generate.max_tokens = options.max_tokens;
  request.generate.sampling = {float(options.temperature), float(options.top_p), options.seed};
  request.generate.stop = options.stop;
  request.generate.cancel = &interrupt.flag();
  request.generate.on_prefill = [&](int done, int total) { progress.update(done, total); };
  request.generate.on_text = [&](std::string_view text) {
    progress.clear();
    if (options.json || closed) return;
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
      closed = true;  // nobody reads: end the turn, and keep what was computed
      interrupt.flag().store(true);
    }
  };

  TurnResult result = engine.turn(request);
  progress.clear();
  if (closed) throw Error(ErrorCode::kIo, "standard output is closed; the turn was ended early");
  if (result.damage) complain("warning: " + *result.damage);
  if (options.json) {
    print_json(result_json(result));
  } else {
    if (result.text.empty() || result.text.back() != '\n') print("\n");
    if (isatty(STDERR_FILENO)) print_summary(result, request.save && !result.save_error);
  }
  if (result.save_error) throw *result.save_error;
  return result;
}

int run(const TurnOptions& options, const std::filesystem::path& root) {
  check_agent_id(options.agent);
  const std::string prompt = read_prompt(options);
  check_text(prompt, options.has_prompt_file ? "the prompt file" : "the prompt");
  if (prompt.empty()) throw Error(ErrorCode::kInvalidArgument, "the prompt is empty; give it some text");
  check_early(options, root);

  Engine engine(engine_options(options, root));
  InterruptScope interrupt;
  take_turn(engine, options, prompt, true, interrupt);
  if (!options.no_save) engine.sleep(options.agent);  // else it is dropped with the engine
  return interrupt.signal() == 0 ? 0 : 128 + interrupt.signal();
}

/// One line of standard input without its end; nullopt at the end of input or when a signal came.
std::optional<std::string> read_line() {
  char* buffer = nullptr;
  size_t capacity = 0;
  const ssize_t length = getline(&buffer, &capacity, stdin);
  std::optional<std::string> line;
  if (length >= 0) {
    line.emplace(buffer, size_t(length));
    while (!line->empty() && (line->back() == '\n' || line->back() == '\r')) line->pop_back();
  }
  std::free(buffer);
  return line;
}

int chat(const TurnOptions& options, const std::filesystem::path& root) {
  check_early(options, root);
  const bool interactive = isatty(STDIN_FILENO) != 0;

  Engine engine(engine_options(options, root));
  InterruptScope interrupt;
  if (interactive) {
    std::fprintf(stderr, "%s on %s; /exit or Ctrl-D ends, Ctrl-C stops an answer.\n", options.agent.c_str(),
                 options.model.c_str());
  }
  bool first = true;
  while (true) {
    if (interactive) std::fputs("> ", stderr);
    const std::optional<std::string> line = read_line();
    if (!line || *line == "/exit") break;
    if (line->empty()) continue;
    try {
      check_text(*line, "the message");
      take_turn(engine, options, *line, first, interrupt);
      first = false;
    } catch (const Error& error) {
      // Another line may do better, and a disk that was full may have room by then.
      const bool harmless = error.code() == ErrorCode::kInvalidArgument ||
                            error.code() == ErrorCode::kResourceExhausted || error.code() == ErrorCode::kIo;
      if (!interactive || !harmless) throw;
      complain(error.what());
    }
    if (interrupt.signal() != 0) {
      if (!interactive || interrupt.signal() != SIGINT) break;
      interrupt.rearm();
    }
  }
  if (interactive) std::fputs("\n", stderr);
  engine.sleep(options.agent);
  return interrupt.signal() == 0 ? 0 : 128 + interrupt.signal();
}

void add_common(CLI::App& app, TurnOptions& options) {
  add_model_options(app, options);
  app.add_option("--agent", options.agent, "The agent's name; made if new")->required()->type_name("ID");
  app.add_option("--system", options.system, "System message of a new agent")->type_name("S");
  app.add_option("--max-tokens", options.max_tokens, "Longest answer, in tokens")
      ->capture_default_str()
      ->check(CLI::Range(1, std::numeric_limits<int>::max()))
      ->type_name("N");
  app.add_option("--temperature", options.temperature, "Randomness; 0 always takes the likeliest token")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 100.0))
      ->type_name("T");
  app.add_option("--top-p", options.top_p, "Samples from the smallest set with this much probability")
      ->capture_default_str()
      ->check(CLI::Range(1e-6, 1.0))
      ->type_name("P");
  app.add_option("--seed", options.seed, "Equal seeds give equal answers")->capture_default_str()->type_name("S");
  app.add_option("--stop", options.stop, "Ends the answer when it contains S; may be given more than once")
      ->allow_extra_args(false)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->type_name("S");
  app.add_flag("--raw", options.raw, "Append what the user says as it stands, without the chat template");
  app.add_flag("--json", options.json, "Print one JSON object per turn instead of the text (docs/cli.md)");
}

}  // namespace

void add_turn_commands(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<TurnOptions>();

  CLI::App* run_app = app.add_subcommand("run", "Add one user turn to an agent, answer it, and save");
  add_common(*run_app, *options);
  CLI::Option_group* source = run_app->add_option_group("Prompt");
  source->add_option("--prompt", options->prompt, "The user's message")->type_name("P");
  source->add_option("--prompt-file", options->prompt_file, "The same, from a file; - is standard input")
      ->type_name("F");
  source->require_option(1);
  run_app->add_flag("--no-save", options->no_save, "Leave the agent on disk as it is");
  run_app->callback([&invocation, options, run_app] {
    options->has_system = run_app->count("--system") > 0;
    options->has_prompt_file = run_app->get_option("--prompt-file")->count() > 0;
    invocation.run = [&invocation, options] { return run(*options, invocation.store); };
  });

  CLI::App* chat_app = app.add_subcommand("chat", "Talk with an agent, line by line; every turn is saved");
  add_common(*chat_app, *options);
  chat_app->callback([&invocation, options, chat_app] {
    options->has_system = chat_app->count("--system") > 0;
    invocation.run = [&invocation, options] { return chat(*options, invocation.store); };
  });
}

}  // namespace torpor::cli
