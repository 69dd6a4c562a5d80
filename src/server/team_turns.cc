#include "server/team_turns.h"

#include <algorithm>

#include "faces/turn_json.h"
#include "server/agents_turn.h"
#include "server/keys.h"

namespace torpor::server {

std::string ServedTeam::name_of(const std::string& agent) const {
  if (auto name = agent_name_of(tenant_, agent)) return *std::move(name);
  throw Error(ErrorCode::kInvalidArgument, "A member of this team has an agent of another tenant's; use another team.");
}

bool ServedTeam::holds(const std::string& agent) {
  if (model_.engine().store().contains(agent)) return true;
  const std::vector<AgentMemory> awake = models_.memory_usage().agents;
  return std::any_of(awake.begin(), awake.end(), [&](const AgentMemory& one) { return one.agent == agent; });
}

TurnResult ServedTeam::turn(const TurnRequest& given) {
  /// The turn's place is free however it ends.
  struct Leaving {
    TurnQueue::Places* places;
    ~Leaving() {
      if (places != nullptr) places->leave_one();
    }
  } leaving{places_};
  const AgentName agent{given.agent, name_of(given.agent), tenant_, given.salt};
  CountedTurn counted(metrics_, agent);
  TurnRequest request = given;
  request.read_answer = model_.runner().answer_reader(given.tools);
  request.generate.on_prefill = [&](int done, int total) {
    counted.turn.reads(done, total);
    given.generate.on_prefill(done, total);
  };
  request.generate.on_text = [&](std::string_view text) {
    counted.turn.answers();
    given.generate.on_text(text);
  };
  try {
    TurnResult result = model_.engine().turn(request);
    counted.complete(result);
    return result;
  } catch (...) {
    if (given.give_up != nullptr && *given.give_up) counted.reason = "cancelled";
    throw;
  }
}

Json team_json(const Team& team, const std::string& name) {
  Json members = Json::array();
  for (const TeamMember& member : team.spec.members)
    members.push_back(Json{{"name", member.name}, {"role", member.role}, {"agent", name + "." + member.name}});
  Json json{{"team", name},
            {"model", team.spec.model},
            {"system", team.spec.system},
            {"tools", team.spec.tools.empty() ? Json::array() : parse_json<Json>(team.spec.tools)},
            {"members", std::move(members)},
            {"coordinator", team.spec.coordinator},
            {"speaker", team.speaker}};
  if (const auto& step = team.step) {
    json["step"] = Json{{"kind", step_kind_name(step->words.kind)}, {"turns", step->turns}, {"open", step->open}};
  }
  return json;
}

Json answer_json(const TeamAnswer& answer, const std::string& tenant) {
  Json json{{"member", answer.member}};
  if (answer.turn) json.update(faces::turn_json(*answer.turn, answer.seed));
  if (answer.turn || answer.kept) json["text"] = answer.text;
  for (const torpor::ToolCall& call : answer.tool_calls) {
    const std::string arguments = call.arguments.empty() ? "{}" : call.arguments;
    json["tool_calls"].push_back(Json{{"name", call.name}, {"arguments", parse_json<Json>(arguments)}});
  }
  json["agent"] = agent_name_of(tenant, answer.agent).value_or(answer.agent);
  json["kept"] = answer.kept;
  if (answer.error) json["error"] = error_json(*answer.error, tenant)["error"];
  return json;
}

Json step_json(const StepResult& result, const std::string& name, const std::string& tenant) {
  Json answers = Json::array();
  for (const TeamAnswer& answer : result.answers) answers.push_back(answer_json(answer, tenant));
  return Json{{"team", name},
              {"kind", step_kind_name(result.kind)},
              {"complete", result.complete},
              {"speaker", result.speaker},
              {"answers", std::move(answers)}};
}

}  // namespace torpor::server
