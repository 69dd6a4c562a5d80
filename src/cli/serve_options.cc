#include "cli/serve_options.h"

#include <algorithm>
#include <sstream>

#include <CLI/CLI.hpp>
#include <toml++/toml.h>

#include "torpor/error.h"

namespace torpor::cli {
namespace {

std::string variable_of(std::string name) {
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return c == '-' ? '_' : std::toupper(c); });
  return "TORPOR_" + name;
}

[[noreturn]] void refuse(const std::filesystem::path& file, const toml::source_region& where, const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, file.string() + ", line " + std::to_string(where.begin.line) + ": " + what)
      .with_path(file.string());
}

/// As it would be written on the command line.
std::string written(const std::filesystem::path& file, const std::string& key, const toml::node& node) {
  if (const auto* text = node.as_string()) return text->get();
  if (!node.is_integer() && !node.is_floating_point() && !node.is_boolean()) {
    refuse(file, node.source(), "'" + key + "' is no text, number or truth");
  }
  std::ostringstream text;
  node.visit([&](const auto& value) {
    if constexpr (toml::is_integer<decltype(value)> || toml::is_floating_point<decltype(value)> ||
                  toml::is_boolean<decltype(value)>) {
      text << std::boolalpha << value.get();
    }
  });
  return text.str();
}

}  // namespace

void add_serve_options(CLI::App& app, ServeOptions& options) {
  add_model_options(app, options);
  app.remove_option(app.get_option("--model"));
  app.add_option("--model", options.models,
                 "Model directory, GGUF file, or ORG/NAME[:FILE] in the local Hugging Face cache; several are loaded "
                 "when requests name them")
      ->type_name("M");
  app.add_option("--session-ttl", options.session_ttl,
                 "Seconds without use after which a client's session is forgotten; 0: never")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1e9))
      ->type_name("S");
  app.add_option("--alias", options.aliases,
                 "PATTERN=NAME: what requests may call the model NAME; '*' at the pattern's end stands for anything")
      ->type_name("P=NAME");
  app.add_option("--idle-unload", options.idle_unload,
                 "Seconds without use after which a model, the first one aside, is unloaded; 0: never")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1e6))
      ->type_name("S");
  app.add_option("--config", options.config, "TOML file with any of these options, by their long names")
      ->type_name("FILE");
  app.add_option("--host", options.host, "Address to listen on; empty: no TCP")
      ->capture_default_str()
      ->type_name("ADDRESS");
  app.add_option("--port", options.port, "Port to listen on; 0: any that is free")
      ->capture_default_str()
      ->check(CLI::Range(0, 65535))
      ->type_name("N");
  app.add_option("--socket", options.socket, "UNIX socket to listen on too, for this user alone")->type_name("PATH");
  app.add_option("--api-key-file", options.api_key_file,
                 "Keys, a line each: tenant:name:sha256; made with a first key when absent (default: "
                 "~/.config/torpor/api-keys)")
      ->type_name("FILE");
  app.add_flag("--no-auth", options.no_auth, "Ask for no key; for loopback addresses only");
  app.add_flag("--share-prefixes", options.share_prefixes,
               "Tenants' prompts that begin alike are computed once; each can then tell that others began so");
  app.add_option("--allow-host", options.allow_hosts,
                 "A name that this server goes by, beside localhost and its addresses")
      ->type_name("NAME");
  add_size_option(app, "--memory-budget", options.memory_budget,
                  "Memory for agents' caches; beyond it the least recently used go to sleep");
  add_size_option(app, "--disk-budget", options.disk_budget,
                  "Size of the store; beyond it segments that no agent names are removed");
  add_size_option(app, "--min-free", options.min_free, "Free space to leave on the store's file system");
  add_remote_option(app, options);
  app.add_option("--advertise", options.advertise,
                 "With --remote: where other servers send requests for an agent of this one, as http://10.0.0.7:8080")
      ->type_name("URL");
  app.add_flag("--no-mmap", options.no_mmap, "Read agents into memory instead of mapping their files");
  app.add_option("--max-stall", options.max_stall, "Milliseconds that answers wait at most for a step of other prompts")
      ->capture_default_str()
      ->check(CLI::Range(1, 60'000))
      ->type_name("MS");
  app.add_option("--queue", options.queue, "Turns that may run or wait; one more is told to come again")
      ->capture_default_str()
      ->check(CLI::Range(1, 4096))
      ->type_name("N");
  add_size_option(app, "--max-body", options.max_body, "Size of a request's body");
  app.add_option("--max-connections", options.max_connections, "Connections that may be open")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536))
      ->type_name("N");
  app.add_option("--idle-timeout", options.idle_timeout, "Seconds after which an idle connection is closed")
      ->capture_default_str()
      ->check(CLI::Range(1.0, 86400.0))
      ->type_name("S");
  app.add_option("--drain-timeout", options.drain_timeout, "Seconds that SIGTERM leaves turns to end")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 86400.0))
      ->type_name("S");
  app.add_option("--metrics-alias", options.metrics_alias, "vllm: /metrics has vLLM's names too")
      ->check(CLI::IsMember({"vllm"}))
      ->type_name("NAME");
  app.add_option("--log", options.log, "File that gets a line of JSON for each request (default: standard error)")
      ->type_name("FILE");
  // Only once this command is given: the parser reads the variables of commands that are not, and refuses what they say.
  app.preparse_callback([&app](size_t) {
    for (CLI::Option* option : app.get_options()) {
      const auto names = option->get_lnames();
      if (!names.empty() && names[0] != "help") option->envname(variable_of(names[0]));
    }
  });
}

ServeOptions with_config(const CLI::App& given, const std::filesystem::path& config) {
  // What was given, then what the file adds, as one command line.
  std::vector<std::string> words;
  std::map<std::string, std::vector<std::string>> said;
  const auto add = [&](const CLI::Option& option, const std::string& value) {
    said[option.get_lnames()[0]].push_back(value);
    const std::string name = "--" + option.get_lnames()[0];
    if (option.get_expected_max() == 0) {
      words.push_back(name + "=" + value);  // a flag takes no other word
    } else {
      words.insert(words.end(), {name, value});  // "--host=" would take the word after it
    }
  };
  for (const CLI::Option* option : given.get_options()) {
    if (option->get_lnames().empty()) continue;
    for (const std::string& value : option->results()) add(*option, value);
  }
  if (!config.empty()) {
    toml::table table;
    try {
      table = toml::parse_file(config.string());
    } catch (const toml::parse_error& error) {
      refuse(config, error.source(), std::string(error.description()));
    }
    for (const auto& [key, node] : table) {
      const std::string name(key.str());
      const CLI::Option* option = given.get_option_no_throw("--" + name);
      if (option == nullptr || name == "config" || name == "help")
        refuse(config, key.source(), "there is no option '" + name + "'");
      std::vector<std::string> values;
      if (const toml::array* several = node.as_array()) {
        for (const toml::node& value : *several) values.push_back(written(config, name, value));
      } else {
        values.push_back(written(config, name, node));
      }
      if (option->count() > 0) continue;  // given already; a mistake is told all the same
      for (const std::string& value : values) add(*option, value);
    }
  }
  ServeOptions options;
  CLI::App app;
  add_serve_options(app, options);
  try {
    std::reverse(words.begin(), words.end());
    app.parse(std::move(words));
  } catch (const CLI::ParseError& error) {
    throw Error(ErrorCode::kInvalidArgument,
                (config.empty() ? std::string("serve") : config.string()) + ": " + error.what());
  }
  if (!options.models.empty()) options.model = options.models.front();
  options.said = std::move(said);
  return options;
}

}  // namespace torpor::cli
