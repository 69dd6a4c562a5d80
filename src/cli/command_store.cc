/// verify, repair, gc, limits, export, import.

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "cli/output.h"
#include "faces/error_table.h"
#include "torpor/agents.h"
#include "torpor/engine.h"
#include "torpor/error.h"
#include "torpor/exchange.h"
#include "torpor/model_info.h"

namespace torpor::cli {
namespace {

int verify(const std::filesystem::path& root, const std::optional<std::string>& id, bool json) {
  const auto store = id ? open_store_of(root, *id) : open_existing_store(root);
  const std::vector<VerifyReport> reports = store ? store->verify(id) : std::vector<VerifyReport>{};
  const std::vector<TeamReport> teams = store && !id ? store->verify_teams() : std::vector<TeamReport>{};
  bool ok = true, damaged = false;
  for (const VerifyReport& report : reports) {
    ok = ok && report.problems.empty();
    damaged = damaged || (report.readable && !report.problems.empty());
  }
  for (const TeamReport& report : teams) {
    if (report.problem.empty()) continue;
    ok = false;
    damaged = true;
  }
  if (json) {
    Json agents = Json::array();
    for (const VerifyReport& report : reports) {
      agents.push_back(Json{{"agent", report.agent_id},
                            {"readable", report.readable},
                            {"intact_tokens", report.intact_tokens},
                            {"problems", report.problems}});
    }
    Json object{{"ok", ok}, {"agents", agents}};
    if (!id) {
      object["teams"] = Json::array();
      for (const TeamReport& report : teams) {
        object["teams"].push_back(Json{{"team", report.team}, {"problem", report.problem}});
      }
    }
    print_json(object);
  } else {
    std::string text;
    for (const VerifyReport& report : reports) {
      const std::string tokens = std::to_string(report.intact_tokens) + " tokens";
      text += report.agent_id + ": " +
              (report.problems.empty() ? "intact, " + tokens
               : report.readable       ? "damaged, " + tokens + " intact"
                                       : std::string("not readable")) +
              "\n";
      for (const std::string& problem : report.problems) text += "  " + problem + "\n";
    }
    for (const TeamReport& report : teams) {
      text += "team " + report.team + ": " + (report.problem.empty() ? "intact\n" : "damaged\n  " + report.problem + "\n");
    }
    print(text.empty() ? "no agents in " + root.string() + "\n" : text);
  }
  return ok ? 0 : faces::error_mapping(damaged ? ErrorCode::kCorruption : ErrorCode::kIo).exit_code;
}

/// The same of a model, and of what is kept of it to start sooner.
int verify_model_files(const std::string& model, bool json) {
  const ModelReport report = verify_model(model);
  const bool ok = report.problems.empty();
  if (json) {
    print_json(Json{{"ok", ok},
                    {"model", model},
                    {"weights_known", report.weights_known},
                    {"packed", report.packed},
                    {"problems", report.problems}});
  } else {
    const bool nothing = !report.weights_known && !report.packed;
    std::string text = model + ": " + (!ok ? "damaged" : nothing ? "nothing is known to compare with" : "intact") + "\n";
    for (const std::string& problem : report.problems) text += "  " + problem + "\n";
    print(text);
  }
  return ok ? 0 : faces::error_mapping(ErrorCode::kCorruption).exit_code;
}

/// Cuts a damaged agent to its longest intact prefix, without its model.
int repair(const std::filesystem::path& root, const std::string& id, bool json) {
  const auto store = open_store_of(root, id);
  const VerifyReport report = store->verify(id).at(0);
  const int64_t held = report.problems.empty() ? report.intact_tokens : store->agent_info(id).cache_size;
  if (!report.problems.empty()) {
    if (report.intact_tokens == 0) {
      throw Error(ErrorCode::kCorruption, "nothing of agent '" + id + "' is intact; its next turn, or torpor rebuild, computes it again "
                                          "from its tokens");
    }
    rewind_agent(*store, id, report.intact_tokens);
  }
  if (json) {
    print_json(Json{{"agent", id}, {"tokens", report.intact_tokens}, {"tokens_before", held}, {"problems", report.problems}});
  } else {
    print(report.problems.empty() ? id + " is intact\n"
                                  : id + " keeps the " + std::to_string(report.intact_tokens) + " intact of " + std::to_string(held) +
                                        " tokens\n");
  }
  return 0;
}

int collect_garbage(const std::filesystem::path& root, bool dry_run, bool json) {
  const auto store = open_existing_store(root);
  const GcResult result = store ? store->gc(dry_run) : GcResult{};
  const ModelCacheUsage packed = clean_model_cache(!dry_run);
  if (json) {
    print_json(Json{{"files_removed", result.files_removed},
                    {"bytes_freed", result.bytes_freed},
                    {"packed_files_removed", packed.stale_files},
                    {"packed_bytes_freed", packed.stale_bytes},
                    {"dry_run", dry_run}});
    return 0;
  }
  const std::string verb = dry_run ? "would remove " : "removed ";
  print(verb + std::to_string(result.files_removed) + " files, " + human_bytes(result.bytes_freed) + "\n");
  if (packed.stale_files > 0) {
    print(verb + "packed weights of models that are gone: " + std::to_string(packed.stale_files) + " files, " +
          human_bytes(packed.stale_bytes) + "\n");
  }
  return 0;
}

/// Shows the limits that the store keeps; changes first those that are given.
int limits(const std::filesystem::path& root, std::optional<int64_t> disk_budget, std::optional<int64_t> min_free, bool json) {
  const bool change = disk_budget || min_free;
  const auto store = change ? std::make_unique<Store>(root) : open_existing_store(root);
  DiskLimits kept = store ? store->kept_disk_limits() : DiskLimits{};
  if (change) {
    kept = {disk_budget.value_or(kept.budget), min_free.value_or(kept.min_free)};
    store->keep_disk_limits(kept);
  }
  if (json) {
    print_json(Json{{"disk_budget", kept.budget}, {"min_free", kept.min_free}});
    return 0;
  }
  const auto shown = [](int64_t bytes) { return bytes > 0 ? human_bytes(bytes) : std::string("no bound"); };
  print(table({{"disk budget", shown(kept.budget)}, {"min free", shown(kept.min_free)}}, {false, true}));
  return 0;
}

/// Writes as `--format` says; unless it says anything, as Torpor's own export. What is there already is replaced only by force:
/// a .json beside weights is a model's config.
int export_file(Store& store, const std::string& id, const std::filesystem::path& file, const std::string& format,
                const std::string& model, bool force, bool json) {
  store.agent_info(id);
  std::vector<std::filesystem::path> written{file};
  if (format == "torpor") written.push_back(std::filesystem::path(file).replace_extension(".json"));
  for (const auto& path : written) {
    std::error_code error;
    if (force || !std::filesystem::is_regular_file(path, error)) continue;
    throw Error(ErrorCode::kInvalidArgument, "'" + path.string() + "' is there already; choose another name, or replace it with --force");
  }
  if (format == "torpor") {
    store.export_agent(id, file);
  } else {
    export_prompt_cache(store, id, file, mlx_lm_rotates_windows,
                        format == "mlx-lm" ? PromptCacheDialect::kNew : PromptCacheDialect::kOld,
                        [&](const AgentInfo& agent) { return agent_keys(agent, model); });
  }
  int64_t bytes = 0;
  std::vector<std::string> names;
  for (const auto& path : written) {
    bytes += int64_t(std::filesystem::file_size(path));
    names.push_back(path.string());
  }
  if (json) {
    print_json(Json{{"agent", id}, {"files", names}, {"bytes", bytes}});
  } else {
    print("wrote " + file.string() + (names.size() > 1 ? " and its .json" : "") + ", " + human_bytes(bytes) + "\n");
  }
  return 0;
}

/// An import makes an agent, so the store may be new; what is asked for is checked before its directory is made.
int import_file(const std::filesystem::path& root, const std::filesystem::path& file, const std::string& id,
                const std::string& model, bool json) {
  check_agent_id(id);
  std::error_code error;
  if (!std::filesystem::is_regular_file(file, error)) {
    throw Error(ErrorCode::kNotFound, "can't import '" + file.string() + "': no such file");
  }
  const bool of_mlx_lm = is_prompt_cache(file);
  if (of_mlx_lm && model.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "'" + file.string() + "' is a prompt-cache file of mlx-lm, which does not say whose rows "
                                             "it holds; name the model that made it with --model");
  }
  if (!of_mlx_lm && !model.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "'" + file.string() + "' says itself whose rows it holds; leave out --model");
  }
  SaveResult result;
  if (of_mlx_lm) {
    const CacheModel described = describe_model(model);
    Store store(root);
    result = import_prompt_cache(store, file, id, described);
  } else {
    result = Store(root).import_agent(file, id);
  }
  if (json) {
    print_json(Json{{"agent", id}, {"bytes_written", result.bytes_written}});
  } else {
    print("imported " + id + ", " + human_bytes(result.bytes_written) + " written\n");
  }
  return 0;
}

}  // namespace

void add_store_commands(CLI::App& app, Invocation& invocation) {
  struct Options {
    std::string id, file, model;
    std::string format = "torpor";
    uint64_t disk_budget = 0, min_free = 0;  // bytes
    bool json = false, force = false, dry_run = false;
  };
  const auto options = std::make_shared<Options>();

  CLI::App* verify_app = app.add_subcommand("verify", "Check every byte of an agent, or of all of them");
  CLI::Option* id = verify_app->add_option("ID", options->id, "The agent (default: all)")->type_name("");
  verify_app->add_option("--model", options->model, "A model instead: its weights, and what is kept of them to start sooner")
      ->excludes(id)
      ->type_name("M");
  verify_app->add_flag("--json", options->json, "Print a JSON object");
  verify_app->callback([&invocation, options, id] {
    invocation.run = [&invocation, options, given = id->count() > 0] {
      if (!options->model.empty()) return verify_model_files(options->model, options->json);
      return verify(invocation.store, given ? std::optional(options->id) : std::nullopt, options->json);
    };
  });

  CLI::App* repair_app = app.add_subcommand("repair", "Cut a damaged agent to what is intact of it");
  repair_app->add_option("ID", options->id, "The agent")->required()->type_name("");
  repair_app->add_flag("--json", options->json, "Print a JSON object");
  repair_app->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return repair(invocation.store, options->id, options->json); };
  });

  CLI::App* gc = app.add_subcommand("gc", "Remove what no agent uses any more");
  gc->add_flag("--dry-run", options->dry_run, "Remove nothing, say what would go");
  gc->add_flag("--json", options->json, "Print a JSON object");
  gc->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return collect_garbage(invocation.store, options->dry_run, options->json); };
  });

  CLI::App* limits_app = app.add_subcommand("limits", "Show or change the limits that the store keeps for every process");
  add_size_option(*limits_app, "--disk-budget", options->disk_budget, "Most that the store may take of the disk, all models together");
  add_size_option(*limits_app, "--min-free", options->min_free, "What a save leaves free on the disk");
  limits_app->add_flag("--json", options->json, "Print a JSON object");
  limits_app->callback([&invocation, options, limits_app] {
    const auto given = [&](const char* name, uint64_t bytes) {
      return limits_app->count(name) > 0 ? std::optional(int64_t(bytes)) : std::nullopt;
    };
    invocation.run = [&invocation, options, budget = given("--disk-budget", options->disk_budget),
                      free = given("--min-free", options->min_free)] {
      return limits(invocation.store, budget, free, options->json);
    };
  });

  CLI::App* export_app = app.add_subcommand("export", "Write an agent to one self-contained file, for Torpor or for mlx-lm");
  export_app->add_option("ID", options->id, "The agent")->required()->type_name("");
  export_app->add_option("FILE", options->file, "File to write; Torpor's own has a .json beside it")
      ->required()
      ->type_name("");
  export_app->add_option("--format", options->format, "torpor, or mlx-lm: a prompt cache; mlx-lm-0.31: its older dialect")
      ->capture_default_str()
      ->check(CLI::IsMember({"torpor", "mlx-lm", "mlx-lm-0.31"}))
      ->type_name("FORMAT");
  export_app->add_option("--model", options->model, "Where the agent's model is, if it has moved")->type_name("M");
  export_app->add_flag("--force", options->force, "Replace files of that name");
  export_app->add_flag("--json", options->json, "Print a JSON object");
  export_app->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      return export_file(*open_store_of(invocation.store, options->id), options->id, options->file, options->format, options->model,
                         options->force, options->json);
    };
  });

  CLI::App* import_app = app.add_subcommand("import", "Make an agent of an exported file or of mlx-lm's prompt cache");
  import_app->add_option("FILE", options->file, "File to read")->required()->type_name("");
  import_app->add_option("ID", options->id, "The new agent")->required()->type_name("");
  import_app->add_option("--model", options->model, "Whose rows a prompt cache of mlx-lm holds")->type_name("M");
  import_app->add_flag("--json", options->json, "Print a JSON object");
  import_app->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      return import_file(invocation.store, options->file, options->id, options->model, options->json);
    };
  });
}

}  // namespace torpor::cli
