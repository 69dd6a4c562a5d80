/// ls, show, rm, du.

#include <algorithm>
#include <map>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/output.h"
#include "torpor/agents.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

const char* state_of(const Store& store, const AgentInfo& info) {
  return store.is_awake(info.agent_id) ? "awake" : "asleep";
}

Json summary_json(const Store& store, const AgentInfo& info) {
  return Json{{"agent", info.agent_id},           {"model", info.model},     {"cache_size", info.cache_size},
              {"bytes", info.bytes},              {"hash", info.hash},       {"created_at", info.created_at},
              {"updated_at", info.updated_at},    {"damaged", info.hash.empty()},
              {"state", state_of(store, info)},   {"pinned", is_pinned(info)}};
}

/// An agent's conversation. What is nested deeper than any message is left out: printing recurses as deep as the value.
Json messages_of(const Store& store, const std::string& id) {
  constexpr int kDeepest = 64;
  const auto shallow = [](int depth, Json::parse_event_t, Json&) { return depth <= kDeepest; };
  Json messages = Json::array();
  for (const StoredMessage& message : store.agent_messages(id)) {
    Json parsed = Json::parse(message.json, shallow, false);
    if (parsed.is_object()) messages.push_back(std::move(parsed));
  }
  return messages;
}

/// What its tokens and rows were made with, beside what must match.
std::vector<std::pair<std::string, std::string>> origin_of(const AgentInfo& info) {
  return {{"numerics", info.lineage.numerics()},
          {"tokenizer", info.conversation.tokenizer},
          {"chat_template", info.conversation.chat_template}};
}

std::string text_of(const Json& message, const char* key) {
  const auto it = message.is_object() ? message.find(key) : message.end();
  if (!message.is_object() || it == message.end()) return "";
  return it->is_string() ? it->get<std::string>() : it->dump(-1, ' ', false, Json::error_handler_t::replace);
}

/// Of each agent's bytes those in segments that another one names too. Segments of one agent are of one size but for a few
/// bytes of header, so nothing but the list is looked at.
std::map<std::string, int64_t> shared_bytes(const std::vector<AgentInfo>& agents) {
  std::map<std::string_view, int> named;
  for (const AgentInfo& info : agents) {
    for (const std::string& segment : info.segments) ++named[segment];
  }
  std::map<std::string, int64_t> shared;
  for (const AgentInfo& info : agents) {
    const auto n = std::count_if(info.segments.begin(), info.segments.end(), [&](const auto& segment) { return named[segment] > 1; });
    // Wide: `bytes` is what a sidecar claims.
    if (n > 0) shared[info.agent_id] = int64_t(__int128(info.bytes - info.tail_bytes) * n / ssize(info.segments));
  }
  return shared;
}

int list(const std::filesystem::path& root, bool json) {
  const auto store = open_existing_store(root);
  const std::vector<AgentInfo> agents = store ? store->list_cached_agents() : std::vector<AgentInfo>{};
  std::map<std::string, int64_t> shared = shared_bytes(agents);
  if (json) {
    Json all = Json::array();
    for (const AgentInfo& info : agents) {
      Json one = summary_json(*store, info);
      one["own_bytes"] = info.bytes - shared[info.agent_id];
      one["shared_bytes"] = shared[info.agent_id];
      all.push_back(std::move(one));
    }
    print_json(all);
    return 0;
  }
  if (agents.empty()) {
    print("no agents in " + root.string() + "\n");
    return 0;
  }
  std::vector<std::vector<std::string>> rows{{"AGENT", "TOKENS", "OWN", "SHARED", "STATE", "AGE", "MODEL"}};
  for (const AgentInfo& info : agents) {
    if (info.hash.empty()) {
      rows.push_back({info.agent_id, "-", human_bytes(info.bytes), "-", "damaged", "-", "(see torpor verify)"});
    } else {
      rows.push_back({info.agent_id, std::to_string(info.cache_size), human_bytes(info.bytes - shared[info.agent_id]),
                      human_bytes(shared[info.agent_id]), std::string(state_of(*store, info)) + (is_pinned(info) ? ", pinned" : ""),
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
  for (const auto& [name, value] : info.identity.fields()) rows.push_back({name, value});
  for (const auto& [name, value] : origin_of(info)) rows.push_back({name, value});
  std::string text = table(rows, {false, false});
  for (const Json& message : messages) {
    text += "\n[" + text_of(message, "role") + "]\n" + text_of(message, "content") + "\n";
  }
  print(text);
  return 0;
}

int disk_usage(const std::filesystem::path& root, bool json) {
  const auto store = open_existing_store(root);
  const DiskUsage usage = store ? store->get_cache_disk_usage() : DiskUsage{};
  if (json) {
    print_json(Json{{"agents", usage.agents},
                    {"agent_bytes", usage.agent_bytes},
                    {"segments", usage.segments},
                    {"segment_bytes", usage.segment_bytes},
                    {"orphan_segments", usage.orphan_segments},
                    {"orphan_bytes", usage.orphan_bytes},
                    {"total_bytes", usage.total_bytes},
                    {"bytes_written", usage.bytes_written}});
    return 0;
  }
  print(table({{"", "FILES", "SIZE"},
               {"agents", std::to_string(usage.agents), human_bytes(usage.agent_bytes)},
               {"segments", std::to_string(usage.segments), human_bytes(usage.segment_bytes)},
               {"  of no agent (gc frees them)", std::to_string(usage.orphan_segments), human_bytes(usage.orphan_bytes)},
               {"total", "", human_bytes(usage.total_bytes)},
               {"written since it was made", "", human_bytes(usage.bytes_written)}},
              {false, true, true}));
  return 0;
}

}  // namespace

void add_agent_commands(CLI::App& app, Invocation& invocation) {
  struct Options {
    std::string id;
    bool json = false, force = false;
  };
  const auto options = std::make_shared<Options>();

  CLI::App* ls = app.add_subcommand("ls", "List the agents");
  ls->add_flag("--json", options->json, "Print a JSON array");
  ls->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return list(invocation.store, options->json); };
  });

  CLI::App* show_app = app.add_subcommand("show", "Show an agent and its conversation");
  show_app->add_option("ID", options->id, "The agent")->required()->type_name("");
  show_app->add_flag("--json", options->json, "Print a JSON object");
  show_app->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return show(invocation.store, options->id, options->json); };
  });

  CLI::App* rm = app.add_subcommand("rm", "Remove an agent from disk");
  rm->add_option("ID", options->id, "The agent")->required()->type_name("");
  rm->add_flag("--force", options->force, "Whatever its file holds: what is not Torpor's, or another agent that was renamed by hand");
  rm->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      open_store_of(invocation.store, options->id)->delete_agent_cache(options->id, options->force);
      return 0;
    };
  });

  CLI::App* du = app.add_subcommand("du", "Show how much disk the store uses");
  du->add_flag("--json", options->json, "Print a JSON object");
  du->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return disk_usage(invocation.store, options->json); };
  });
}

}  // namespace torpor::cli
