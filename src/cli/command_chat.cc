/// chat: a line is a message, or a command to the program.

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <map>
#include <optional>
#include <set>

#include <CLI/CLI.hpp>

#include "cli/chat_agents.h"
#include "cli/chat_line.h"
#include "cli/commands.h"
#include "cli/exchanges.h"
#include "cli/line_reader.h"
#include "cli/markdown.h"
#include "cli/output.h"
#include "cli/server_client.h"
#include "cli/text_input.h"
#include "cli/turn.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

constexpr const char* kHelp = R"(/agent ID           talk with another agent; the one before stays awake
/agents             all agents of the store
/turns              the exchanges so far, with the tokens that each ends at
/undo [N]           forget the last exchange, or the last N
/rewind N           forget all but the first N tokens
/fork ID [N]        go on as a new agent that shares the first N tokens (all) of this one
/system TEXT        the system prompt of this agent, before its first message
/sleep              save this agent and let it go, so that another process may have it
/pin, /unpin        keep this agent in memory when others must make room; or no longer
/rename ID          give this agent another name
/memory             who holds how much memory
/exit, /quit        leave
//TEXT              the message /TEXT
)";

void print_agents(const std::vector<AgentStatus>& agents, bool json) {
  if (json) {
    Json all = Json::array();
    for (const AgentStatus& agent : agents) {
      all.push_back(Json{{"agent", agent.agent}, {"model", agent.model}, {"tokens", agent.tokens}, {"awake", agent.awake},
                         {"pinned", agent.pinned}, {"unsaved", agent.unsaved}});
    }
    print_json(Json{{"agents", all}});
    return;
  }
  std::vector<std::vector<std::string>> rows{{"AGENT", "TOKENS", "STATE", "MODEL"}};
  for (const AgentStatus& agent : agents) {
    rows.push_back({agent.agent, std::to_string(agent.tokens), std::string(agent.awake ? "awake" : "asleep") +
                    (agent.unsaved ? ", unsaved" : "") + (agent.pinned ? ", pinned" : ""), agent.model});
  }
  print(table(rows, {false, true, false, false}));
}

void print_exchanges(const std::vector<Exchange>& exchanges, bool json) {
  if (json) {
    Json all = Json::array();
    for (const Exchange& exchange : exchanges) {
      all.push_back(Json{{"begin", exchange.begin}, {"end", exchange.end}, {"user", exchange.user}, {"answer", exchange.answer}});
    }
    print_json(Json{{"exchanges", all}});
    return;
  }
  std::vector<std::vector<std::string>> rows{{"TURN", "TOKENS", "MESSAGE"}};
  for (size_t i = 0; i < exchanges.size(); ++i) {
    rows.push_back({std::to_string(i + 1), std::to_string(exchanges[i].end), first_line(exchanges[i].user, 60)});
  }
  print(table(rows, {true, true, false}));
}

void print_memory(const MemoryUsage& usage, bool json) {
  if (json) {
    Json agents = Json::array();
    for (const AgentMemory& agent : usage.agents) {
      agents.push_back(Json{{"agent", agent.agent}, {"tokens", agent.tokens}, {"bytes", agent.bytes},
                            {"shared_bytes", agent.shared_bytes}, {"pinned", agent.pinned}, {"unsaved", agent.unsaved}});
    }
    print_json(Json{{"model_bytes", usage.model_bytes}, {"kv_bytes", usage.kv_bytes}, {"mapped_bytes", usage.mapped_bytes},
                    {"queued_bytes", usage.queued_bytes}, {"budget", usage.budget}, {"agents", agents}});
    return;
  }
  std::vector<std::vector<std::string>> rows{{"AGENT", "TOKENS", "MEMORY", "SHARED", "STATE"}};
  for (const AgentMemory& agent : usage.agents) {
    rows.push_back({agent.agent, std::to_string(agent.tokens), human_bytes(agent.bytes), human_bytes(agent.shared_bytes),
                    std::string(agent.unsaved ? "unsaved" : "saved") + (agent.pinned ? ", pinned" : "")});
  }
  print(table(rows, {false, true, true, true, false}));
  print(human_bytes(usage.kv_bytes) + " of KV cache" +
        (usage.budget > 0 ? " (budget " + human_bytes(usage.budget) + ")" : "") + ", " + human_bytes(usage.mapped_bytes) +
        " of it mapped from disk; model " + human_bytes(usage.model_bytes) + "\n");
}

class Chat {
 public:
  Chat(TurnOptions options, std::unique_ptr<ChatAgents> agents) : options_(std::move(options)), agents_(std::move(agents)) {}

  /// However the conversation ends, what it said is saved, and an error of that is told.
  int talk() {
    std::exception_ptr ended;
    std::string told;
    try {
      converse();
    } catch (const std::exception& error) {
      ended = std::current_exception();
      told = error.what();
    }
    try {
      agents_->save_all([&](int done, int total) {
        if (interactive_) std::fprintf(stderr, "\rsaving: %d of %d%s", done, total, done == total ? "\n" : "");
      });
    } catch (const Error& error) {
      if (!ended) throw;
      if (told.find(error.what()) == std::string::npos) complain(error.what());  // else a turn has just said so
    }
    if (ended) std::rethrow_exception(ended);
    return interrupt_.signal() == 0 ? 0 : 128 + interrupt_.signal();
  }

 private:
  void converse() {
    if (interactive_) {
      std::fprintf(stderr, "%s on %s; /help lists the commands, Ctrl-D ends, Ctrl-C stops an answer.\n",
                   options_.agent.c_str(), agents_->place().c_str());
      greet();
    }
    while (true) {
      const std::optional<std::string> line = lines_.read(options_.agent + "> ");
      if (!line) break;
      if (line->find_first_not_of(" \t\v\f") == line->npos) continue;
      try {
        const ChatLine parsed = parse_chat_line(*line);
        if (parsed.command.empty()) {
          say(parsed.text);
        } else if (!command(parsed)) {
          break;
        }
      } catch (const Error& error) {
        // Another line may do better, and a disk that was full may have room by then.
        const std::set<ErrorCode> harmless{ErrorCode::kInvalidArgument, ErrorCode::kResourceExhausted, ErrorCode::kIo,
                                           ErrorCode::kNotFound, ErrorCode::kBusy};
        if (!interactive_ || harmless.count(error.code()) == 0) throw;
        complain(error);
      }
      if (interrupt_.signal() != 0) {
        if (!interactive_ || interrupt_.signal() != SIGINT) break;
        interrupt_.rearm();
      }
    }
    if (interactive_) std::fputs("\n", stderr);
  }

  void say(const std::string& message) {
    check_text(message, "the message");
    TurnOptions turn = options_;
    const auto own = systems_.find(options_.agent);
    if (own != systems_.end()) turn.system = own->second;
    turn.has_system = (own != systems_.end() || options_.has_system) && is_new(options_.agent);
    agents_->turn(turn, message, interrupt_);
    known_.insert(options_.agent);
  }

  /// Whether nothing was said to the agent yet, or all of it was taken back.
  bool is_new(const std::string& agent) {
    if (known_.count(agent) != 0) return false;
    return emptied_.count(agent) != 0 || !agents_->has_begun(agent);
  }

  /// Where an old conversation has come to, or that it is a new one: a mistyped name makes one.
  void greet() {
    if (!interactive_) return;
    if (is_new(options_.agent)) {
      std::fprintf(stderr, "%s is new.\n", options_.agent.c_str());
    } else {
      const std::vector<Exchange> exchanges = exchanges_of(agents_->messages(options_.agent));
      if (exchanges.empty()) return;
      for (const Exchange& exchange : exchanges) lines_.remember(exchange.user);
      std::string answer = printable(exchanges.back().answer);
      if (may_style(STDERR_FILENO) && !options_.raw) {
        MarkdownStream stream;
        answer = stream.feed(answer);
        answer += stream.finish();
      }
      std::fprintf(stderr, "%zu exchanges so far; the last one:\n> %s\n%s\n", exchanges.size(),
                   printable(first_line(exchanges.back().user, 200)).c_str(), answer.c_str());
    }
  }

  /// What a command did. Programs that read objects have asked for it themselves.
  void tell(const std::string& what) const {
    if (!options_.json) std::fprintf(stderr, "[%s]\n", printable(what).c_str());
  }

  /// The exchanges of the agent, which is saved first: its messages are read from its file.
  std::vector<Exchange> saved_exchanges() {
    agents_->save(options_.agent);
    return exchanges_of(agents_->messages(options_.agent));
  }

  void rewind(int64_t keep) {
    const std::string& agent = options_.agent;
    // A conversation that begins anew begins with the same system prompt.
    if (keep == 0) {
      const Json messages = messages_of(agents_->messages(agent));
      if (!messages.empty() && text_of(messages[0], "role") == "system") systems_[agent] = text_of(messages[0], "content");
    }
    agents_->rewind(agent, keep);
    if (keep == 0) {
      known_.erase(agent);
      emptied_.insert(agent);
    }
    tell(agent + " keeps " + std::to_string(keep) + " tokens");
  }

  /// False when it was told to leave.
  bool command(const ChatLine& line) {
    const std::string& name = line.command;
    std::string& agent = options_.agent;
    if (name == "/exit" || name == "/quit") return false;
    if (name == "/help") {
      std::fputs(kHelp, stderr);
    } else if (name == "/memory") {
      print_memory(agents_->memory(), options_.json);
    } else if (name == "/agents") {
      print_agents(agents_->all(), options_.json);
    } else if (name == "/turns") {
      print_exchanges(saved_exchanges(), options_.json);
    } else if (name == "/agent") {
      check_agent_id(line.argument);
      agent = line.argument;
      agents_->prefetch(agent);
      greet();
    } else if (name == "/fork") {
      check_agent_id(line.argument);
      agents_->fork(agent, line.argument, line.count);
      tell(line.argument + " is a fork of " + agent);
      agent = line.argument;
      known_.insert(agent);
    } else if (name == "/rewind") {
      rewind(*line.count);
    } else if (name == "/undo") {
      rewind(begin_of_last(saved_exchanges(), agent, line.count.value_or(1)));
    } else if (name == "/system") {
      if (!is_new(agent) && known_tokens() > 0) {
        throw Error(ErrorCode::kInvalidArgument, "agent '" + agent + "' has begun already; a system prompt stands at the beginning");
      }
      check_text(line.text, "the system message");
      systems_[agent] = line.text;
      tell("the system prompt of " + agent + " is set");
    } else if (name == "/sleep") {
      agents_->sleep(agent);
      tell(agent + " sleeps");
    } else if (name == "/pin" || name == "/unpin") {
      agents_->pin(agent, name == "/pin");
      tell(agent + (name == "/pin" ? " is pinned" : " is no longer pinned"));
    } else if (name == "/rename") {
      check_agent_id(line.argument);
      agents_->rename(agent, line.argument);
      tell(agent + " is now " + line.argument);
      known_.insert(line.argument);
      agent = line.argument;
    }
    return true;
  }

  std::vector<std::string> names() {
    std::vector<std::string> names;
    for (const AgentStatus& status : agents_->all()) names.push_back(status.agent);
    return names;
  }

  /// How many tokens the agent has, in memory or on disk.
  int64_t known_tokens() {
    for (const AgentStatus& status : agents_->all()) {
      if (status.agent == options_.agent) return status.tokens;
    }
    return 0;
  }

  TurnOptions options_;  // `agent` is the one that is talked with
  const std::unique_ptr<ChatAgents> agents_;
  InterruptScope interrupt_;
  LineReader lines_{[this](const std::string& before) { return complete_chat_line(before, [this] { return names(); }); }};
  const bool interactive_ = lines_.interactive();
  std::set<std::string> known_;                 // agents that have begun here
  std::set<std::string> emptied_;               // agents of which all was taken back here
  std::map<std::string, std::string> systems_;  // agents' own system prompts, of those that have not begun
};

#ifdef TORPOR_SERVER
/// What a turn of a server's takes; the rest is the server's own.
void check_for_server(const CLI::App& chat) {
  static const std::set<std::string> kTaken{"server", "api-key-file", "agent", "model", "system", "max-tokens",
                                            "temperature", "top-p", "top-k", "min-p", "repetition-penalty",
                                            "penalty-context", "presence-penalty", "frequency-penalty", "logit-bias",
                                            "stop", "seed", "json", "help"};
  for (const CLI::Option* option : chat.get_options()) {
    if (option->count() > 0 && !option->get_lnames().empty() && kTaken.count(option->get_lnames()[0]) == 0) {
      throw UsageError("--" + option->get_lnames()[0] + " is nothing that a turn of --server takes");
    }
  }
}
#endif

}  // namespace

void add_chat_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<TurnOptions>();
  CLI::App* chat_app = app.add_subcommand("chat", "Talk with agents, line by line; every turn is saved");
  chat_app->add_option("--agent", options->agent, "The agent's name; made if new")->required()->type_name("ID");
  add_turn_options(*chat_app, *options);
  chat_app->add_flag_callback("--write-behind", [options] { options->save = SaveMode::kBehind; },
                              "Save while the conversation goes on; what is on disk lags behind what is said");
#ifdef TORPOR_SERVER
  const auto server = std::make_shared<ServerOptions>();
  add_server_options(*chat_app, *server);
  chat_app->get_option("--server")->default_str("")->description("Talk with the agents of a running server");
#endif
  chat_app->callback([=, &invocation] {
    options->has_system = chat_app->count("--system") > 0;
    options->markdown = true;
    invocation.run = [=, &invocation] {
      check_agent_id(options->agent);
#ifdef TORPOR_SERVER
      if (chat_app->count("--server") > 0) {
        check_for_server(*chat_app);
        check_text(options->system, "the system message");
        auto agents = server_agents(*server);
        if (options->has_system && agents->has_begun(options->agent)) {
          check_system(*options, agents->messages(options->agent));
        }
        return Chat(*options, std::move(agents)).talk();
      }
#endif
      check_early(*options, invocation.store);
      return Chat(*options, engine_agents(*options, invocation.store)).talk();
    };
  });
}

}  // namespace torpor::cli
