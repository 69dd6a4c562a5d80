#pragma once
/// A TeamEngine without a model: agents in memory, whose answers the test's script says.

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "torpor/teams.h"

namespace torpor::testing {

class ScriptedTeam : public TeamEngine {
 public:
  using Script = std::function<std::string(const TurnRequest&)>;

  TurnResult turn(const TurnRequest& request) override {
    {
      const std::lock_guard lock(mutex_);
      heard.push_back(request);
    }
    if (request.give_up != nullptr && *request.give_up) throw Error(ErrorCode::kCancelled, "The turn was taken back.");
    const std::string text = script ? script(request) : "I am " + request.agent + ".";
    if (request.generate.on_text) request.generate.on_text(text);
    const std::lock_guard lock(mutex_);
    std::vector<Message>& messages = agents[request.agent];
    if (messages.empty() && request.system) messages.push_back({"system", *request.system});
    messages.push_back({"user", request.prompt});
    TurnResult result;
    result.agent = request.agent;
    result.text = text;
    result.message = read_answer ? read_answer(text) : Message{"assistant", text};
    messages.push_back(result.message);
    if (request.agent == cancelled) result.finish_reason = FinishReason::kCancelled;
    return result;
  }
  std::vector<Message> messages(const std::string& agent, const std::atomic<bool>* /*give_up*/ = nullptr) override {
    if (read) read();
    if (agent == busy) throw Error(ErrorCode::kBusy, "The agent is awake elsewhere.");
    if (agent == damaged) throw Error(ErrorCode::kCorruption, "The agent is damaged.");
    const std::lock_guard lock(mutex_);
    const auto found = agents.find(agent);
    if (found == agents.end()) throw Error(ErrorCode::kNotFound, "There is no agent '" + agent + "'.");
    return found->second;
  }
  void save(const std::string& agent) override { messages(agent); }
  bool holds(const std::string& agent) override { return agents.contains(agent); }
  void remove(const std::string& agent) override {
    messages(agent);
    agents.erase(agent);
  }

  /// What the turn of an agent was asked last.
  std::string prompt(const std::string& agent) {
    const std::lock_guard lock(mutex_);
    for (size_t i = heard.size(); i-- > 0;) {
      if (heard[i].agent == agent) return heard[i].prompt;
    }
    return {};
  }

  Script script;
  std::function<void()> read;                            ///< called before messages are read
  std::function<Message(const std::string&)> read_answer;  ///< as in TurnRequest
  std::string damaged, busy;                             ///< whose messages can't be read
  std::string cancelled;                                 ///< whose turns end so
  std::vector<TurnRequest> heard;
  std::map<std::string, std::vector<Message>> agents;

 private:
  std::mutex mutex_;
};

}  // namespace torpor::testing
