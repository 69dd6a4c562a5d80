#pragma once
/// The options of `serve`: from the command line, TORPOR_* variables and a TOML file, in this order of precedence.

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "cli/model_options.h"

namespace torpor::cli {

struct ServeOptions : AnswerOptions {
  std::filesystem::path config;
  std::vector<std::string> models;   // the first is `model`
  std::vector<std::string> aliases;  // PATTERN=NAME
  double idle_unload = 0, session_ttl = 7 * 86400;  // seconds; 0: never
  std::string host = "127.0.0.1";
  int port = 8080;
  std::filesystem::path socket, api_key_file, log;
  bool no_auth = false, share_prefixes = false;
  std::vector<std::string> allow_hosts;
  uint64_t max_body = uint64_t(64) << 20;  // bytes
  int queue = 64, max_connections = 1024, max_stall = 250;  // max_stall: milliseconds
  double drain_timeout = 30, idle_timeout = 90;  // seconds
  std::string metrics_alias;
  std::map<std::string, std::vector<std::string>> said;  // the values of each option that was given anywhere, by its name
};

/// Adds them to a command. Each has a variable too: --drain-timeout is TORPOR_DRAIN_TIMEOUT.
void add_serve_options(CLI::App& app, ServeOptions& options);

/// The options again, with those of the file --config that neither command line nor environment gave. `given` is the
/// command after it was parsed. kInvalidArgument names the file, the line and what is wrong.
ServeOptions with_config(const CLI::App& given, const std::filesystem::path& config);

}  // namespace torpor::cli
