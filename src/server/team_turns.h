#pragma once
/// A team's turns on an Engine, as the server counts them.

#include <string>

#include "server/chat.h"
#include "server/metrics.h"
#include "server/model_pool.h"
#include "server/turn_queue.h"
#include "torpor/teams.h"

namespace torpor::server {

/// All must live longer than it. `model` computes the turns. Agents that the tenant has no name for are
/// kInvalidArgument: a team `t` that Python made has them.
class ServedTeam : public TeamEngine {
 public:
  ServedTeam(ModelPool& models, const ModelPool::Lease& model, Metrics& metrics, std::string tenant)
      : models_(models), model_(model), metrics_(metrics), tenant_(std::move(tenant)) {}
  /// Each turn leaves one of these places when it is over.
  void take(TurnQueue::Places& places) { places_ = &places; }

  TurnResult turn(const TurnRequest& request) override;
  std::vector<torpor::Message> messages(const std::string& agent, const std::atomic<bool>* give_up) override {
    name_of(agent);
    return model_.engine().messages(agent, give_up);
  }
  void save(const std::string& agent) override {
    name_of(agent);
    model_.engine().save(agent);
  }
  /// Whichever model has it awake.
  void remove(const std::string& agent) override {
    name_of(agent);
    models_.of_agent(agent, true).engine().remove(agent);
  }
  bool holds(const std::string& agent) override;

 private:
  /// As the tenant knows it.
  std::string name_of(const std::string& agent) const;

  ModelPool& models_;
  const ModelPool::Lease& model_;
  Metrics& metrics_;
  const std::string tenant_;
  TurnQueue::Places* places_ = nullptr;
};

/// A team as its tenant sees it. `name`: what the tenant calls it.
Json team_json(const Team& team, const std::string& name);
/// What a member answered, with its turn or its error.
Json answer_json(const TeamAnswer& answer, const std::string& tenant);
/// A step's end.
Json step_json(const StepResult& result, const std::string& name, const std::string& tenant);

}  // namespace torpor::server
