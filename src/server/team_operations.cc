/// What /torpor/v1/teams answers.

#include <optional>

#include "base/hash.h"
#include "server/operations.h"
#include "server/team_turns.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

constexpr const char* kEvents =
    "Server-sent events, each with its `member`: `prefill` (done, total), `text` (text), `answer`; then `result` or "
    "`error`.";

[[noreturn]] void refuse(const std::string& what, const std::string& field) {
  throw Error(ErrorCode::kInvalidArgument, what).with_field(field);
}

std::vector<TeamMember> members_of(const Json& given) {
  std::vector<TeamMember> members;
  for (const Json& item : given) {
    TeamMember member;
    for (const auto& [key, value] : item.items()) {
      if (key != "name" && key != "role") refuse("'" + key + "' is no member of a team's member", "members");
      if (!value.is_string()) refuse("'" + key + "' of a team's member must be a text", "members");
      (key == "name" ? member.name : member.role) = value;
    }
    members.push_back(std::move(member));
  }
  return members;
}

Reply make(const Call& call) {
  const ModelPool::Lease model = call.models.model(call.body.value("model", ""));
  const std::string name = call.body.at("team");
  TeamSpec spec{.id = call.id_of(name),
                .members = members_of(call.body.at("members")),
                .coordinator = call.body.at("coordinator"),
                .system = call.body.value("system", ""),
                .model = model.name()};
  // A team `t` of the tenant `local` would have agents of all others.
  for (const TeamMember& member : spec.members) call.id_of(name + "." + member.name);
  if (call.body.contains("tools")) spec.tools = to_text(call.body["tools"]);
  ServedTeam engine(call.models, model, call.metrics, call.request.tenant);
  return {201, team_json(Teams(call.engine.store()).make(spec, engine), name)};
}

Reply list(const Call& call) {
  const Teams teams(call.engine.store());
  Json all = Json::array();
  for (const std::string& id : teams.list()) {
    const auto name = agent_name_of(call.request.tenant, id);
    if (!name) continue;
    try {
      all.push_back(team_json(teams.find(id), *name));
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kNotFound) continue;  // removed meanwhile
      all.push_back(Json{{"team", *name}, {"error", error_json(error, call.request.tenant)["error"]}});
    }
  }
  return {200, Json{{"teams", std::move(all)}}};
}

Reply show(const Call& call) { return {200, team_json(Teams(call.engine.store()).find(call.id), call.name)}; }

Reply remove(const Call& call) {
  const ModelPool::Lease model = call.models.model("");
  ServedTeam engine(call.models, model, call.metrics, call.request.tenant);
  Teams(call.engine.store()).remove(call.id, engine);
  return {204, nullptr};
}

StepRequest request_of(const Call& call, StepKind kind, int vocab_size) {
  const Json& body = call.body;
  StepRequest request;
  request.words.kind = kind;
  request.words.message = body.value("message", "");
  if (kind == StepKind::kHandOff) {
    request.words.to = {body.at("to").get<std::string>()};
    request.words.from = body.value("from", "");
    request.words.summary = body.value("summary", false);
  } else if (body.contains("to")) {
    request.words.to = body["to"].get<std::vector<std::string>>();
    if (request.words.to.empty()) refuse("'to' names nobody; name a member, or leave it out.", "to");
  }
  // Of any length, and each path's own.
  if (const auto key = call.request.header("idempotency-key"))
    request.key = hash_hex(std::string(step_kind_name(kind)) + " " + std::string(*key));
  request.salt = call.models.salt(call.request.tenant);
  request.share = call.request.share;
  request.background = call.request.background();
  request.generate = generate_options(body, vocab_size);
  request.give_up = &call.response.gone();
  return request;
}

/// Places are taken before anything is written or computed.
Reply step(const Call& call, StepKind kind) {
  Teams teams(call.engine.store());
  const ModelPool::Lease model = call.models.of_source(teams.find(call.id).spec.model);
  ServedTeam engine(call.models, model, call.metrics, call.request.tenant);
  StepRequest request = request_of(call, kind, model.engine().model().vocab_size);
  TurnEvents events(call.response);
  const bool stream = call.body.value("stream", false);
  if (stream) {
    request.on_prefill = [&](const std::string& member, int done, int total) {
      events.send("prefill", {{"member", member}, {"done", done}, {"total", total}});
    };
    request.on_text = [&](const std::string& member, std::string_view text) {
      events.send("text", {{"member", member}, {"text", text}});
    };
    request.on_answer = [&](const TeamAnswer& answer) {
      if (answer.kept || answer.turn) events.send("answer", answer_json(answer, call.request.tenant));
    };
  }
  // The team and its places are free when the client hears the end, who may ask again at once.
  std::optional<TeamStep> planned = teams.begin(call.id, std::move(request), engine);
  std::optional<TurnQueue::Places> places(std::in_place, call.queue, call.request.share, planned->turns());
  engine.take(*places);
  const auto over = [&] {
    planned.reset();
    places.reset();
  };
  try {
    const StepResult result = planned->run();
    over();
    call.response.ending(result.complete);
    Json said = step_json(result, call.name, call.request.tenant);
    if (!stream) return {200, std::move(said)};
    events.send("result", said);
  } catch (const Error& error) {
    if (!events.begun()) throw;
    over();
    events.send("error", error_json(error, call.request.tenant));
  }
  call.response.end();
  return {200, nullptr, true};
}

Operation step_operation(const char* path, const char* id, const char* help, StepKind kind,
                         std::vector<Member> members) {
  return {"POST", path, id, help, sampling_members(std::move(members), kEvents), 200, "TeamStep",
          [kind](const Call& call) { return step(call, kind); }};
}

}  // namespace

const std::vector<Operation>& team_operations() {
  static const std::vector<Operation> kOperations{
      {"GET", "/teams", "listTeams", "The tenant's teams.", {}, 200, "TeamList", list},
      {"POST",
       "/teams",
       "makeTeam",
       "A new team. Its members are agents, TEAM.MEMBER, that their first turns make.",
       {{"team", "string", true, "Its name, which must be free."},
        {"members", "objects", true, "2 to 16 of them, each with a `name` and a `role`, a text of its system message."},
        {"coordinator", "string", true, "The member who sums up."},
        {"system", "string", false, "What the system messages of all members begin with."},
        {"tools", "objects", false, "Tools of all members, as the chat template takes them."},
        {"model", "string", false, "The model that answers; the server's first unless given."}},
       201,
       "Team",
       make},
      {"GET", "/teams/{team}", "showTeam", "One team.", {}, 200, "Team", show},
      {"DELETE", "/teams/{team}", "deleteTeam", "Removes the team and its members' agents.", {}, 204, nullptr, remove},
      step_operation("/teams/{team}/turn", "turnTeam", "The speaker answers: whoever was handed the conversation last.",
                     StepKind::kTurn, {{"message", "string", true, "The user's message."}}),
      step_operation("/teams/{team}/ask", "askTeam", "Members answer one message, in one batch.", StepKind::kAsk,
                     {{"message", "string", true, "The user's message."},
                      {"to", "strings", false, "Who answers; all but the coordinator unless given."}}),
      step_operation("/teams/{team}/round", "roundTeam", "Each hears what the others said last, and answers.",
                     StepKind::kRound,
                     {{"message", "string", false, "What they hear after that."},
                      {"to", "strings", false, "Who answers; all but the coordinator unless given."}}),
      step_operation("/teams/{team}/handoff", "handOffTeam",
                     "The conversation goes on with another member, the new speaker.", StepKind::kHandOff,
                     {{"to", "string", true, "Who goes on."},
                      {"message", "string", false, "The user's message to that member."},
                      {"from", "string", false, "Who hands over; the speaker unless given."},
                      {"summary", "boolean", false, "`from` sums up first; else its last answer is heard."}}),
      step_operation("/teams/{team}/conclude", "concludeTeam",
                     "The coordinator hears what the others said last, and sums up.", StepKind::kConclude,
                     {{"message", "string", false, "What it hears after that."}}),
  };
  return kOperations;
}

}  // namespace torpor::server
