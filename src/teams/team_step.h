#pragma once
/// A step from its plan to its end (torpor/teams.h).

#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "torpor/teams.h"

namespace torpor {

struct TeamStep::Plan {
  /// Finds out who takes turns and who has answered. Throws as Teams::begin says.
  Plan(Store& store, Durability durability, std::unique_ptr<AgentLock> lock, Team team, StepRequest request,
       TeamEngine& engine);

  int turns() const;
  StepResult run();

 private:
  struct Turn {
    std::string member;
    TeamAnswer answer;   ///< one that was kept has its text
    bool done = false;   ///< it was kept, or is over
  };

  /// The step that is asked for: the team's last one, where this goes on with it.
  StepState state_of_request();
  std::vector<std::string> find_turns(std::string& from) const;
  void look_at_agents();
  /// What a member's agent said last before the step; empty: nothing.
  std::string said(const std::string& member) const;
  /// The answer to `prompt`, where the member's agent has it.
  std::optional<Message> answered(const std::string& member, const std::string& prompt) const;
  std::string prompt_of(size_t turn) const;
  std::string heard_by(const std::string& member) const;
  std::string system_of(const std::string& member) const;
  /// Keeps what the agent has answered already. Of a second turn that needs the first one's text: once that is there.
  void keep_answers(size_t first, size_t last);
  void compute(size_t turn);
  void compute_together(size_t first, size_t last);
  void save_team() const;

  /// Calls what may be empty, and keeps what it throws. Ends this turn where that has happened before.
  template <typename Callback, typename... Words>
  void tell(const Callback& callback, const Words&... words);

  Store& store_;
  const Durability durability_;
  const std::unique_ptr<AgentLock> lock_;
  Team team_;
  const StepRequest request_;
  TeamEngine& engine_;
  bool is_over_ = false;  // the step was complete before
  bool is_new_ = true;    // else it goes on
  std::map<std::string, std::vector<Message>> messages_;  // of members' agents, as the plan found them
  std::vector<Turn> turns_;

  Mutex mutex_;  // of callbacks
  std::exception_ptr thrown_ TORPOR_GUARDED_BY(mutex_);  // by a callback
};

}  // namespace torpor
