/// run.

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/text_input.h"
#include "cli/turn.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

struct RunOptions : TurnOptions {
  std::string prompt, prompt_file, messages_file;
  bool has_prompt_file = false, branch = false;
};

int run(RunOptions options, const std::filesystem::path& root) {
  if (!options.agent.empty()) check_agent_id(options.agent);
  TurnRequest request = turn_request(options);
  if (!options.messages_file.empty()) {
    request.messages = messages_from_json(read_prompt_file(options.messages_file));
    if (request.messages.empty()) throw Error(ErrorCode::kInvalidArgument, "there are no messages; give one at least");
    if (options.branch) request.on_divergence = OnDivergence::kBranch;
  } else {
    const bool piped = !options.has_prompt_file && options.prompt == "-";
    request.prompt = options.has_prompt_file || piped ? read_prompt_file(piped ? "-" : options.prompt_file) : options.prompt;
    check_text(request.prompt, options.has_prompt_file ? "the prompt file" : "the prompt");
    if (request.prompt.empty()) throw Error(ErrorCode::kInvalidArgument, "the prompt is empty; give it some text");
  }
  check_early(options, root);

  Engine engine(options.engine(root));
  InterruptScope interrupt;
  const TurnResult result = take_turn(engine, options, std::move(request), interrupt);
  if (options.save != SaveMode::kNo) engine.sleep(result.agent);  // else it is dropped with the engine
  return interrupt.signal() == 0 ? 0 : 128 + interrupt.signal();
}

}  // namespace

void add_run_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<RunOptions>();
  CLI::App* run_app = app.add_subcommand("run", "Add one user turn to an agent, answer it, and save");
  run_app->add_option("--agent", options->agent, "The agent's name, made if new; without it the prompt leaves no agent behind")
      ->type_name("ID");
  add_turn_options(*run_app, *options);
  CLI::Option_group* source = run_app->add_option_group("Prompt");
  source->add_option("--prompt", options->prompt, "The user's message; - is standard input")->type_name("P");
  source->add_option("--prompt-file", options->prompt_file, "The same, from a file; - is standard input")
      ->type_name("F");
  CLI::Option* messages =
      source->add_option("--messages", options->messages_file, "The whole conversation, a JSON array of messages, from a file")
          ->type_name("F");
  source->require_option(1);
  run_app->add_flag("--branch", options->branch, "Where the messages part from what the agent holds, go on as a branch of it")
      ->needs(messages);
  run_app->add_flag_callback("--no-save", [options] { options->save = SaveMode::kNo; }, "Leave the agent on disk as it is");
  run_app->callback([&invocation, options, run_app] {
    if (run_app->count("--agent") > 0) check_agent_id(options->agent);  // one given empty is no agent left out
    options->has_system = run_app->count("--system") > 0;
    options->has_prompt_file = run_app->get_option("--prompt-file")->count() > 0;
    invocation.run = [&invocation, options] { return run(*options, invocation.store); };
  });
}

}  // namespace torpor::cli
