/// fork, rewind, pin, upgrade, rename: agents that are asleep, without their model. why: with its tokenizer.

#include <CLI/CLI.hpp>

#include "agents/conversation.h"
#include "cli/commands.h"
#include "cli/exchanges.h"
#include "cli/model_options.h"
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
  std::string id, other, prompt_file, model;
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
  return "token " + std::to_string(side["token"].get<int32_t>()) + " " + dump_json(side["text"]) + ", then " +
         dump_json(side["after"]);
}

void require_known(const std::vector<int32_t>& ids, const std::string& agent) {
  if (!has_unknown_tokens(ids)) return;
  throw Error(ErrorCode::kInvalidArgument, "agent '" + agent + "' was imported without its token ids, so what it has in common with "
                                           "a prompt is not known");
}

/// The ids that an agent is compared with.
std::vector<int32_t> other_side(const WhyOptions& options, const Store& store, const Tokenizer& tokenizer,
                                const std::filesystem::path& model) {
  if (!options.other.empty()) {
    std::vector<int32_t> ids = store.agent_tokens(options.other);
    require_known(ids, options.other);
    return ids;
  }
  const std::string prompt = read_prompt_file(options.prompt_file);
  check_text(prompt, "the prompt file");
  if (!options.messages) return tokenizer.encode(prompt, true);
  const auto chat_template = ChatTemplate::load(model);
  if (chat_template == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, "the model '" + model.string() + "' has no chat template; leave out --messages");
  }
  const Phrasing phrasing{tokenizer, *chat_template, template_variables(options.tools, options.template_args)};
  return encode_conversation(phrasing, messages_from_json(prompt));
}

/// What an agent lacks from where it can't go on.
std::string missing_of(const AgentInfo& info) { return info.window > 0 ? "no window file" : "no state"; }

int why(const WhyOptions& options, const std::filesystem::path& root) {
  if (options.other.empty() && options.prompt_file.empty()) throw UsageError("OTHER or --prompt-file is required");
  const auto store = open_store_of(root, options.id);
  const std::vector<int32_t> held = store->agent_tokens(options.id);
  const std::filesystem::path model = resolve_model(options.model.empty() ? model_of(*store, options.id) : options.model);
  const auto tokenizer = Tokenizer::load(model);
  const std::vector<int32_t> ids = other_side(options, *store, *tokenizer, model);
  require_known(held, options.id);
  const Divergence found = find_divergence(ids, held);
  const int64_t common = found.common, sealed = common / kSegmentTokens * kSegmentTokens;
  const AgentInfo info = store->agent_info(options.id);
  const int64_t resumable = resumable_tokens(info, common);
  const bool diverges = common < found.prompt && common < found.held;
  const Json before = text_of(*tokenizer, ids, common - kNeighbours, common);
  const Json in_prompt = side_json(*tokenizer, ids, common), in_agent = side_json(*tokenizer, held, common);
  if (options.json) {
    print_json(Json{{"agent", options.id}, {"prompt_tokens", found.prompt}, {"held_tokens", found.held},
                    {"common_tokens", common}, {"sealed_tokens", sealed}, {"resumable_tokens", resumable},
                    {"diverges_at", diverges ? Json(common) : Json(nullptr)}, {"before", before},
                    {"prompt", in_prompt}, {"held", in_agent}});
    return 0;
  }
  const std::string side = options.other.empty() ? "prompt" : "agent " + options.other;
  std::string text = side + ": " + std::to_string(found.prompt) + " tokens; agent " + options.id + ": " +
                     std::to_string(found.held) + "; equal: the first " + std::to_string(common) + " (" +
                     std::to_string(sealed) + " in whole segments)\n";
  if (resumable < common) {
    text += missing_of(info) + " between " + std::to_string(resumable) + " and " + std::to_string(common) + ": " +
            std::to_string(common - resumable) + " of these tokens are computed again\n";
  }
  if (diverges) {
    text += "they part at token " + std::to_string(common) + ", after " + dump_json(before) + ":\n";
    const std::string agent = options.other.empty() ? "agent" : "agent " + options.id;
    const size_t width = std::max(side.size(), agent.size());
    text += "  " + side + ": " + std::string(width - side.size(), ' ') + side_text(in_prompt) + "\n";
    text += "  " + agent + ": " + std::string(width - agent.size(), ' ') + side_text(in_agent) + "\n";
    // The first tokens of a conversation are the template's; a prompt of other ones was not rendered by it.
    if (common == 0 && options.other.empty() && !options.messages) {
      text += "the agent's conversation begins as its chat template renders it; --messages renders a prompt so too\n";
    }
  } else {
    text += common == found.prompt ? "all of the " + side + " is held\n" : "all that the agent holds begins the " + side + "\n";
  }
  print(text);
  return 0;
}

struct BranchOptions {
  std::string id, other;
  int64_t tokens = 0, exchanges = 0;
  bool off = false, json = false;
};

/// What a command did: a line for people, an object for programs.
void tell(const BranchOptions& options, const std::string& line, const Json& object) {
  if (options.json) {
    print_json(object);
  } else {
    print(line + "\n");
  }
}

/// Of the agent's tokens, those that its next turn computes again for want of a state of its recurrent layers, or of
/// rows that windows see, and a sentence on them.
std::pair<int64_t, std::string> again(const Store& store, const std::string& id) {
  const AgentInfo info = store.agent_info(id);
  const int64_t from = resumable_tokens(info, info.cache_size), n = info.cache_size - from;
  if (n == 0) return {0, ""};
  return {n, "; its next turn computes " + std::to_string(n) + " of them again, for there is " + missing_of(info) +
                 " between " + std::to_string(from) + " and " + std::to_string(info.cache_size)};
}

void fork(Store& store, const BranchOptions& o, std::optional<int64_t> at) {
  const SaveResult saved = fork_agent(store, o.id, o.other, at);
  const int64_t tokens = store.agent_info(o.other).cache_size;
  const auto [computed, why] = again(store, o.other);
  tell(o, o.other + " begins with " + std::to_string(tokens) + " tokens of " + o.id + ", " + human_bytes(saved.bytes_written) + " written" + why,
       {{"agent", o.other}, {"source", o.id}, {"tokens", tokens}, {"again", computed}, {"bytes_written", saved.bytes_written}});
}

void rewind(Store& store, const BranchOptions& o, int64_t keep) {
  const int64_t before = store.agent_info(o.id).cache_size;
  const SaveResult saved = rewind_agent(store, o.id, keep);
  const auto [computed, why] = again(store, o.id);
  tell(o, o.id + " keeps " + std::to_string(keep) + " of " + std::to_string(before) + " tokens" + why,
       {{"agent", o.id}, {"tokens", keep}, {"tokens_before", before}, {"again", computed}, {"bytes_written", saved.bytes_written}});
}

}  // namespace

void add_branch_commands(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<BranchOptions>();
  const auto add = [&](const char* name, const char* help, auto describe, auto work) {
    CLI::App* command = app.add_subcommand(name, help);
    command->add_option("ID", options->id, "The agent")->required()->type_name("");
    command->add_flag("--json", options->json, "Print a JSON object that says what was done");
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
        CLI::Option* at = command.add_option("--at", options->tokens, "Tokens it begins with (default: all)");
        at->check(CLI::NonNegativeNumber)->type_name("N");
        command.add_option("--turn", options->exchanges, "The same in exchanges: a question and its answer")
            ->check(CLI::NonNegativeNumber)
            ->excludes(at)
            ->type_name("K");
      },
      [](Store& store, const BranchOptions& o, const CLI::App& command) {
        fork(store, o, command.count("--at") > 0     ? std::optional(o.tokens)
                       : command.count("--turn") > 0 ? std::optional(end_of_exchange(exchanges_of(store, o.id), o.id, o.exchanges))
                                                     : std::nullopt);
      });
  add("rewind", "Make an agent forget everything after its first tokens, or its last exchanges",
      [&](CLI::App& command) {
        CLI::Option* tokens = command.add_option("N", options->tokens, "Tokens it keeps")->check(CLI::NonNegativeNumber)->type_name("");
        command.add_option("--turns", options->exchanges, "Forget the last so many exchanges: questions and their answers")
            ->check(CLI::NonNegativeNumber)
            ->excludes(tokens)
            ->type_name("N");
      },
      [](Store& store, const BranchOptions& o, const CLI::App& command) {
        if (command.count("N") == 0 && command.count("--turns") == 0) throw UsageError("N or --turns is required");
        rewind(store, o, command.count("N") > 0 ? o.tokens : begin_of_last(exchanges_of(store, o.id), o.id, o.exchanges));
      });
  add("pin", "Keep an agent in memory, once it is awake, when others must make room",
      [&](CLI::App& command) { command.add_flag("--off", options->off, "No longer"); },
      [](Store& store, const BranchOptions& o, const CLI::App&) {
        pin_agent(store, o.id, !o.off);
        tell(o, o.id + (o.off ? " is no longer pinned" : " is pinned"), {{"agent", o.id}, {"pinned", !o.off}});
      });
  add("upgrade", "Write an agent of an older format anew in today's, so that others can share what it begins with", [](CLI::App&) {},
      [](Store& store, const BranchOptions& o, const CLI::App&) {
        const int64_t written = store.upgrade_agent(o.id).bytes_written;
        tell(o, o.id + " is of today's format, " + human_bytes(written) + " written", {{"agent", o.id}, {"bytes_written", written}});
      });
  add("rename", "Give an agent another name",
      [&](CLI::App& command) { command.add_option("NEW", options->other, "The new name")->required()->type_name(""); },
      [](Store& store, const BranchOptions& o, const CLI::App&) {
        store.rename_agent_cache(o.id, o.other);
        tell(o, o.id + " is now " + o.other, {{"agent", o.other}, {"before", o.id}});
      });

  const auto why_options = std::make_shared<WhyOptions>();
  CLI::App* why_app = app.add_subcommand("why", "Tell how much of a prompt, or of another agent, an agent holds, and where they part");
  why_app->add_option("ID", why_options->id, "The agent")->required()->type_name("");
  CLI::Option* other = why_app->add_option("OTHER", why_options->other, "Another agent, in place of a prompt")->type_name("");
  CLI::Option* file =
      why_app->add_option("--prompt-file", why_options->prompt_file, "The whole prompt as a model reads it; - is standard input")
          ->excludes(other)
          ->type_name("F");
  why_app->add_flag("--messages", why_options->messages, "The file is a JSON array of {role, content}; the model's template renders it")
      ->needs(file);
  add_template_options(*why_app, why_options->tools_file, why_options->tools, why_options->template_args);
  why_app->add_option("--model", why_options->model, "Whose tokenizer (default: the agent's model)")->type_name("M");
  why_app->add_flag("--json", why_options->json, "Print a JSON object");
  why_app->callback([&invocation, why_options] {
    invocation.run = [&invocation, why_options] { return why(*why_options, invocation.store); };
  });
}

}  // namespace torpor::cli
