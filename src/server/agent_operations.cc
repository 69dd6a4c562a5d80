/// What /torpor/v1/agents and the dashboard's routes answer.

#include <algorithm>

#include "server/operations.h"
#include "server/overview.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

Json status_json(const AgentStatus& status, const std::string& name) {
  return Json{{"agent", name},
              {"model", status.model},
              {"tokens", status.tokens},
              {"awake", status.awake},
              {"pinned", status.pinned},
              {"unsaved", status.unsaved},
              {"in_turn", status.in_turn},
              {"memory_bytes", status.memory_bytes},
              {"disk_bytes", status.disk_bytes}};
}

Reply list(const Call& call) {
  Json agents = Json::array();
  for (const AgentStatus& status : call.models.agents()) {
    if (const auto name = agent_name_of(call.request.tenant, status.agent))
      agents.push_back(status_json(status, *name));
  }
  return {200, Json{{"agents", std::move(agents)}}};
}

[[noreturn]] void refuse_absent(const std::string& name) {
  throw Error(ErrorCode::kNotFound, "there is no agent '" + name + "'").with_agent(name);
}

/// Null stands for a turn that was streamed.
Reply turn_answer(Json result, int status) {
  const bool said = result.is_null();
  return {status, std::move(result), said};
}

Json shown(const Call& call, const std::string& id, const std::string& name) {
  const std::vector<AgentStatus> all = call.engine.agents();
  const auto found =
      std::find_if(all.begin(), all.end(), [&](const AgentStatus& status) { return status.agent == id; });
  if (found == all.end()) refuse_absent(name);
  Json shown = status_json(*found, name);
  if (call.engine.store().contains(id)) {
    const AgentInfo info = call.engine.store().agent_info(id);
    shown["created_at"] = info.created_at;
    shown["updated_at"] = info.updated_at;
    shown["segments"] = info.segments.size();
    shown["own_bytes"] = info.tail_bytes;
  }
  return shown;
}

Reply show(const Call& call) { return {200, shown(call, call.id, call.name)}; }

Reply fork(const Call& call) {
  const std::string name = call.body.at("as");
  std::optional<int64_t> at;
  if (call.body.contains("at_token")) at = call.body["at_token"].get<int64_t>();
  call.engine.fork(call.id, call.id_of(name), at);
  return {201, shown(call, call.id_of(name), name)};
}

Reply rewind(const Call& call) {
  call.engine.rewind(call.id, call.body.at("tokens").get<int64_t>());
  return show(call);
}

Reply rename(const Call& call) {
  const std::string name = call.body.at("to");
  call.engine.rename(call.id, call.id_of(name));
  return {200, shown(call, call.id_of(name), name)};
}

Reply pin(const Call& call) {
  call.engine.pin(call.id, call.body.at("pinned").get<bool>());
  return show(call);
}

Reply sleep(const Call& call) {
  call.engine.sleep(call.id);
  return show(call);
}

Reply wake(const Call& call) {
  Json answer = shown(call, call.id, call.name);
  answer["waking"] = call.engine.prefetch(call.id);
  return {202, std::move(answer)};
}

Reply save(const Call& call) {
  const SaveResult saved = call.engine.save(call.id);
  return {200, Json{{"agent", call.name}, {"bytes_written", saved.bytes_written}}};
}

Reply remove(const Call& call) {
  call.engine.remove(call.id);
  return {204, nullptr};
}

Reply create(const Call& call) {
  const ModelPool::Lease model = call.models.model(call.body.value("model", ""));
  return turn_answer(run_agent_turn(model.engine(), call.metrics, call.named(call.body.at("agent")),
                                    TurnRequest::Presence::kNew, call.request, call.body, call.response),
                     201);
}

Reply turn(const Call& call) {
  try {
    return turn_answer(run_agent_turn(call.engine, call.metrics, call.agent(), TurnRequest::Presence::kThere,
                                      call.request, call.body, call.response),
                       200);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) refuse_absent(call.name);  // in the tenant's words
    throw;
  }
}

Reply why(const Call& call) {
  return {200, compare_messages(call.engine, call.agent(), call.body.at("messages"))};
}

Reply export_file(const Call& call) {
  send_export(call.engine, call.agent(), call.response);
  return {200, nullptr, true};
}

Reply map(const Call& call) { return {200, map_json(call.engine, call.agent())}; }
Reply now(const Call& call) { return {200, now_json(call.models, call.metrics, call.request.tenant)}; }
Reply requests(const Call& call) { return {200, requests_json(call.metrics, call.request.tenant)}; }
Reply memory(const Call& call) { return {200, memory_json(call.models, call.request.tenant)}; }

Reply describe(const Call& call);
Reply describe(const Call&) { return {200, describe_operations()}; }

}  // namespace

const std::vector<Operation>& agent_operations() {
  static const std::vector<Operation> kOperations{
      {"GET", "/agents", "listAgents", "The tenant's agents, in memory and on disk.", {}, 200, "AgentList", list},
      {"POST",
       "/agents",
       "createAgent",
       "A new agent's first turn.",
       turn_members({{"agent", "string", true, "Its name, which must be free."},
                     {"model", "string", false, "The model that answers; the server's first unless given."}}),
       201,
       "Turn",
       create},
      {"POST",
       "/agents/{agent}/turn",
       "turnAgent",
       "One message, and the answer to it. The agent is woken first, and saved afterwards.",
       turn_members({}),
       200,
       "Turn",
       turn,
       true},
      {"POST",
       "/agents/{agent}/why",
       "whyAgent",
       "Where a conversation and what the agent holds part, and how much they have in common. Nothing is computed.",
       {{"messages", "objects", true, "The whole conversation, oldest message first: `role`, `content` and so on."}},
       200,
       "Comparison",
       why,
       true},
      {"GET",
       "/agents/{agent}/export",
       "exportAgent",
       "The agent as one file, which `torpor import` reads.",
       {},
       200,
       kFile,
       export_file},
      {"GET", "/agents/{agent}", "showAgent", "One agent.", {}, 200, "Agent", show},
      {"DELETE",
       "/agents/{agent}",
       "deleteAgent",
       "Removes the agent from memory and disk. Segments that others share stay.",
       {},
       204,
       nullptr,
       remove},
      {"POST",
       "/agents/{agent}/fork",
       "forkAgent",
       "A new agent that begins with this one's first tokens; nothing is copied.",
       {{"as", "string", true, "The new agent's name."},
        {"at_token", "integer", false, "How many tokens it begins with; all unless given."}},
       201,
       "Agent",
       fork},
      {"POST",
       "/agents/{agent}/rewind",
       "rewindAgent",
       "Forgets everything after the first tokens.",
       {{"tokens", "integer", true, "How many stay."}},
       200,
       "Agent",
       rewind},
      {"POST",
       "/agents/{agent}/rename",
       "renameAgent",
       "Gives the agent another name.",
       {{"to", "string", true, "The new name, which must be free."}},
       200,
       "Agent",
       rename},
      {"POST",
       "/agents/{agent}/pin",
       "pinAgent",
       "A pinned agent stays in memory when others must make room.",
       {{"pinned", "boolean", true, "Whether it is pinned from now on."}},
       200,
       "Agent",
       pin},
      {"POST",
       "/agents/{agent}/sleep",
       "sleepAgent",
       "Saves the agent if it has changed, and lets go of its memory.",
       {},
       200,
       "Agent",
       sleep},
      {"POST",
       "/agents/{agent}/wake",
       "wakeAgent",
       "Begins to load the agent, so that its next turn finds it ready. `waking` is false where nothing was begun.",
       {},
       202,
       "Agent",
       wake,
       true},
      {"POST", "/agents/{agent}/save", "saveAgent", "Saves the agent if it has changed.", {}, 200, "Saved", save},
      {"GET",
       "/agents/{agent}/map",
       "mapAgent",
       "The agent as it was last saved: its messages, its segments, and who begins with the same ones.",
       {},
       200,
       "Map",
       map},
      {"GET", "/now", "now", "The tenant's turns under way, and what the server has computed.", {}, 200, "Now", now},
      {"GET", "/requests", "listRequests", "The tenant's last turns, at most 512 of all tenants', without their text.",
       {}, 200, "RequestList", requests},
      {"GET", "/memory", "memory", "Memory and disk. Totals are the server's, agents the tenant's.", {}, 200, "Memory",
       memory},
      {"GET", "/openapi.json", "describe", "This description of all routes.", {}, 200, "Description", describe},
  };
  return kOperations;
}

}  // namespace torpor::server
