#include "cli/turn.h"

#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include <CLI/CLI.hpp>

#include "agents/conversation.h"
#include "base/env.h"
#include "cli/exchanges.h"
#include "cli/output.h"
#include "cli/text_input.h"
#include "faces/turn_json.h"
#include "torpor/error.h"
#include "torpor/model.h"
#include "torpor/text.h"

namespace torpor::cli {
namespace {

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

void print_summary(const Json& result, bool saved) {
  const Json& tokens = result.at("tokens");
  const Json& ms = result.at("timing_ms");
  const auto count = [&tokens](const char* name) { return tokens.at(name).get<int>(); };
  const std::string agent = result.at("agent"), who = agent.empty() ? "" : agent + ": ";
  const double seconds = ms.at("decode").get<double>() / 1000;
  std::fprintf(stderr, "[%s%d tokens, %d reused, %d read; first token after %s; %d generated", who.c_str(), count("context"),
               count("cached"), count("prefilled"), human_ms(ms.at("ttft")).c_str(), count("generated"));
  if (seconds > 0 && count("generated") > 1) std::fprintf(stderr, " at %.1f/s", (count("generated") - 1) / seconds);
  if (saved) {
    std::fprintf(stderr, "; %s saved in %s", human_bytes(result.at("bytes").at("written")).c_str(),
                 human_ms(ms.at("save")).c_str());
  }
  if (result.contains("seed")) std::fprintf(stderr, "; seed %s", dump_json(result["seed"]).c_str());
  std::fputs("]\n", stderr);
}

/// What people give as a number is one: not "nan".
std::string check_finite(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  return std::isfinite(value) && *end == 0 ? std::string() : "'" + text + "' is not a number";
}

}  // namespace

std::vector<std::pair<int32_t, float>> parse_bias(const std::string& text) {
  std::vector<std::pair<int32_t, float>> bias;
  if (text.empty()) return bias;
  const Json json = parse_json<Json>(text, nullptr, false);
  const auto refuse = [] {
    throw Error(ErrorCode::kInvalidArgument,
                "--logit-bias is not a JSON object of numbers by token id, as {\"42\": -1.5}");
  };
  if (!json.is_object()) refuse();
  for (const auto& [id, value] : json.items()) {
    int32_t token = 0;
    const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), token);
    if (error != std::errc() || end != id.data() + id.size() || !value.is_number()) refuse();
    bias.emplace_back(token, value.get<float>());
  }
  return bias;
}

void check_system(const TurnOptions& options, const std::vector<StoredMessage>& held) {
  const Json messages = messages_of(held);
  const bool has_own = !messages.empty() && text_of(messages[0], "role") == "system";
  if (has_own && text_of(messages[0], "content") == options.system) return;
  throw Error(ErrorCode::kInvalidArgument, "agent '" + options.agent + "' already has " +
                                               (has_own ? "another system prompt" : "begun without a system prompt") +
                                               "; leave out --system, or start a new agent");
}

void check_early(TurnOptions& options, const std::filesystem::path& root) {
  if (!options.agent.empty()) check_agent_id(options.agent);
  template_variables(options.tools, options.template_args);
  parse_bias(options.logit_bias);
  check_text(options.system, "the system message");
  for (const std::string& stop : options.stop) {
    if (stop.empty()) throw Error(ErrorCode::kInvalidArgument, "a stop string can't be empty");
    check_text(stop, "a stop string");
  }
  settle_model(options, root, options.agent);
  check_text(options.model, "the model's name");
  Tokenizer::require(resolve_model(options.model));
  if (options.save != SaveMode::kNo) check_writable(root);
  if (!options.remote.empty()) return;  // what the store has of the agent may be old
  // An agent that is awake elsewhere: say so at once. (The engine takes the lock for good.)
  if (const auto store = open_existing_store(root); store && store->contains(options.agent)) {
    (void)store->lock_agent(options.agent);
    if (options.has_system && store->agent_info(options.agent).cache_size > 0) {
      check_system(options, store->agent_messages(options.agent));
    }
  }
}

TurnRequest turn_request(const TurnOptions& options) {
  // 32 bits: a number that every reader of JSON keeps.
  const uint64_t seed = options.seed ? *options.seed : random_bits() & 0xFFFFFFFFu;
  TurnRequest request;
  request.agent = options.agent;
  if (options.has_system) request.system = options.system;
  request.raw = options.raw;
  request.tools = options.tools;
  request.template_arguments = options.template_args;
  request.special = options.special;
  request.save = options.save;
  request.generate.max_tokens = options.max_tokens;
  request.generate.sampling = options.sampling;
  request.generate.sampling.seed = seed;
  request.generate.sampling.logit_bias = parse_bias(options.logit_bias);
  if (options.logprobs >= 0) request.generate.logprobs = options.logprobs;
  request.generate.stop = options.stop;
  request.generate.speculate = !options.no_speculate;
  return request;
}

TurnPrinter::TurnPrinter(const TurnOptions& options, InterruptScope& interrupt)
    : json_(options.json), terminal_(isatty(STDOUT_FILENO) != 0), interrupt_(interrupt) {
  if (options.markdown && !options.raw && may_style(STDOUT_FILENO)) markdown_.emplace();
}

void TurnPrinter::text(std::string_view text) {
  progress_.clear();
  if (json_ || closed_) return;
  // A terminal would obey what a model writes; a file or a pipe gets the text as it is.
  const std::string shown = terminal_ ? printable(text) : std::string(text);
  write(markdown_ ? markdown_->feed(shown) : shown);
}

void TurnPrinter::write(const std::string& shown) {
  if (closed_) return;
  if (std::fwrite(shown.data(), 1, shown.size(), stdout) != shown.size() || std::fflush(stdout) != 0) {
    closed_ = true;  // nobody reads: end the turn, and keep what was computed
    interrupt_.flag().store(true);
  }
}

void TurnPrinter::end_text() {
  if (markdown_) write(markdown_->finish());
}

void TurnPrinter::result(const Json& result, bool saved) {
  progress_.clear();
  end_text();
  if (result.contains("damage")) complain("warning: " + result["damage"].get<std::string>());
  if (result.contains("notices")) {
    for (const Json& notice : result["notices"]) complain("note: " + notice.get<std::string>());
  }
  check_read();
  if (json_) return print_json(result);
  const std::string text = result.at("text");
  if (text.empty() || text.back() != '\n') print("\n");
  if (isatty(STDERR_FILENO)) print_summary(result, saved);
}

void TurnPrinter::check_read() const {
  if (closed_) throw Error(ErrorCode::kIo, "standard output is closed; the turn was ended early");
}

void TurnPrinter::stopped() {
  progress_.clear();
  end_text();
  if (!json_) std::fputs("\n", stderr);
  complain("the answer was stopped, and the turn taken back");
}

TurnResult take_turn(Engine& engine, const TurnOptions& options, TurnRequest request, InterruptScope& interrupt) {
  TurnPrinter printer(options, interrupt);
  // Told where it decides anything, so that the answer can be had again.
  std::optional<uint64_t> seed;
  if (options.sampling.temperature > 0) seed = request.generate.sampling.seed;
  request.generate.cancel = &interrupt.flag();
  request.generate.on_prefill = [&](int done, int total) { printer.prefill(done, total); };
  request.generate.on_text = [&](std::string_view text) { printer.text(text); };

  const TurnResult result = engine.turn(request);
  try {
    printer.result(faces::turn_json(result, seed), request.save == SaveMode::kWait && !result.save_error);
  } catch (const Error&) {
    if (!result.save_error) throw;  // else that is worse
  }
  if (result.save_error) throw *result.save_error;
  return result;
}

void add_template_options(CLI::App& app, std::string& tools_file, std::string& tools, std::string& template_args) {
  app.add_option("--tools", tools_file, "Tools for the chat template, a JSON array, from a file")
      ->each([&tools](const std::string& file) { tools = read_prompt_file(file); })
      ->type_name("F");
  app.add_option("--template-args", template_args,
                 "More variables for the chat template, a JSON object, as {\"enable_thinking\": false}")
      ->type_name("JSON");
}

void add_turn_options(CLI::App& app, TurnOptions& options) {
  add_model_options(app, options);
  app.add_option("--system", options.system, "System message of a new agent")->type_name("S");
  app.add_option("--max-tokens", options.max_tokens, "Longest answer, in tokens")
      ->capture_default_str()
      ->check(CLI::Range(1, std::numeric_limits<int>::max()))
      ->type_name("N");
  SamplingOptions& sampling = options.sampling;
  app.add_option("--temperature", sampling.temperature, "Randomness; 0 always takes the likeliest token")
      ->capture_default_str()
      ->check(check_finite)
      ->check(CLI::Range(0.0, 100.0))
      ->type_name("T");
  app.add_option("--top-p", sampling.top_p, "Samples from the smallest set with this much probability")
      ->capture_default_str()
      ->check(check_finite)
      ->check(CLI::Range(1e-6, 1.0))
      ->type_name("P");
  app.add_option("--top-k", sampling.top_k, "Samples from so many of the likeliest tokens; 0 = all")
      ->check(CLI::Range(0, std::numeric_limits<int>::max()))
      ->type_name("N");
  app.add_option("--min-p", sampling.min_p, "Samples from tokens with this part of the likeliest one's probability")
      ->check(CLI::Range(0.0, 1.0))
      ->type_name("P");
  app.add_option("--repetition-penalty", sampling.repetition_penalty,
                 "Makes the last --penalty-context tokens less likely; 1 = none")
      ->check(CLI::Range(1e-3, 1e3))
      ->type_name("X");
  app.add_option("--penalty-context", sampling.penalty_context, "How many tokens that counts, the prompt's too; 0 = all")
      ->capture_default_str()
      ->check(CLI::Range(0, std::numeric_limits<int>::max()))
      ->type_name("N");
  app.add_option("--presence-penalty", sampling.presence_penalty, "Taken from the logits of tokens that the answer has")
      ->type_name("X");
  app.add_option("--frequency-penalty", sampling.frequency_penalty, "The same, for each time that it has them")
      ->type_name("X");
  app.add_option("--logit-bias", options.logit_bias, "Added to logits, a JSON object by token id, as {\"42\": -1.5}")
      ->type_name("JSON");
  app.add_option("--logprobs", options.logprobs, "With --json, log-probabilities of each token and of N alternatives")
      ->check(CLI::Range(0, 64))
      ->type_name("N");
  app.add_option("--seed", options.seed, "Equal seeds give equal answers (default: another one for each turn)")
      ->check(CLI::NonNegativeNumber)
      ->type_name("S");
  app.add_option("--stop", options.stop, "Ends the answer when it contains S; may be given more than once")
      ->allow_extra_args(false)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->type_name("S");
  for (const auto& [name, bytes, help] :
       {std::tuple{"--memory-budget", &options.memory_budget, "Most KV cache held in memory; other agents go to sleep for it"},
        std::tuple{"--disk-budget", &options.disk_budget, "Most that the store may take of the disk, all models together; unless given, what torpor limits says"},
        std::tuple{"--min-free", &options.min_free, "What a save leaves free on the disk; likewise"}}) {
    add_size_option(app, name, *bytes, help);
  }
  add_remote_option(app, options);
  app.add_flag("--no-mmap", options.no_mmap, "Read rows of agents into memory instead of mapping their files");
  app.add_flag("--no-speculate", options.no_speculate,
               "Compute one token at a time, where several are guessed and verified at once");
  app.add_flag("--raw", options.raw, "Append what the user says as it stands, without the chat template");
  add_template_options(app, options.tools_file, options.tools, options.template_args);
  app.add_flag("--special", options.special, "Special tokens written in messages and tools count as such; else they are text");
  app.add_flag("--json", options.json, "Print one JSON object per turn instead of the text (docs/cli.md)");
}

}  // namespace torpor::cli
