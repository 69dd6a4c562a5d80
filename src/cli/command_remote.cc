/// remote: stores of objects, looked at and tried.

#include <algorithm>
#include <chrono>
#include <ctime>
#include <memory>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/output.h"
#include "faces/error_table.h"
#include "remote/cloud_store.h"
#include "remote/probe.h"

namespace torpor::cli {
namespace {

struct RemoteOptions {
  std::string url;
  size_t writers = 0, rounds = 100;
  double timeout = 10;
  bool json = false;
};

/// A person waits: less patient than a server.
remote::CloudOptions patience(const RemoteOptions& options) {
  const auto all = std::chrono::milliseconds(std::int64_t(options.timeout * 1000));
  remote::CloudOptions patience;
  patience.request_timeout = std::max(all, patience.request_timeout);
  patience.connect_timeout = std::min(all, patience.connect_timeout);
  patience.retry_timeout = all;
  return patience;
}

int check(const RemoteOptions& options) {
  remote::CloudStore store(options.url, patience(options));
  const remote::ProbeReport report = remote::probe(store, true);
  std::optional<remote::RaceReport> race;
  if (report.holds() && options.writers > 0) race = remote::race(store, options.writers, options.rounds);
  const bool holds = report.holds() && (!race || race->holds());
  if (options.json) {
    Json checks = Json::array();
    for (const remote::ProbeCheck& check : report.checks) {
      checks.push_back(
          Json{{"name", check.name}, {"meaning", check.meaning}, {"holds", check.holds}, {"found", check.found}});
    }
    Json object{{"url", options.url}, {"holds", holds}, {"checks", checks}};
    if (race) {
      object["race"] = Json{{"writers", options.writers},
                            {"rounds", race->rounds},
                            {"without_winner", race->without_winner},
                            {"with_several_winners", race->with_several},
                            {"of_another", race->of_another},
                            {"lost", race->lost}};
    }
    print_json(object);
  } else {
    std::string text;
    for (const remote::ProbeCheck& check : report.checks) {
      text += (check.holds ? "holds   " : "FAILS   ") + check.meaning;
      text += (check.holds ? "" : ": here " + check.found) + "\n";
    }
    if (race) {
      text += (race->holds() ? "holds   " : "FAILS   ") + std::to_string(options.writers) + " writers at a time, " +
              std::to_string(race->rounds) + " rounds: ";
      if (race->holds()) {
        text += "one winner each" + (race->lost == 0 ? "" : ", " + std::to_string(race->lost) + " answers lost") + "\n";
      } else {
        text += std::to_string(race->with_several) + " steps with several winners, " +
                std::to_string(race->without_winner) + " with none, " + std::to_string(race->of_another) +
                " with another's object\n";
      }
    }
    print(text);
  }
  if (holds) return 0;
  complain("this store can't keep agents: its conditional writes, or what is read after them, don't hold");
  return faces::error_mapping(ErrorCode::kInvalidArgument).exit_code;
}

/// RFC 3339, UTC.
std::string told_time(std::int64_t ms) {
  const std::time_t seconds = ms / 1000;
  std::tm parts{};
  char text[32] = "";
  if (gmtime_r(&seconds, &parts)) std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

int list(const RemoteOptions& options) {
  remote::CloudStore store(options.url, patience(options));
  const std::vector<remote::ObjectInfo> objects = store.list("");
  if (options.json) {
    Json listed = Json::array();
    for (const remote::ObjectInfo& object : objects) {
      listed.push_back(Json{{"key", object.key},
                            {"bytes", object.bytes},
                            {"tag", object.tag},
                            {"modified_ms", object.modified_ms}});
    }
    print_json(Json{{"url", options.url}, {"objects", listed}});
    return 0;
  }
  std::vector<std::vector<std::string>> rows{{"KEY", "SIZE", "WRITTEN"}};
  for (const remote::ObjectInfo& object : objects) {
    rows.push_back(
        {object.key, human_bytes(std::int64_t(object.bytes)), human_age(told_time(object.modified_ms)) + " ago"});
  }
  print(objects.empty() ? "no objects in " + options.url + "\n" : table(rows, {false, true, true}));
  return 0;
}

}  // namespace

void add_remote_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<RemoteOptions>();
  CLI::App* remote = app.add_subcommand("remote", "Look at a store of objects, and try whether it can keep agents");
  remote->require_subcommand(1);
  const auto add = [&](const char* name, const char* what, int (*run)(const RemoteOptions&)) {
    CLI::App* command = remote->add_subcommand(name, what);
    command->add_option("URL", options->url, "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX")
        ->required();
    command->add_option("--timeout", options->timeout, "Seconds for which a request is tried again (default: 10)")
        ->type_name("S")
        ->check(CLI::Range(0.0, 86400.0));
    command->add_flag("--json", options->json, "Print a JSON object");
    command->callback([&invocation, options, run] { invocation.run = [options, run] { return run(*options); }; });
    return command;
  };
  CLI::App* tried = add("check", "Try what Torpor needs of the store, with objects below PREFIX/probe", check);
  CLI::Option* race = tried->add_option("--race", options->writers, "Then let N threads at a time write one object")
                          ->type_name("N")
                          ->check(CLI::Range(2, 1024));
  tried->add_option("--rounds", options->rounds, "How often they do so (default: 100)")
      ->type_name("N")
      ->needs(race)
      ->check(CLI::Range(1, 1000000));
  add("ls", "List the objects below PREFIX", list);
}

}  // namespace torpor::cli
