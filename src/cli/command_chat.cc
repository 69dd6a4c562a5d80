/// chat: a line is a message, or a command to the program.

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <optional>
#include <set>
#include <sstream>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/exchanges.h"
#include "cli/output.h"
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

int64_t parse_count(const std::string& text, const char* of_what) {
  int64_t n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc() || end != text.data() + text.size() || n < 0) {
    throw Error(ErrorCode::kInvalidArgument, "'" + text + "' is not a number of " + of_what);
  }
  return n;
}

/// "/undo" of "/undo 2"; empty when the line is a message: what begins with no slash or two, or with a path.
std::string command_name(const std::string& line) {
  if (!line.starts_with('/') || line.starts_with("//")) return "";
  const std::string name = line.substr(0, line.find_first_of(" \t"));
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_'; };
  return std::all_of(name.begin() + 1, name.end(), letter) ? name : "";
}

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
  Chat(TurnOptions options, const std::filesystem::path& root) : options_(std::move(options)), engine_(options_.engine(root)) {}

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
      engine_.save_all([&](int done, int total) {
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
                   options_.agent.c_str(), options_.model.c_str());
      greet();
    }
    while (true) {
      if (interactive_) std::fprintf(stderr, "%s> ", options_.agent.c_str());
      const std::optional<std::string> line = read_line();
      if (!line) break;
      if (line->find_first_not_of(" \t\v\f") == line->npos) continue;
      const std::string name = command_name(*line);
      try {
        if (name.empty()) {
          say(line->starts_with("//") ? line->substr(1) : *line);
        } else if (!command(*line)) {
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
    TurnRequest request = turn_request(turn);
    request.prompt = message;
    take_turn(engine_, turn, std::move(request), interrupt_);
    known_.insert(options_.agent);
  }

  /// Whether nothing was said to the agent yet, or all of it was taken back.
  bool is_new(const std::string& agent) {
    if (known_.count(agent) != 0) return false;
    return emptied_.count(agent) != 0 || !engine_.store().contains(agent) || engine_.store().agent_info(agent).cache_size == 0;
  }

  /// Where an old conversation has come to, or that it is a new one: a mistyped name makes one.
  void greet() {
    if (!interactive_) return;
    if (is_new(options_.agent)) {
      std::fprintf(stderr, "%s is new.\n", options_.agent.c_str());
    } else if (engine_.store().contains(options_.agent)) {
      const std::vector<Exchange> exchanges = exchanges_of(engine_.store(), options_.agent);
      if (exchanges.empty()) return;
      std::fprintf(stderr, "%zu exchanges so far; the last one:\n> %s\n%s\n", exchanges.size(),
                   printable(first_line(exchanges.back().user, 200)).c_str(), printable(exchanges.back().answer).c_str());
    }
  }

  /// What a command did. Programs that read objects have asked for it themselves.
  void tell(const std::string& what) const {
    if (!options_.json) std::fprintf(stderr, "[%s]\n", printable(what).c_str());
  }

  /// The exchanges of the agent, which is saved first: its messages are read from its file.
  std::vector<Exchange> saved_exchanges() {
    engine_.save(options_.agent);
    return exchanges_of(engine_.store(), options_.agent);
  }

  void rewind(int64_t keep) {
    const std::string& agent = options_.agent;
    // A conversation that begins anew begins with the same system prompt.
    if (keep == 0 && engine_.store().contains(agent)) {
      const Json messages = messages_of(engine_.store(), agent);
      if (!messages.empty() && text_of(messages[0], "role") == "system") systems_[agent] = text_of(messages[0], "content");
    }
    engine_.rewind(agent, keep, options_.save);
    if (keep == 0) {
      known_.erase(agent);
      emptied_.insert(agent);
    }
    tell(agent + " keeps " + std::to_string(keep) + " tokens");
  }

  /// False when it was told to leave. kInvalidArgument for what is no command: it would be a message that is saved for good.
  bool command(const std::string& line) {
    std::istringstream stream(line);
    const std::vector<std::string> words{std::istream_iterator<std::string>(stream), {}};
    const std::string& name = words[0];
    const size_t arguments = words.size() - 1;
    std::string& agent = options_.agent;
    const auto takes = [&](bool right, const char* what) {
      if (!right) throw Error(ErrorCode::kInvalidArgument, name + " takes " + what + "; /help lists the commands, //... is a message");
    };
    if (name == "/exit" || name == "/quit") {
      takes(arguments == 0, "nothing");
      return false;
    }
    if (name == "/help") {
      takes(arguments == 0, "nothing");
      std::fputs(kHelp, stderr);
    } else if (name == "/memory") {
      takes(arguments == 0, "nothing");
      print_memory(engine_.memory_usage(), options_.json);
    } else if (name == "/agents") {
      takes(arguments == 0, "nothing");
      print_agents(engine_.agents(), options_.json);
    } else if (name == "/turns") {
      takes(arguments == 0, "nothing");
      print_exchanges(saved_exchanges(), options_.json);
    } else if (name == "/agent") {
      takes(arguments == 1, "the name of an agent");
      check_agent_id(words[1]);
      agent = words[1];
      engine_.prefetch(agent);
      greet();
    } else if (name == "/fork") {
      takes(arguments == 1 || arguments == 2, "a new agent's name, and maybe a number of tokens");
      engine_.fork(agent, words[1], arguments == 2 ? std::optional(parse_count(words[2], "tokens")) : std::nullopt, options_.save);
      tell(words[1] + " is a fork of " + agent);
      agent = words[1];
      known_.insert(agent);
    } else if (name == "/rewind") {
      takes(arguments == 1, "a number of tokens; /undo counts exchanges");
      rewind(parse_count(words[1], "tokens"));
    } else if (name == "/undo") {
      takes(arguments <= 1, "a number of exchanges, or nothing");
      const int64_t n = arguments == 1 ? parse_count(words[1], "exchanges") : 1;
      engine_.save(agent);
      rewind(begin_of_last(engine_.store(), agent, n));
    } else if (name == "/system") {
      takes(arguments > 0, "the text of a system prompt");
      if (!is_new(agent) && known_tokens() > 0) {
        throw Error(ErrorCode::kInvalidArgument, "agent '" + agent + "' has begun already; a system prompt stands at the beginning");
      }
      const std::string text = line.substr(line.find(words[1], name.size()));
      check_text(text, "the system message");
      systems_[agent] = text;
      tell("the system prompt of " + agent + " is set");
    } else if (name == "/sleep") {
      takes(arguments == 0, "nothing");
      engine_.sleep(agent);
      tell(agent + " sleeps");
    } else if (name == "/pin" || name == "/unpin") {
      takes(arguments == 0, "nothing");
      engine_.pin(agent, name == "/pin", options_.save);
      tell(agent + (name == "/pin" ? " is pinned" : " is no longer pinned"));
    } else if (name == "/rename") {
      takes(arguments == 1, "a new name");
      engine_.rename(agent, words[1]);
      tell(agent + " is now " + words[1]);
      known_.insert(words[1]);
      agent = words[1];
    } else {
      throw Error(ErrorCode::kInvalidArgument, "there is no command " + name + "; /help lists them, and /" + name + " is a message");
    }
    return true;
  }

  /// How many tokens the agent has, in memory or on disk.
  int64_t known_tokens() {
    for (const AgentStatus& status : engine_.agents()) {
      if (status.agent == options_.agent) return status.tokens;
    }
    return 0;
  }

  TurnOptions options_;  // `agent` is the one that is talked with
  Engine engine_;
  InterruptScope interrupt_;
  const bool interactive_ = isatty(STDIN_FILENO) != 0;
  std::set<std::string> known_;                 // agents that have begun here
  std::set<std::string> emptied_;               // agents of which all was taken back here
  std::map<std::string, std::string> systems_;  // agents' own system prompts, of those that have not begun
};

}  // namespace

void add_chat_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<TurnOptions>();
  CLI::App* chat_app = app.add_subcommand("chat", "Talk with agents, line by line; every turn is saved");
  chat_app->add_option("--agent", options->agent, "The agent's name; made if new")->required()->type_name("ID");
  add_turn_options(*chat_app, *options);
  chat_app->add_flag_callback("--write-behind", [options] { options->save = SaveMode::kBehind; },
                              "Save while the conversation goes on; what is on disk lags behind what is said");
  chat_app->callback([&invocation, options, chat_app] {
    options->has_system = chat_app->count("--system") > 0;
    invocation.run = [&invocation, options] {
      check_agent_id(options->agent);
      check_early(*options, invocation.store);
      return Chat(*options, invocation.store).talk();
    };
  });
}

}  // namespace torpor::cli
