/// chat: a line is a message, or a command to the program.

#include <unistd.h>

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
#include "cli/output.h"
#include "cli/text_input.h"
#include "cli/turn.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

constexpr const char* kHelp = R"(/agent ID           talk with another agent; the one before stays awake
/fork ID [N]        go on as a new agent that shares the first N tokens (all) of this one
/rewind N           forget all but the first N tokens
/pin, /unpin        keep this agent in memory when others must make room; or no longer
/rename ID          give this agent another name
/memory             who holds how much memory
/exit               leave
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

int64_t parse_tokens(const std::string& text) {
  int64_t n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc() || end != text.data() + text.size() || n < 0) {
    throw Error(ErrorCode::kInvalidArgument, "'" + text + "' is not a number of tokens");
  }
  return n;
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
    }
    while (true) {
      if (interactive_) std::fprintf(stderr, "%s> ", options_.agent.c_str());
      const std::optional<std::string> line = read_line();
      if (!line || *line == "/exit") break;
      if (line->empty()) continue;
      try {
        if (!command(*line)) say(*line);
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
    turn.has_system = options_.has_system && spoken_to_.count(options_.agent) == 0;
    TurnRequest request = turn_request(turn);
    request.prompt = message;
    take_turn(engine_, turn, std::move(request), interrupt_);
    spoken_to_.insert(options_.agent);
  }

  /// False when the line is no command: then it is a message, whatever it begins with.
  bool command(const std::string& line) {
    std::istringstream stream(line);
    std::vector<std::string> words{std::istream_iterator<std::string>(stream), {}};
    if (words.empty() || words[0][0] != '/') return false;
    const std::string name = words[0];
    const size_t arguments = words.size() - 1;
    std::string& agent = options_.agent;
    if (name == "/help" && arguments == 0) {
      std::fputs(kHelp, stderr);
    } else if (name == "/memory" && arguments == 0) {
      print_memory(engine_.memory_usage(), options_.json);
    } else if (name == "/agent" && arguments == 1) {
      check_agent_id(words[1]);
      agent = words[1];
      engine_.prefetch(agent);
    } else if (name == "/fork" && (arguments == 1 || arguments == 2)) {
      engine_.fork(agent, words[1], arguments == 2 ? std::optional(parse_tokens(words[2])) : std::nullopt, options_.save);
      agent = words[1];
      spoken_to_.insert(agent);
    } else if (name == "/rewind" && arguments == 1) {
      engine_.rewind(agent, parse_tokens(words[1]), options_.save);
    } else if ((name == "/pin" || name == "/unpin") && arguments == 0) {
      engine_.pin(agent, name == "/pin", options_.save);
    } else if (name == "/rename" && arguments == 1) {
      engine_.rename(agent, words[1]);
      agent = words[1];
    } else {
      return false;
    }
    return true;
  }

  TurnOptions options_;  // `agent` is the one that is talked with
  Engine engine_;
  InterruptScope interrupt_;
  const bool interactive_ = isatty(STDIN_FILENO) != 0;
  std::set<std::string> spoken_to_;
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
