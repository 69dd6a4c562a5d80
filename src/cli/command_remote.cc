/// remote: stores of objects, looked at and tried; agents sent there and brought back.

#include <algorithm>
#include <chrono>
#include <ctime>
#include <memory>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "cli/output.h"
#include "faces/error_table.h"
#include "remote/bucket_keys.h"
#include "remote/cloud_store.h"
#include "remote/probe.h"
#include "remote/tier.h"

namespace torpor::cli {
namespace {

struct RemoteOptions {
  std::filesystem::path store;
  std::string url, key_command;
  std::vector<std::string> ids;
  bool force = false, check = false;
  std::optional<int> idle_days;
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

/// `patience`, with the bucket's keys.
remote::CloudOptions patience_and_keys(const RemoteOptions& options) {
  remote::CloudOptions all = patience(options);
  remote::CloudStore plain(options.url, all);
  all.seal = remote::keys_of_bucket(plain, options.url, remote::run_key_command(options.key_command));
  return all;
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
  remote::CloudStore store(options.url, patience_and_keys(options));
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

/// A bucket and the store of this machine.
class Attached {
 public:
  explicit Attached(const RemoteOptions& options)
      : bucket_(options.url, patience_and_keys(options)), counted_(bucket_), driver_(counted_), store_(options.store),
        tier_(driver_, store_, options.url), url_(options.url) {}

  remote::Tier& tier() { return tier_; }
  /// Of a command that writes: it is known to others while it works. kInvalidArgument: the store can't keep agents.
  remote::Session& session(std::chrono::milliseconds ttl = remote::SessionOptions{}.ttl) {
    if (!session_) {
      remote::require_conditions(bucket_, url_);
      session_.emplace(driver_, remote::SessionOptions{.address = {}, .ttl = ttl, .on_end = {}});
    }
    return *session_;
  }
  remote::CountedStore::Counts counts() const { return counted_.counts(); }

 private:
  remote::CloudStore bucket_;
  remote::CountedStore counted_;
  remote::Driver driver_;
  Store store_;
  remote::Tier tier_;
  const std::string url_;
  std::optional<remote::Session> session_;
};

Json traffic(const remote::CountedStore::Counts& counts, const remote::CountedStore::Counts& before = {}) {
  return Json{{"puts", counts.puts - before.puts},
              {"gets", counts.gets - before.gets},
              {"lists", counts.lists - before.lists},
              {"removals", counts.removals - before.removals},
              {"bytes_sent", counts.bytes_sent - before.bytes_sent},
              {"bytes_received", counts.bytes_received - before.bytes_received}};
}

int push(const RemoteOptions& options) {
  for (const std::string& id : options.ids) (void)open_store_of(options.store, id)->agent_info(id);
  Attached attached(options);
  remote::Session& session = attached.session();
  for (const std::string& id : options.ids) {
    const auto before = attached.counts();
    const remote::Saved saved = attached.tier().push(session, id, options.force);
    const auto counts = attached.counts();
    const int64_t shared = int64_t(saved.keys.size()) - saved.uploaded;
    if (options.json) {
      print_json(Json{{"agent", id}, {"save", saved.version.head.file}, {"objects_sent", saved.uploaded},
                      {"objects_there", shared}, {"requests", traffic(counts, before)}});
    } else {
      print(id + ": sent " + human_bytes(counts.bytes_sent - before.bytes_sent) + " in " +
            std::to_string(saved.uploaded) + " objects; " + std::to_string(shared) + " were there\n");
    }
  }
  return 0;
}

int pull(const RemoteOptions& options) {
  Attached attached(options);
  bool intact = true;
  for (const std::string& id : options.ids) {
    const auto before = attached.counts();
    const remote::Pulled pulled = attached.tier().pull(id, options.force, {.check = options.check});
    intact = intact && pulled.damaged.empty();
    if (options.json) {
      Json damaged = Json::array();
      for (const auto& [key, problem] : pulled.damaged) damaged.push_back(Json{{"key", key}, {"problem", problem}});
      print_json(Json{{"agent", id}, {"save", pulled.version.head.file}, {"objects_read", pulled.objects},
                      {"bytes_read", pulled.bytes}, {"dropped", pulled.dropped}, {"damaged", damaged},
                      {"requests", traffic(attached.counts(), before)}});
      continue;
    }
    std::string text = id + ": brought " + std::to_string(pulled.objects) + " objects, " + human_bytes(pulled.bytes);
    if (pulled.dropped > 0) text += "; its rows were dropped, and its next turn computes them again";
    text += "\n";
    for (const auto& [key, problem] : pulled.damaged) text += "  " + problem + "\n";
    if (!pulled.damaged.empty()) text += "  Its next turn goes on from what is intact, and computes the rest again.\n";
    print(text);
  }
  return intact ? 0 : faces::error_mapping(ErrorCode::kCorruption).exit_code;
}

int verify(const RemoteOptions& options) {
  Attached attached(options);
  const remote::BucketReport report = attached.tier().verify();
  if (options.json) {
    Json problems = Json::array();
    for (const auto& [key, problem] : report.problems) problems.push_back(Json{{"key", key}, {"problem", problem}});
    print_json(Json{{"url", options.url}, {"ok", report.problems.empty()}, {"agents", report.agents},
                    {"objects", report.objects}, {"bytes", report.bytes}, {"unneeded", report.unneeded},
                    {"unneeded_bytes", report.unneeded_bytes}, {"problems", problems}});
  } else {
    std::string text;
    for (const auto& [key, problem] : report.problems) text += problem + "\n";
    text += std::to_string(report.agents) + " agents, " + std::to_string(report.objects) + " objects, " +
            human_bytes(report.bytes) + ": " +
            (report.problems.empty() ? "intact" : std::to_string(report.problems.size()) + " damaged");
    if (report.unneeded > 0) {
      text += "; " + std::to_string(report.unneeded) + " objects (" + human_bytes(report.unneeded_bytes) +
              ") are named by no agent";
    }
    print(text + "\n");
  }
  return report.problems.empty() ? 0 : faces::error_mapping(ErrorCode::kCorruption).exit_code;
}

int gc(const RemoteOptions& options) {
  Attached attached(options);
  const remote::Swept swept = attached.session(remote::kSweeperTtl).sweep_bucket();
  using Outcome = remote::Swept::Outcome;
  if (swept.outcome == Outcome::kBusy || swept.outcome == Outcome::kReplaced) {
    throw Error(ErrorCode::kBusy, "Another sweep of " + options.url + " is under way; nothing was removed.");
  }
  if (swept.outcome == Outcome::kWaited) {
    throw Error(ErrorCode::kBusy, "A worker's save to " + options.url +
                                      " has been under way for a minute; nothing was removed, try again later.");
  }
  if (options.json) {
    print_json(Json{{"url", options.url}, {"objects_removed", swept.objects}, {"bytes_freed", swept.bytes},
                    {"agents_freed", swept.freed}});
  } else {
    print("removed " + std::to_string(swept.objects) + " objects, " + human_bytes(swept.bytes) + "\n");
  }
  return 0;
}

int archive(const RemoteOptions& options) {
  Attached attached(options);
  std::vector<std::string> ids = options.ids;
  if (options.idle_days) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const auto before = now - std::chrono::hours(24) * *options.idle_days;
    for (const auto& [agent, written] : attached.tier().agents()) {
      if (std::chrono::milliseconds(written) <= before) ids.push_back(agent);
    }
  }
  Json agents = Json::array();
  std::string text;
  for (const std::string& id : ids) {
    using Outcome = remote::Archived::Outcome;
    const remote::Archived archived = attached.tier().archive(attached.session(), id);
    if (archived.outcome == Outcome::kAbsent) {
      throw Error(ErrorCode::kNotFound, "There is no agent '" + id + "' in " + options.url + ".").with_agent(id);
    }
    if (archived.outcome == Outcome::kBusy && !options.idle_days) {
      throw Error(ErrorCode::kBusy, "The agent '" + id + "' is awake on another machine; let it go to sleep first.")
          .with_agent(id);
    }
    agents.push_back(Json{{"agent", id}, {"dropped", archived.dropped}, {"busy", archived.outcome == Outcome::kBusy}});
    text += id + ": ";
    text += archived.outcome == Outcome::kBusy      ? "is awake\n"
            : archived.outcome == Outcome::kNothing ? "has no rows in the bucket\n"
                                                    : "dropped " + std::to_string(archived.dropped) + " objects\n";
  }
  if (options.json) {
    print_json(Json{{"url", options.url}, {"agents", agents}});
  } else {
    print(text.empty() ? "no agent has been idle for so long\n" : text);
  }
  return 0;
}

}  // namespace

void add_remote_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<RemoteOptions>();
  CLI::App* remote = app.add_subcommand("remote", "Keep agents in a store of objects, which several machines share");
  remote->require_subcommand(1);
  const auto add = [&](const char* name, const char* what, int (*run)(const RemoteOptions&)) {
    CLI::App* command = remote->add_subcommand(name, what);
    command->add_option("URL", options->url, "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX")
        ->required();
    command->add_option("--timeout", options->timeout, "Seconds for which a request is tried again (default: 10)")
        ->type_name("S")
        ->check(CLI::Range(0.0, 86400.0));
    command->add_flag("--json", options->json, "Print a JSON object");
    command->callback([&invocation, options, run] {
      invocation.run = [&invocation, options, run] {
        options->store = invocation.store;
        return run(*options);
      };
    });
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
  const auto add_sealed = [&](const char* name, const char* what, int (*run)(const RemoteOptions&)) {
    CLI::App* command = add(name, what, run);
    add_key_command_option(*command, options->key_command);
    return command;
  };
  add_sealed("ls", "List the objects below PREFIX", list);
  const auto with_ids = [&](CLI::App* command) {
    return command->add_option("ID", options->ids, "Agents");
  };
  CLI::App* pushed =
      add_sealed("push", "Send agents' last saves to the bucket: what is there already is not sent", push);
  with_ids(pushed)->required();
  pushed->add_flag("--force", options->force, "Whatever the bucket has of the agent is replaced");
  CLI::App* pulled =
      add_sealed("pull", "Bring agents from the bucket into the store: what is here already is not read", pull);
  with_ids(pulled)->required();
  pulled->add_flag("--force", options->force, "Changes of the store's copy are dropped");
  pulled->add_flag("--check", options->check, "Read what is here already, and replace what is damaged");
  add_sealed("verify", "Read every object that an agent needs, and check every byte", verify);
  add_sealed("gc", "Remove objects that no agent needs, beside workers that save", gc);
  CLI::App* archived = add_sealed("archive", "Drop agents' rows from the bucket: ids and messages stay", archive);
  CLI::Option* idle = archived->add_option("--idle-days", options->idle_days, "All that were not saved for N days")
                          ->type_name("N")
                          ->check(CLI::Range(0, 36500));
  with_ids(archived)->excludes(idle);
}

}  // namespace torpor::cli
