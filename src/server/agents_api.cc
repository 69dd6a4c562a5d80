#include "server/agents_api.h"

#include <algorithm>
#include <functional>

#include "faces/error_table.h"
#include "server/agents_turn.h"
#include "server/chat.h"
#include "server/fields.h"
#include "server/keys.h"
#include "server/openapi.h"
#include "server/overview.h"
#include "torpor/version.h"

namespace torpor::server {
namespace {

using Parts = std::vector<std::string>;

/// One request, and what it names.
struct Call {
  ModelPool& models;
  Metrics& metrics;
  Engine& engine;  ///< of the agent's model, or the first
  const HttpRequest& request;
  HttpResponse& response;
  std::string name, id;  ///< of the path's agent: as the tenant knows it, as the store does
  Json body;             ///< an object; empty without one

  std::string id_of(const std::string& other) const { return agent_id_of(request.tenant, other); }
  AgentName named(const std::string& other) const {
    return {id_of(other), other, request.tenant, models.salt(request.tenant)};
  }
  AgentName agent() const { return named(name); }
};

struct Answer {
  int status = 200;
  Json body;  ///< null: none
  bool said = false;  ///< the response has it already
};

/// Of an Operation whose answer is a file.
constexpr const char* kFile = "application/octet-stream";

/// A member of a request's body.
struct Member {
  const char* name;
  const char* type;  ///< of JSON Schema
  bool required;
  const char* help;
};

struct Operation {
  const char* method;
  const char* path;  ///< below /torpor/v1; "{agent}" stands for a name
  const char* id;    ///< operationId
  const char* help;
  std::vector<Member> members;
  int status;
  const char* answer;  ///< a schema of the description, or kFile; nullptr: no body
  std::function<Answer(const Call&)> run;
  bool computes = false;  ///< needs the agent's own model
};

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

Answer list(const Call& call) {
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
Answer turn_answer(Json result, int status) {
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

Answer show(const Call& call) { return {200, shown(call, call.id, call.name)}; }

Answer fork(const Call& call) {
  const std::string name = call.body.at("as");
  std::optional<int64_t> at;
  if (call.body.contains("at_token")) at = call.body["at_token"].get<int64_t>();
  call.engine.fork(call.id, call.id_of(name), at);
  return {201, shown(call, call.id_of(name), name)};
}

Answer rewind(const Call& call) {
  call.engine.rewind(call.id, call.body.at("tokens").get<int64_t>());
  return show(call);
}

Answer rename(const Call& call) {
  const std::string name = call.body.at("to");
  call.engine.rename(call.id, call.id_of(name));
  return {200, shown(call, call.id_of(name), name)};
}

Answer pin(const Call& call) {
  call.engine.pin(call.id, call.body.at("pinned").get<bool>());
  return show(call);
}

Answer sleep(const Call& call) {
  call.engine.sleep(call.id);
  return show(call);
}

Answer wake(const Call& call) {
  Json answer = shown(call, call.id, call.name);
  answer["waking"] = call.engine.prefetch(call.id);
  return {202, std::move(answer)};
}

Answer save(const Call& call) {
  const SaveResult saved = call.engine.save(call.id);
  return {200, Json{{"agent", call.name}, {"bytes_written", saved.bytes_written}}};
}

Answer remove(const Call& call) {
  call.engine.remove(call.id);
  return {204, nullptr};
}

Answer create(const Call& call) {
  const ModelPool::Lease model = call.models.model(call.body.value("model", ""));
  return turn_answer(run_agent_turn(model.engine(), call.metrics, call.named(call.body.at("agent")),
                                    TurnRequest::Presence::kNew, call.request, call.body, call.response),
                     201);
}

Answer turn(const Call& call) {
  try {
    return turn_answer(run_agent_turn(call.engine, call.metrics, call.agent(), TurnRequest::Presence::kThere,
                                      call.request, call.body, call.response),
                       200);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) refuse_absent(call.name);  // in the tenant's words
    throw;
  }
}

Answer why(const Call& call) {
  return {200, compare_messages(call.engine, call.agent(), call.body.at("messages"))};
}

Answer export_file(const Call& call) {
  send_export(call.engine, call.agent(), call.response);
  return {200, nullptr, true};
}

Answer map(const Call& call) { return {200, map_json(call.engine, call.agent())}; }
Answer now(const Call& call) { return {200, now_json(call.models, call.metrics, call.request.tenant)}; }
Answer requests(const Call& call) { return {200, requests_json(call.metrics, call.request.tenant)}; }
Answer memory(const Call& call) { return {200, memory_json(call.models, call.request.tenant)}; }

Answer describe(const Call& call);

/// What a turn is asked with, after `first`.
std::vector<Member> turn_members(std::vector<Member> first) {
  first.insert(first.end(), {{"prompt", "string", true, "The user's message."},
                             {"system", "string", false, "The system message of a new agent."},
                             {"max_tokens", "integer", false, "The longest answer; 256 unless given."},
                             {"temperature", "number", false, "Randomness; 0, the default: the likeliest token."},
                             {"top_p", "number", false, "Samples from the smallest set with this much probability."},
                             {"seed", "integer", false, "Of the random numbers; another one each turn unless given."},
                             {"stream", "boolean", false,
                              "Server-sent events: `prefill` (done, total), `text` (text), then `result` or `error`."}});
  return first;
}

const std::vector<Operation>& operations() {
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
       {{"messages", "array", true, "The whole conversation, oldest message first: `role`, `content` and so on."}},
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

Json reference(const std::string& schema) { return Json{{"$ref", "#/components/schemas/" + schema}}; }

Json content(Json schema) { return Json{{"application/json", Json{{"schema", std::move(schema)}}}}; }

bool has_member(const Operation& operation, std::string_view name) {
  return std::any_of(operation.members.begin(), operation.members.end(), [&](const Member& m) { return name == m.name; });
}

Answer describe(const Call&) {
  Json description = described_routes();
  description["info"]["version"] = TORPOR_VERSION;
  Json& paths = description["paths"];
  for (const Operation& operation : operations()) {
    Json success{{"description", operation.help}};
    if (operation.answer == kFile) {
      success["content"] = Json{{kFile, Json::object()}};
    } else if (operation.answer) {
      success["content"] = content(reference(operation.answer));
    }
    Json described{{"operationId", operation.id}, {"summary", operation.help}, {"tags", Json::array({"torpor"})}};
    if (std::string_view(operation.path).find("{agent}") != std::string_view::npos) {
      described["parameters"] =
          Json::array({Json{{"name", "agent"},
                            {"in", "path"},
                            {"required", true},
                            {"schema", Json{{"type", "string"}, {"pattern", "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"}}}}});
    }
    if (!operation.members.empty()) {
      Json properties = Json::object(), required = Json::array();
      for (const Member& member : operation.members) {
        properties[member.name] = Json{{"type", member.type}, {"description", member.help}};
        if (std::string_view(member.type) == "integer") properties[member.name]["minimum"] = 0;
        if (std::string_view(member.type) == "array") properties[member.name]["items"] = Json{{"type", "object"}};
        if (member.required) required.push_back(member.name);
      }
      described["requestBody"] = Json{{"required", true},
                                      {"content", content(Json{{"type", "object"},
                                                               {"properties", std::move(properties)},
                                                               {"required", std::move(required)},
                                                               {"additionalProperties", false}})}};
    }
    described["responses"] = Json{{std::to_string(operation.status), std::move(success)},
                                  {"default", Json{{"$ref", "#/components/responses/AgentsError"}}}};
    if (has_member(operation, "stream")) {
      Json& streamed = described["responses"]["200"];
      if (streamed.is_null()) streamed["description"] = "The turn's events.";
      streamed["content"]["text/event-stream"] = Json::object();
    }
    std::string method = operation.method;
    std::transform(method.begin(), method.end(), method.begin(), [](unsigned char c) { return std::tolower(c); });
    paths[std::string("/torpor/v1") + operation.path][method] = std::move(described);
  }
  return {200, std::move(description)};
}

/// Whether `path`, the parts below /torpor/v1, is of the operation's form.
bool fits(const Operation& operation, const Parts& path) {
  HttpRequest form;
  form.path = operation.path;
  const Parts parts = form.path_parts();
  return parts.size() == path.size() &&
         std::equal(parts.begin(), parts.end(), path.begin(),
                    [](const auto& part, const auto& given) { return part == "{agent}" || part == given; });
}

bool has_type(const Json& value, std::string_view type) {
  if (type == "integer")
    return value.is_number_integer() && (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX);
  if (type == "number") return value.is_number();
  if (type == "array") return value.is_array();
  return type == "string" ? value.is_string() : value.is_boolean();
}

Json body_of(const Operation& operation, const HttpRequest& request) {
  const auto refuse = [](const std::string& what, const std::string& field) {
    throw Error(ErrorCode::kInvalidArgument, what).with_field(field);
  };
  if (operation.members.empty()) return Json::object();
  Json body = parse_body(request);
  for (const auto& [name, value] : body.items()) {
    const auto member = std::find_if(operation.members.begin(), operation.members.end(),
                                     [&name = name](const Member& m) { return name == m.name; });
    if (member == operation.members.end()) refuse("'" + name + "' is no member of this request", name);
    if (!has_type(value, member->type)) refuse("'" + name + "' must be of type " + member->type, name);
  }
  for (const Member& member : operation.members) {
    if (member.required && !body.contains(member.name))
      refuse(std::string("the request lacks '") + member.name + "'", member.name);
  }
  return body;
}

Answer answer(ModelPool& models, Metrics& metrics, const HttpRequest& request, HttpResponse& response,
              std::string& allow) {
  Parts path = request.path_parts();
  path.erase(path.begin(), path.begin() + std::min<size_t>(2, path.size()));  // torpor, v1
  const std::string method = request.method == "HEAD" ? "GET" : request.method;
  for (const Operation& operation : operations()) {
    if (!fits(operation, path)) continue;
    if (method != operation.method) {
      allow += (allow.empty() ? "" : ", ") + std::string(operation.method);
      continue;
    }
    Json body = body_of(operation, request);
    const std::string name = path.size() > 1 && path[0] == "agents" ? path[1] : "";
    const std::string id = name.empty() ? "" : agent_id_of(request.tenant, name);
    const ModelPool::Lease model = name.empty() ? models.model("") : models.of_agent(id, !operation.computes);
    return operation.run({models, metrics, model.engine(), request, response, name, id, std::move(body)});
  }
  if (!allow.empty())
    return {405, Json{{"error", Json{{"code", "kInvalidArgument"},
                                     {"message", request.path + " answers " + allow + " alone"}}}}};
  throw Error(ErrorCode::kNotFound, "there is no " + request.path + " here");
}

/// What is told of a failure, in the words of torpor::Error.
Answer failed(const Failure& failure, const std::string& tenant, HttpHeaders& headers) {
  ErrorCode code = ErrorCode::kInvalidArgument;
  if (failure.kind == Failure::Kind::kNotFound) code = ErrorCode::kNotFound;
  if (failure.kind == Failure::Kind::kBusy) code = ErrorCode::kBusy;
  if (failure.retry_after > 0) headers.emplace_back("retry-after", std::to_string(failure.retry_after));
  const Error error = Error(code, failure.what()).with_field(failure.param);
  const int status = code == ErrorCode::kBusy ? 409 : faces::http_status(error);  // of a key, not of an agent
  return {status, error_json(error, tenant)};
}

}  // namespace

void AgentsApi::handle(const HttpRequest& request, HttpResponse& plain) {
  const auto answer_with = [&](HttpResponse& response) {
    Answer said;
    HttpHeaders headers;
    std::string allow;
    try {
      said = answer(models_, metrics_, request, response, allow);
    } catch (const Error& error) {
      said = {faces::http_status(error), error_json(error, request.tenant)};
    } catch (const Failure& failure) {
      said = failed(failure, request.tenant, headers);
    }
    if (said.said) return;
    if (!said.body.is_null()) headers.emplace_back("content-type", "application/json");
    if (said.status == 405) headers.emplace_back("allow", allow);
    response.whole(said.status, std::move(headers), said.body.is_null() ? "" : to_text(said.body));
  };
  try {
    replay_.handle(request, plain, answer_with);
  } catch (const Failure& failure) {  // of the key
    HttpHeaders headers{{"content-type", "application/json"}};
    const Answer said = failed(failure, request.tenant, headers);
    plain.whole(said.status, std::move(headers), to_text(said.body));
  }
}

}  // namespace torpor::server
