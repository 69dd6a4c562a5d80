/// fork, rewind, pin, rename: agents that are asleep, without their model. why: with its tokenizer.

#include <CLI/CLI.hpp>

#include "agents/conversation.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "cli/text_input.h"
#include "cli/turn.h"
#include "torpor/agents.h"
#include "torpor/error.h"
#include "torpor/model.h"
#include "torpor/text.h"

namespace torpor::cli {
namespace {

// Tokens shown on either side of the first difference.
constexpr int64_t kNeighbours = 8;

struct WhyOptions {
  std::string id, prompt_file, model;
  std::string tools_file, tools, template_args;
  bool messages = false, json = false;
};

/// Text of ids [first, last), as far as there are any.
std::string text_of(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, int64_t first, int64_t last) {
  first = std::clamp<int64_t>(first, 0, ssize(ids));
  last = std::clamp<int64_t>(last, first, ssize(ids));
  return tokenizer.decode({ids.begin() + first, ids.begin() + last});
}

/// What one side says from the first difference on.
Json side_json(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, int64_t at) {
  if (at >= ssize(ids)) return nullptr;
  return Json{{"token", ids[size_t(at)]},
              {"text", text_of(tokenizer, ids, at, at + 1)},
              {"after", text_of(tokenizer, ids, at + 1, at + 1 + kNeighbours)}};
}

std::string side_text(const Json& side) {
  if (side.is_null()) return "ends here";
  return "token " + std::to_string(side["token"].get<int32_t>()) + " " + side["text"].dump() + ", then " + side["after"].dump();
}

int why(const WhyOptions& options, const std::filesystem::path& root) {
  const std::string prompt = read_prompt_file(options.prompt_file);
  check_text(prompt, "the prompt file");
  const auto store = open_store_of(root, options.id);
  const std::vector<int32_t> held = store->agent_tokens(options.id);
  const std::filesystem::path model = resolve_model(options.model.empty() ? store->agent_info(options.id).model : options.model);
  const auto tokenizer = Tokenizer::load(model);
  std::vector<int32_t> ids;
  if (options.messages) {
    const auto chat_template = ChatTemplate::load(model);
    if (chat_template == nullptr) {
      throw Error(ErrorCode::kInvalidArgument, "the model '" + model.string() + "' has no chat template; leave out --messages");
    }
    const Phrasing phrasing{*tokenizer, *chat_template, template_variables(options.tools, options.template_args)};
    ids = encode_conversation(phrasing, messages_from_json(prompt));
  } else {
    ids = tokenizer->encode(prompt, true);
  }

  if (has_unknown_tokens(held)) {
    throw Error(ErrorCode::kInvalidArgument, "agent '" + options.id + "' was imported without its token ids, so what it has in "
                                             "common with a prompt is not known");
  }
  const Divergence found = find_divergence(ids, held);
  const int64_t common = found.common, sealed = common / kSegmentTokens * kSegmentTokens;
  const bool diverges = common < found.prompt && common < found.held;
  const Json before = text_of(*tokenizer, ids, common - kNeighbours, common);
  const Json in_prompt = side_json(*tokenizer, ids, common), in_agent = side_json(*tokenizer, held, common);
  if (options.json) {
    print_json(Json{{"agent", options.id}, {"prompt_tokens", found.prompt}, {"held_tokens", found.held},
                    {"common_tokens", common}, {"sealed_tokens", sealed},
                    {"diverges_at", diverges ? Json(common) : Json(nullptr)}, {"before", before},
                    {"prompt", in_prompt}, {"held", in_agent}});
    return 0;
  }
  std::string text = "prompt: " + std::to_string(found.prompt) + " tokens; agent " + options.id + ": " +
                     std::to_string(found.held) + "; equal: the first " + std::to_string(common) + " (" +
                     std::to_string(sealed) + " in whole segments)\n";
  if (diverges) {
    text += "they part at token " + std::to_string(common) + ", after " + before.dump() + ":\n";
    text += "  prompt: " + side_text(in_prompt) + "\n  agent:  " + side_text(in_agent) + "\n";
  } else {
    text += common == found.prompt ? "all of the prompt is held\n" : "all that the agent holds begins the prompt\n";
  }
  print(text);
  return 0;
}

}  // namespace

void add_branch_commands(CLI::App& app, Invocation& invocation) {
  struct Options {
    std::string id, other;
    int64_t tokens = 0;
    bool off = false;
  };
  const auto options = std::make_shared<Options>();
  const auto add = [&](const char* name, const char* help, auto describe, auto work) {
    CLI::App* command = app.add_subcommand(name, help);
    command->add_option("ID", options->id, "The agent")->required()->type_name("");
    describe(*command);
    command->callback([&invocation, options, command, work] {
      invocation.run = [&invocation, options, command, work] {
        const auto store = open_store_of(invocation.store, options->id);
        work(*store, *options, *command);
        return 0;
      };
    });
  };

  add("fork", "Make a new agent of an agent's first tokens; no rows are copied but the last few",
      [&](CLI::App& command) {
        command.add_option("NEW", options->other, "The new agent")->required()->type_name("");
        command.add_option("--at", options->tokens, "Tokens it begins with (default: all)")->check(CLI::NonNegativeNumber)->type_name("N");
      },
      [](Store& store, const Options& o, const CLI::App& command) {
        fork_agent(store, o.id, o.other, command.count("--at") > 0 ? std::optional(o.tokens) : std::nullopt);
      });
  add("rewind", "Make an agent forget everything after its first tokens",
      [&](CLI::App& command) {
        command.add_option("N", options->tokens, "Tokens it keeps")->required()->check(CLI::NonNegativeNumber)->type_name("");
      },
      [](Store& store, const Options& o, const CLI::App&) { rewind_agent(store, o.id, o.tokens); });
  add("pin", "Keep an agent in memory, once it is awake, when others must make room",
      [&](CLI::App& command) { command.add_flag("--off", options->off, "No longer"); },
      [](Store& store, const Options& o, const CLI::App&) { pin_agent(store, o.id, !o.off); });
  add("upgrade", "Write an agent of an older format anew in today's, so that others can share what it begins with", [](CLI::App&) {},
      [](Store& store, const Options& o, const CLI::App&) { store.upgrade_agent(o.id); });
  add("rename", "Give an agent another name",
      [&](CLI::App& command) { command.add_option("NEW", options->other, "The new name")->required()->type_name(""); },
      [](Store& store, const Options& o, const CLI::App&) { store.rename_agent_cache(o.id, o.other); });

  const auto why_options = std::make_shared<WhyOptions>();
  CLI::App* why_app = app.add_subcommand("why", "Tell how much of a prompt an agent holds already, and where they part");
  why_app->add_option("ID", why_options->id, "The agent")->required()->type_name("");
  why_app->add_option("--prompt-file", why_options->prompt_file, "The whole prompt as a model reads it; - is standard input")
      ->required()
      ->type_name("F");
  why_app->add_flag("--messages", why_options->messages, "The file is a JSON array of {role, content}; the model's template renders it");
  add_template_options(*why_app, why_options->tools_file, why_options->tools, why_options->template_args);
  why_app->add_option("--model", why_options->model, "Whose tokenizer (default: the agent's model)")->type_name("M");
  why_app->add_flag("--json", why_options->json, "Print a JSON object");
  why_app->callback([&invocation, why_options] {
    invocation.run = [&invocation, why_options] { return why(*why_options, invocation.store); };
  });
}

}  // namespace torpor::cli
