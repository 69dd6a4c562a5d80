/// launch: a coding agent of somebody else's, on a running server.

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <system_error>

#include <CLI/CLI.hpp>

#include "base/environment.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "cli/server_client.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

struct LaunchOptions : ServerOptions {
  std::string client, model;
  std::vector<std::string> arguments;
  bool print = false;
};

/// The variable that holds the key, where a client is told by its name.
constexpr const char* kKeyVariable = "TORPOR_API_KEY";

struct Model {
  std::string name;
  int64_t context = 0;  ///< tokens
};

/// A program to become. Nothing of it changes a file of the user's.
struct Start {
  std::vector<std::string> command;
  std::vector<std::pair<std::string, std::string>> variables;
  std::vector<std::string> without;  ///< variables that the program must not see
  std::filesystem::path file;        ///< written before; empty: none
  std::string file_text;
};

/// An answer's longest: what is left of the context is the prompt's.
int64_t answer_tokens(const Model& model) { return std::min<int64_t>(model.context / 4, 32'000); }

Start start_claude(const ServerClient& server, const Model& model) {
  Start start;
  const std::string context = std::to_string(model.context);
  // For models that it doesn't know it would assume a window of its own, and never compact in time.
  start.variables = {{"ANTHROPIC_BASE_URL", server.url()},
                     {"ANTHROPIC_AUTH_TOKEN", server.key()},
                     {"ANTHROPIC_MODEL", model.name},
                     {"ANTHROPIC_DEFAULT_HAIKU_MODEL", model.name},
                     {"ANTHROPIC_DEFAULT_SONNET_MODEL", model.name},
                     {"ANTHROPIC_DEFAULT_OPUS_MODEL", model.name},
                     {"CLAUDE_CODE_MAX_CONTEXT_TOKENS", context},
                     {"CLAUDE_CODE_AUTO_COMPACT_WINDOW", context},
                     {"CLAUDE_CODE_MAX_OUTPUT_TOKENS", std::to_string(answer_tokens(model))},
                     {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"}};
  start.without = {"ANTHROPIC_API_KEY"};  // it would be sent, too
  start.command = {"claude"};
  return start;
}

/// Codex takes its configuration from options, above that of the user's file. JSON's strings are TOML's.
Start start_codex(const ServerClient& server, const Model& model) {
  Start start;
  start.variables = {{kKeyVariable, server.key()}};
  const auto text = [](const std::string& value) { return dump_json(Json(value)); };
  start.command = {"codex",
                   "-c", "model=" + text(model.name),
                   "-c", "model_provider=\"torpor\"",
                   "-c", "model_providers.torpor={name=\"Torpor\",base_url=" + text(server.url() + "/v1") +
                             ",env_key=\"" + kKeyVariable + "\",wire_api=\"responses\"}",
                   "-c", "model_context_window=" + std::to_string(model.context)};
  return start;
}

/// OpenCode lays what this variable holds over its files.
Start start_opencode(const ServerClient& server, const Model& model) {
  constexpr const char* kVariable = "OPENCODE_CONFIG_CONTENT";
  const Json ours{
      {"model", "torpor/" + model.name},
      {"small_model", "torpor/" + model.name},
      {"provider",
       {{"torpor",
         {{"npm", "@ai-sdk/openai-compatible"},
          {"name", "Torpor"},
          {"options", {{"baseURL", server.url() + "/v1"}, {"apiKey", "{env:" + std::string(kKeyVariable) + "}"}}},
          {"models",
           {{model.name,
             {{"name", model.name}, {"limit", {{"context", model.context}, {"output", answer_tokens(model)}}}}}}}}}}}};
  Json config = parse_json<Json>(environment(kVariable), nullptr, false, true);
  if (!config.is_object()) config = Json::object();
  config.merge_patch(ours);
  Start start;
  start.variables = {{kVariable, dump_json(config)}, {kKeyVariable, server.key()}};
  start.command = {"opencode"};
  return start;
}

/// pi takes a provider from an extension. The file says always the same; what differs stands in a variable.
Start start_pi(const ServerClient& server, const Model& model) {
  const Json described{{"id", model.name},
                       {"name", model.name},
                       {"reasoning", false},
                       {"input", Json::array({"text"})},
                       {"cost", {{"input", 0}, {"output", 0}, {"cacheRead", 0}, {"cacheWrite", 0}}},
                       {"contextWindow", model.context},
                       {"maxTokens", answer_tokens(model)},
                       // The id of its session, as x-session-id: an agent for each conversation.
                       {"compat", {{"sendSessionAffinityHeaders", true}, {"sessionAffinityFormat", "openrouter"}}}};
  const Json provider{{"name", "Torpor"},
                      {"baseUrl", server.url() + "/v1"},
                      {"api", "openai-completions"},
                      {"models", Json::array({described})}};
  const std::string cache = environment("XDG_CACHE_HOME");
  Start start;
  start.file = std::filesystem::path(cache.empty() ? home_directory() + "/.cache" : cache) / "torpor" / "pi.js";
  start.file_text =
      "export default function (pi) {\n"
      "  const provider = JSON.parse(process.env.TORPOR_PI_PROVIDER);\n"
      "  pi.registerProvider(\"torpor\", { ...provider, apiKey: process.env.TORPOR_API_KEY });\n"
      "}\n";
  start.variables = {{"TORPOR_PI_PROVIDER", dump_json(provider)}, {kKeyVariable, server.key()}};
  start.command = {"pi", "--extension", start.file.string(), "--provider", "torpor", "--model", model.name};
  return start;
}

struct Client {
  const char* name;
  const char* package;  ///< of npm
  Start (*start)(const ServerClient&, const Model&);
};

constexpr Client kClients[] = {{"claude", "@anthropic-ai/claude-code", start_claude},
                               {"codex", "@openai/codex", start_codex},
                               {"opencode", "opencode-ai", start_opencode},
                               {"pi", "@earendil-works/pi-coding-agent", start_pi}};

void require_program(const Client& client) {
  std::istringstream path(environment("PATH"));
  for (std::string directory; std::getline(path, directory, ':');) {
    const std::filesystem::path program = std::filesystem::path(directory.empty() ? "." : directory) / client.name;
    std::error_code ignored;
    if (std::filesystem::is_regular_file(program, ignored) && access(program.c_str(), X_OK) == 0) return;
  }
  throw Error(ErrorCode::kNotFound, "there is no '" + std::string(client.name) +
                                        "' in the PATH; get it with `npm install -g " + client.package + "`");
}

/// The named one, or the server's first.
Model model_of_server(const ServerClient& server, const std::string& name) {
  std::string names;
  const Json told = server.get("/v1/models");
  for (const Json& one : told.at("data")) {
    const std::string id = one.at("id");
    if (name.empty() || id == name) return {id, one.at("context_length")};
    names += (names.empty() ? "" : ", ") + id;
  }
  throw Error(ErrorCode::kNotFound, "the server at " + server.url() + " has no model '" + name + "'; it has " + names)
      .with_field("model");
}

std::string quoted(const std::string& word) {
  const auto plain = [](unsigned char c) {
    return std::isalnum(c) || std::string_view("_-./:=@%+,").find(char(c)) != std::string_view::npos;
  };
  if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) return word;
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

/// A shell script that does what launch would; the key stays where it is.
std::string script_of(const Start& start, const ServerClient& server) {
  std::string text;
  for (const auto& [name, value] : start.variables) {
    text += "export " + name + "=" + (value == server.key() ? server.key_for_shell() : quoted(value)) + "\n";
  }
  for (const std::string& name : start.without) text += "unset " + name + "\n";
  if (!start.file.empty()) {
    text += "mkdir -p " + quoted(start.file.parent_path().string()) + "\ncat > " + quoted(start.file.string()) +
            " <<'END'\n" + start.file_text + "END\n";
  }
  text += "exec";
  for (const std::string& word : start.command) text += " " + quoted(word);
  return text + "\n";
}

/// Whole or not at all: another launch may read the file just then.
void write_file(const std::filesystem::path& path, const std::string& text) {
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  const std::filesystem::path written = path.string() + "." + std::to_string(getpid());
  std::ofstream file(written, std::ios::binary);
  file << text;
  file.close();
  if (file) std::filesystem::rename(written, path, error);
  if (!file || error) {
    throw Error(ErrorCode::kIo, "can't write '" + path.string() + "'; set XDG_CACHE_HOME to a directory");
  }
}

int launch(const LaunchOptions& options) {
  const Client& client = *std::find_if(std::begin(kClients), std::end(kClients),
                                       [&](const Client& one) { return one.name == options.client; });
  if (!options.print) require_program(client);
  const ServerClient server(options);
  Start start = client.start(server, model_of_server(server, options.model));
  start.command.insert(start.command.end(), options.arguments.begin(), options.arguments.end());
  if (options.print) {
    print(script_of(start, server));
    return 0;
  }
  if (!start.file.empty()) write_file(start.file, start.file_text);
  for (const auto& [name, value] : start.variables) setenv(name.c_str(), value.c_str(), 1);
  for (const std::string& name : start.without) unsetenv(name.c_str());
  std::signal(SIGXFSZ, SIG_DFL);  // as it was before main
  std::vector<char*> words;
  for (std::string& word : start.command) words.push_back(word.data());
  words.push_back(nullptr);
  execvp(words[0], words.data());
  throw Error(ErrorCode::kIo,
              "can't start '" + start.command[0] + "': " + std::generic_category().message(errno));
}

}  // namespace

void add_launch_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<LaunchOptions>();
  std::vector<std::string> names;
  for (const Client& client : kClients) names.emplace_back(client.name);
  CLI::App* command = app.add_subcommand("launch", "Start a coding agent on a running server, its own settings untouched");
  command->add_option("CLIENT", options->client, "claude, codex, opencode or pi")
      ->required()
      ->check(CLI::IsMember(names))
      ->type_name("");
  command->add_option("ARGS", options->arguments, "The client's own arguments, after --")->type_name("");
  add_server_options(*command, *options);
  command->add_option("--model", options->model, "The model that answers; the server's first unless given")->type_name("M");
  command->add_flag("--print", options->print, "Print a shell script that does it, and start nothing");
  command->callback([&invocation, options] { invocation.run = [options] { return launch(*options); }; });
}

}  // namespace torpor::cli
