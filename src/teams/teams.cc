#include "torpor/teams.h"

#include <algorithm>

#include "teams/team_file.h"
#include "teams/team_step.h"
#include "torpor/log.h"

namespace torpor {
namespace {

class OwnEngine : public TeamEngine {
 public:
  explicit OwnEngine(Engine& engine) : engine_(engine) {}
  TurnResult turn(const TurnRequest& request) override { return engine_.turn(request); }
  std::vector<Message> messages(const std::string& agent, const std::atomic<bool>* give_up) override {
    return engine_.messages(agent, give_up);
  }
  void save(const std::string& agent) override { engine_.save(agent); }
  void remove(const std::string& agent) override { engine_.remove(agent); }
  bool holds(const std::string& agent) override {
    if (engine_.store().contains(agent)) return true;
    const std::vector<AgentMemory> awake = engine_.memory_usage().agents;
    return std::any_of(awake.begin(), awake.end(), [&](const AgentMemory& one) { return one.agent == agent; });
  }

 private:
  Engine& engine_;
};

}  // namespace

std::unique_ptr<TeamEngine> team_engine(Engine& engine) { return std::make_unique<OwnEngine>(engine); }

Team Teams::make(const TeamSpec& spec, TeamEngine& engine) {
  check_team(spec);
  const std::string json = encode_team({.spec = spec, .speaker = spec.coordinator});
  Team team = decode_team(json, spec.id);
  for (const TeamMember& member : spec.members) {
    const std::string agent = team.agent(member.name);
    if (!engine.holds(agent)) continue;
    throw Error(ErrorCode::kInvalidArgument,
                "There is an agent '" + agent + "' already; call team or member otherwise.")
        .with_agent(agent)
        .with_field(kAgentTaken);
  }
  store_.make_team(spec.id, json, durability_);
  return team;
}

Team Teams::find(const std::string& id) const { return decode_team(store_.read_team(id), id); }

void Teams::remove(const std::string& id, TeamEngine& engine) {
  const auto lock = store_.lock_team(id);
  try {
    const Team team = find(id);
    for (const TeamMember& member : team.spec.members) {
      try {
        engine.remove(team.agent(member.name));
      } catch (const Error& error) {
        if (error.code() != ErrorCode::kNotFound) throw;  // it had no turn, or somebody else removed it
      }
    }
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kCorruption) throw;
    log(LogLevel::kWarning, std::string("The agents of a team stay: ") + error.what());
  }
  if (!store_.remove_team(id, durability_)) throw Error(ErrorCode::kNotFound, "There is no team '" + id + "'.");
}

TeamStep Teams::begin(const std::string& id, StepRequest request, TeamEngine& engine) {
  auto lock = store_.lock_team(id);
  Team team = find(id);
  return TeamStep(std::make_unique<TeamStep::Plan>(store_, durability_, std::move(lock), std::move(team),
                                                   std::move(request), engine));
}

}  // namespace torpor
