#include "teams/team_file.h"

#include <algorithm>
#include <cstdint>
#include <set>

#include "base/json.h"

namespace torpor {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kVersion = 1;
constexpr int kDeepest = 256;
constexpr StepKind kKinds[] = {StepKind::kTurn, StepKind::kAsk, StepKind::kRound, StepKind::kHandOff,
                               StepKind::kConclude};

/// JSON text; of tools that a client thinks of, too. What is deeper than `deepest`, or none, is discarded: copying and
/// writing JSON recurse.
Json parse_shallow(const std::string& text, int deepest) {
  bool deep = false;
  const auto shallow = [&](int depth, Json::parse_event_t, Json&) { return !(deep = deep || depth > deepest); };
  Json json = parse_json<Json>(text, shallow, false);
  return deep ? Json(Json::value_t::discarded) : json;
}

bool has_member(const TeamSpec& spec, const std::string& name) {
  return std::any_of(spec.members.begin(), spec.members.end(), [&](const TeamMember& m) { return m.name == name; });
}

}  // namespace

const char* step_kind_name(StepKind kind) {
  switch (kind) {
    case StepKind::kTurn: return "turn";
    case StepKind::kAsk: return "ask";
    case StepKind::kRound: return "round";
    case StepKind::kHandOff: return "handoff";
    case StepKind::kConclude: break;
  }
  return "conclude";
}

StepKind parse_step_kind(const std::string& name) {
  for (const StepKind kind : kKinds) {
    if (name == step_kind_name(kind)) return kind;
  }
  refuse_team("There is no step '" + name + "'; use turn, ask, round, handoff or conclude.", "kind");
}

void refuse_team(const std::string& what, const std::string& field) {
  throw Error(ErrorCode::kInvalidArgument, what).with_field(field);
}

void check_team(const TeamSpec& spec) {
  check_agent_id(spec.id);
  if (spec.members.size() < 2 || spec.members.size() > kMostTeamMembers) {
    refuse_team("A team has 2 to " + std::to_string(kMostTeamMembers) + " members, and not " +
                    std::to_string(spec.members.size()) + ".",
                "members");
  }
  std::set<std::string> names;
  for (const TeamMember& member : spec.members) {
    check_agent_id(member.name);
    check_agent_id(spec.id + "." + member.name);
    if (!names.insert(member.name).second)
      refuse_team("Two members are called '" + member.name + "'; rename one.", "members");
  }
  if (!has_member(spec, spec.coordinator)) {
    refuse_team("The coordinator '" + spec.coordinator + "' is no member; name one of the members.", "coordinator");
  }
  if (!spec.tools.empty() && !parse_shallow(spec.tools, kDeepest - 1).is_array()) {
    refuse_team("The tools are no JSON array, or nested deeper than " + std::to_string(kDeepest - 1) + " levels.",
                "tools");
  }
}

std::string encode_team(const Team& team) {
  const TeamSpec& spec = team.spec;
  Json members = Json::array();
  for (const TeamMember& member : spec.members) members.push_back(Json{{"name", member.name}, {"role", member.role}});
  Json json{{"team_version", kVersion},
            {"team", spec.id},
            {"model", spec.model},
            {"system", spec.system},
            {"tools", spec.tools.empty() ? Json::array() : parse_json<Json>(spec.tools)},
            {"members", std::move(members)},
            {"coordinator", spec.coordinator},
            {"speaker", team.speaker}};
  if (const auto& step = team.step) {
    const StepWords& words = step->words;
    json["step"] = Json{{"kind", step_kind_name(words.kind)},
                        {"message", words.message},
                        {"to", Json(words.to)},
                        {"from", words.from},
                        {"summary", words.summary},
                        {"key", step->key},
                        {"hands_over", step->from},
                        {"turns", Json(step->turns)},
                        {"held", Json(step->held)},
                        {"open", step->open}};
  }
  try {
    return dump_json(json, 2) + "\n";
  } catch (const Json::exception&) {
    throw Error(ErrorCode::kInvalidArgument, "A text of the team '" + spec.id + "' is not UTF-8.");
  }
}

Team decode_team(const std::string& text, const std::string& id) {
  const auto damaged = [&](const std::string& why) {
    return Error(ErrorCode::kCorruption, "The file of the team '" + id + "' " + why + "; remove the team.");
  };
  Team team;
  try {
    const Json json = parse_shallow(text, kDeepest);
    if (!json.is_object()) throw damaged("is no JSON object, or a very deep one");
    if (json.at("team_version") != kVersion) {
      throw Error(ErrorCode::kIncompatible, "The team '" + id + "' is of a newer version of Torpor; use that one.")
          .with_field("team_version", std::to_string(kVersion), dump_json(json.at("team_version")));
    }
    TeamSpec& spec = team.spec;
    spec.id = json.at("team").get<std::string>();
    // A file system that folds case gives the file of `crew` for `Crew`.
    if (spec.id != id) throw Error(ErrorCode::kNotFound, "There is no team '" + id + "'.");
    spec.model = json.at("model").get<std::string>();
    spec.system = json.at("system").get<std::string>();
    const Json& tools = json.at("tools");
    if (!tools.is_array()) throw damaged("has tools that are no list");
    if (!tools.empty()) spec.tools = dump_json(tools);
    for (const Json& member : json.at("members"))
      spec.members.push_back({member.at("name").get<std::string>(), member.at("role").get<std::string>()});
    spec.coordinator = json.at("coordinator").get<std::string>();
    team.speaker = json.at("speaker").get<std::string>();
    check_team(spec);
    if (!has_member(spec, team.speaker)) throw damaged("names a speaker who is no member");
    if (const auto found = json.find("step"); found != json.end()) {
      StepState step;
      step.words.kind = parse_step_kind(found->at("kind").get<std::string>());
      step.words.message = found->at("message").get<std::string>();
      step.words.to = found->at("to").get<std::vector<std::string>>();
      step.words.from = found->at("from").get<std::string>();
      step.words.summary = found->at("summary").get<bool>();
      step.key = found->at("key").get<std::string>();
      step.from = found->at("hands_over").get<std::string>();
      step.turns = found->at("turns").get<std::vector<std::string>>();
      for (const auto& [member, held] : found->at("held").items()) {
        if (!held.is_number_unsigned() || held.get<uint64_t>() > uint64_t(INT64_MAX))
          throw damaged("counts no messages");
        step.held[member] = held.get<int64_t>();
      }
      step.open = found->at("open").get<bool>();
      const auto is_stranger = [&](const std::string& name) { return !has_member(spec, name); };
      const bool hands_over = step.words.kind == StepKind::kHandOff;
      const std::set<std::string> once(step.turns.begin(), step.turns.end());
      if (once.empty() || once.size() != step.turns.size() || std::any_of(once.begin(), once.end(), is_stranger) ||
          (hands_over && is_stranger(step.from)))
        throw damaged("names members of its step that it does not have");
      team.step = std::move(step);
    }
  } catch (const Json::exception&) {
    throw damaged("can't be read");
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kInvalidArgument) throw damaged("is of no team that could be made");
    throw;
  }
  return team;
}

}  // namespace torpor
