/// ls, show, rm, prune, du.

#include <algorithm>
#include <charconv>
#include <map>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/exchanges.h"
#include "cli/output.h"
#include "cli/server_notes.h"
#include "torpor/agents.h"
#include "torpor/error.h"
#include "torpor/model_info.h"

namespace torpor::cli {
namespace {

std::string state_of(const Store& store, const AgentInfo& info) {
  try {
    return store.is_awake(info.agent_id) ? "awake" : "asleep";
  } catch (const Error&) {
    return "unknown";  // whoever may not read its lock can't tell
  }
}

/// Why nothing is known of an agent whose file could not be read.
std::string trouble_of(const Store& store, const std::string& id) {
  try {
    store.agent_info(id);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) return "not readable";
  }
  return "damaged";
}

/// As people count: a2 before a10.
bool naturally_before(const std::string& a, const std::string& b) {
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  for (size_t i = 0, j = 0;;) {
    if (i == a.size() || j == b.size()) return i == a.size() && (j < b.size() || a < b);
    if (digit(a[i]) && digit(b[j])) {
      const auto number = [&digit](const std::string& text, size_t& at) {
        const size_t first = std::min(text.find_first_not_of('0', at), text.size());
        for (at = first; at < text.size() && digit(text[at]);) ++at;
        return text.substr(first, at - first);
      };
      const std::string left = number(a, i), right = number(b, j);
      if (left.size() != right.size()) return left.size() < right.size();
      if (left != right) return left < right;
    } else {
      if (a[i] != b[j]) return a[i] < b[j];
      ++i, ++j;
    }
  }
}

std::vector<AgentInfo> agents_of(const Store& store) {
  std::vector<AgentInfo> agents = store.list_cached_agents();
  std::ranges::sort(agents, [](const AgentInfo& a, const AgentInfo& b) { return naturally_before(a.agent_id, b.agent_id); });
  return agents;
}

Json summary_json(const Store& store, const AgentInfo& info) {
  return Json{{"agent", info.agent_id},           {"model", info.model},     {"cache_size", info.cache_size},
              {"bytes", info.bytes},              {"hash", info.hash},       {"created_at", info.created_at},
              {"updated_at", info.updated_at},    {"damaged", info.hash.empty()},
              {"state", state_of(store, info)},   {"pinned", is_pinned(info)}};
}

/// What its tokens and rows were made with, beside what must match.
std::vector<std::pair<std::string, std::string>> origin_of(const AgentInfo& info) {
  return {{"numerics", info.lineage.numerics()},
          {"tokenizer", info.conversation.tokenizer},
          {"chat_template", info.conversation.chat_template}};
}

/// Bytes of each agent that are shared with another agent. An estimate: it assumes that all segments of an agent have
/// the same size.
std::map<std::string, int64_t> shared_bytes(const std::vector<AgentInfo>& agents) {
  std::map<std::string_view, int> named;
  for (const AgentInfo& info : agents) {
    for (const std::string& segment : info.segments) ++named[segment];
  }
  std::map<std::string, int64_t> shared;
  for (const AgentInfo& info : agents) {
    const auto n = std::count_if(info.segments.begin(), info.segments.end(), [&](const auto& segment) { return named[segment] > 1; });
    // Wide: `bytes` is what a sidecar claims.
    if (n > 0) shared[info.agent_id] = int64_t(__int128(info.bytes - info.tail_bytes - info.state_bytes) * n /
                                                       ssize(info.segments));
  }
  return shared;
}

int list(const std::filesystem::path& root, bool json, bool ids_only) {
  const auto store = open_existing_store(root);
  const std::vector<AgentInfo> agents = store ? agents_of(*store) : std::vector<AgentInfo>{};
  if (ids_only) {
    std::string ids;
    for (const AgentInfo& info : agents) ids += info.agent_id + "\n";
    print(ids);
    return 0;
  }
  std::map<std::string, std::string> servers;  // of agents that are awake in one
#ifdef TORPOR_SERVER
  if (!agents.empty()) servers = agents_in_servers(root);
#endif
  std::map<std::string, int64_t> shared = shared_bytes(agents);
  const std::vector<int64_t> missing = store ? store->count_missing_files(agents) : std::vector<int64_t>{};
  if (json) {
    Json all = Json::array();
    for (const AgentInfo& info : agents) {
      Json one = summary_json(*store, info);
      one["own_bytes"] = info.bytes - shared[info.agent_id];
      one["shared_bytes"] = shared[info.agent_id];
      one["missing_files"] = missing[all.size()];
      const auto server = servers.find(info.agent_id);
      one["server"] = server == servers.end() ? Json() : Json(server->second);
      all.push_back(std::move(one));
    }
    print_json(all);
    return 0;
  }
  if (agents.empty()) {
    print((store ? "no agents in " : "no agents: there is no directory ") + root.string() + "\n");
    return 0;
  }
  std::vector<std::vector<std::string>> rows{{"AGENT", "TOKENS", "OWN", "SHARED", "STATE", "AGE", "MODEL"}};
  for (const AgentInfo& info : agents) {
    const int64_t lost = missing[rows.size() - 1];
    if (info.hash.empty()) {
      rows.push_back({info.agent_id, "-", human_bytes(info.bytes), "-", trouble_of(*store, info.agent_id), "-",
                      "(see torpor verify)"});
    } else {
      rows.push_back({info.agent_id, std::to_string(info.cache_size), human_bytes(info.bytes - shared[info.agent_id]),
                      human_bytes(shared[info.agent_id]),
                      state_of(*store, info) + (servers.count(info.agent_id) ? " in " + servers[info.agent_id] : "") +
                          (is_pinned(info) ? ", pinned" : "") +
                          (lost > 0 ? ", " + std::to_string(lost) + " files missing" : ""),
                      human_age(info.updated_at), info.model});
    }
  }
  print(table(rows, {false, true, true, true, false, true, false}));
  return 0;
}

int show(const std::filesystem::path& root, const std::string& id, bool json) {
  const auto store = open_store_of(root, id);
  const AgentInfo info = store->agent_info(id);
  const Json messages = messages_of(*store, id);
  if (json) {
    Json object = summary_json(*store, info);
    object["tail_bytes"] = info.tail_bytes;
    object["segments"] = info.segments;
    object["parts"] = info.parts;
    if (info.states) {
      object["states"] = Json::array();
      for (const auto& [position, file] : *info.states) object["states"].push_back({{"position", position}, {"file", file}});
    }
    Json identity = Json::object();
    for (const auto& [name, value] : info.identity.fields()) identity[name] = value;
    object["identity"] = identity;
    for (const auto& [name, value] : origin_of(info)) object[name] = value;
    Json user = Json::object();
    for (const auto& [key, value] : info.user) user[key] = value;
    object["user"] = user;
    Json record = Json::object();
    for (const auto& [key, value] : info.record) record[key] = value;
    object["record"] = record;
    object["messages"] = messages;
    Json exchanges = Json::array();
    for (const Exchange& exchange : exchanges_of(*store, id)) exchanges.push_back({{"begin", exchange.begin}, {"end", exchange.end}});
    object["exchanges"] = exchanges;
    print_json(object);
    return 0;
  }
  std::vector<std::vector<std::string>> rows{
      {"agent", info.agent_id},
      {"model", info.model},
      {"tokens", std::to_string(info.cache_size)},
      {"size", human_bytes(info.bytes) + " (" + human_bytes(info.tail_bytes) + " of its own, " +
                   std::to_string(info.segments.size()) + " segments)"},
      {"created", info.created_at},
      {"updated", info.updated_at},
      {"hash", info.hash}};
  // Where a program saved a cache of its own, nothing is known of the model.
  const auto add = [&rows](const auto& fields) {
    for (const auto& [name, value] : fields) {
      if (!value.empty()) rows.push_back({name, value});
    }
  };
  add(info.identity.fields());
  add(origin_of(info));
  std::string text = table(rows, {false, false});
  const std::vector<Exchange> exchanges = exchanges_of(*store, id);
  size_t begun = 0;
  for (const Json& message : messages) {
    const std::string role = text_of(message, "role");
    text += "\n[" + role + "]";
    if (role == "user" && begun < exchanges.size()) {
      const Exchange& exchange = exchanges[begun++];
      text += " exchange " + std::to_string(begun) + ", tokens " + std::to_string(exchange.begin) + " to " +
              std::to_string(exchange.end);
    }
    text += "\n" + text_of(message, "content") + "\n";
  }
  print(text);
  return 0;
}

/// Removes what is named, in order. Of several nothing is removed when one is not there.
int remove(const std::filesystem::path& root, const std::vector<std::string>& ids, bool force, bool json) {
  std::unique_ptr<Store> store;
  for (const std::string& id : ids) {
    store = open_store_of(root, id);
    if (ids.size() > 1 && !store->contains(id) && !force) store->agent_info(id);  // says that it is not there
  }
  for (const std::string& id : ids) {
    store->delete_agent_cache(id, force);
    if (!json) print("removed " + id + "\n");
  }
  if (json) print_json(Json{{"removed", ids}});
  return 0;
}

/// "12h", "30d", "2w" in seconds. kInvalidArgument.
int64_t parse_age(const std::string& text) {
  static const std::map<char, int64_t> kUnits{{'s', 1}, {'m', 60}, {'h', 3600}, {'d', 86400}, {'w', 7 * 86400}};
  int64_t n = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, n);
  const auto unit = rest + 1 == end ? kUnits.find(*rest) : kUnits.end();
  if (error != std::errc() || unit == kUnits.end() || n < 0 || n > 1'000'000'000) {
    throw Error(ErrorCode::kInvalidArgument, "'" + text + "' is no age; give a whole number and s, m, h, d or w, as 30d");
  }
  return n * unit->second;
}

/// Removes agents that were last saved so long ago. Those that are pinned, awake or damaged stay.
int prune(const std::filesystem::path& root, const std::string& older_than, bool dry_run, bool json) {
  const int64_t age = parse_age(older_than);
  const auto store = open_existing_store(root);
  std::vector<std::string> removed;
  for (const AgentInfo& info : store ? agents_of(*store) : std::vector<AgentInfo>{}) {
    const std::optional<int64_t> seconds = age_in_seconds(info.updated_at);
    if (info.hash.empty() || !seconds || *seconds < age || is_pinned(info) || state_of(*store, info) != "asleep") continue;
    if (!dry_run) store->delete_agent_cache(info.agent_id);
    removed.push_back(info.agent_id);
    if (json) continue;
    print((dry_run ? "would remove " : "removed ") + info.agent_id + ", last saved " + human_age(info.updated_at) + " ago\n");
  }
  if (json) {
    print_json(Json{{"removed", removed}, {"dry_run", dry_run}});
  } else if (removed.empty()) {
    print("no agent is that old\n");
  }
  return 0;
}

int disk_usage(const std::filesystem::path& root, bool json) {
  const auto store = open_existing_store(root);
  const DiskUsage usage = store ? store->get_cache_disk_usage() : DiskUsage{};
  const ModelCacheUsage packed = clean_model_cache();
  if (json) {
    print_json(Json{{"agents", usage.agents},
                    {"agent_bytes", usage.agent_bytes},
                    {"segments", usage.segments},
                    {"segment_bytes", usage.segment_bytes},
                    {"orphan_segments", usage.orphan_segments},
                    {"states", usage.states},
                    {"state_bytes", usage.state_bytes},
                    {"orphan_states", usage.orphan_states},
                    {"orphan_bytes", usage.orphan_bytes},
                    {"records", usage.records},
                    {"record_bytes", usage.record_bytes},
                    {"teams", usage.teams},
                    {"team_bytes", usage.team_bytes},
                    {"temporary_files", usage.temporary_files},
                    {"temporary_bytes", usage.temporary_bytes},
                    {"total_bytes", usage.total_bytes},
                    {"bytes_written", usage.bytes_written},
                    {"packed_files", packed.files},
                    {"packed_bytes", packed.bytes}});
    return 0;
  }
  print(table({{"", "FILES", "SIZE"},
               {"agents", std::to_string(usage.agents), human_bytes(usage.agent_bytes)},
               {"segments", std::to_string(usage.segments), human_bytes(usage.segment_bytes)},
               {"states", std::to_string(usage.states), human_bytes(usage.state_bytes)},
               {"  of no agent (gc frees them)", std::to_string(usage.orphan_segments + usage.orphan_states),
                human_bytes(usage.orphan_bytes)},
               {"records (answers that a server keeps)", std::to_string(usage.records), human_bytes(usage.record_bytes)},
               {"teams", std::to_string(usage.teams), human_bytes(usage.team_bytes)},
               {"unfinished (gc frees those of killed saves)", std::to_string(usage.temporary_files),
                human_bytes(usage.temporary_bytes)},
               {"total", "", human_bytes(usage.total_bytes)},
               {"written since it was made", "", human_bytes(usage.bytes_written)},
               {"packed weights, outside the store", std::to_string(packed.files), human_bytes(packed.bytes)}},
              {false, true, true}));
  return 0;
}

}  // namespace

void add_agent_commands(CLI::App& app, Invocation& invocation) {
  struct Options {
    std::string id, older_than;
    std::vector<std::string> ids;
    bool json = false, force = false, ids_only = false, dry_run = false;
  };
  const auto options = std::make_shared<Options>();

  CLI::App* ls = app.add_subcommand("ls", "List the agents");
  ls->add_flag("--json", options->json, "Print a JSON array");
  ls->add_flag("-q,--quiet", options->ids_only, "Print their names alone, one a line");
  ls->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return list(invocation.store, options->json, options->ids_only); };
  });

  CLI::App* show_app = app.add_subcommand("show", "Show an agent and its conversation");
  show_app->add_option("ID", options->id, "The agent")->required()->type_name("");
  show_app->add_flag("--json", options->json, "Print a JSON object");
  show_app->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return show(invocation.store, options->id, options->json); };
  });

  CLI::App* rm = app.add_subcommand("rm", "Remove agents from disk");
  rm->add_option("ID", options->ids, "The agents")->required()->type_name("");
  rm->add_flag("--force", options->force, "Whatever its file holds: what is not Torpor's, or another agent that was renamed by hand");
  rm->add_flag("--json", options->json, "Print a JSON object");
  rm->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return remove(invocation.store, options->ids, options->force, options->json); };
  });

  CLI::App* prune_app = app.add_subcommand("prune", "Remove agents that were not used for long");
  prune_app->add_option("--older-than", options->older_than, "Their age, as 12h, 30d or 2w")->required()->type_name("AGE");
  prune_app->add_flag("--dry-run", options->dry_run, "Remove nothing, say what would go");
  prune_app->add_flag("--json", options->json, "Print a JSON object");
  prune_app->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      return prune(invocation.store, options->older_than, options->dry_run, options->json);
    };
  });

  CLI::App* du = app.add_subcommand("du", "Show how much disk the store uses");
  du->add_flag("--json", options->json, "Print a JSON object");
  du->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return disk_usage(invocation.store, options->json); };
  });
}

}  // namespace torpor::cli
