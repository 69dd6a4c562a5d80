#pragma once
/// Answers with an Engine: the TurnRunner of the server.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "server/answer_parser.h"
#include "server/chat.h"
#include "torpor/engine.h"

namespace torpor::server {

/// The agent of a client's session: one for each tenant, model and session id.
std::string session_agent(const std::string& tenant, const std::string& model, const std::string& session);

/// Whether an agent is one of those, or a branch of one.
bool is_session_agent(const std::string& id);

/// Turns on one Engine. An agent that is named explicitly holds the conversation that the client sends: where they
/// differ it is rewound. The agent of a session is never rewound: where they differ the turn is that of a branch.
/// Without either, the turn starts from the longest prefix that anyone has, and leaves no name.
class EngineRunner : public TurnRunner {
 public:
  /// `engine` must outlive it. `name`: by which answers name the model, and requests ask for it. `share_prefixes`: a tenant's
  /// turns take rows from other tenants', and give them theirs. kInvalidArgument when the model has no chat template that can
  /// be used.
  EngineRunner(Engine& engine, std::string name, bool share_prefixes = false);
  ~EngineRunner() override;

  void run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) override;
  int count_tokens(const ChatRequest& request) override;
  std::vector<ModelEntry> models() override;

  /// Parts thinking and calls from the text of answers to a prompt (TurnRequest::read_answer), as `run` does of those
  /// to messages. `tools`: JSON array of those that the agent has, as the template takes them; empty: none. This must
  /// outlive it.
  std::function<torpor::Message(const std::string& text)> answer_reader(const std::string& tools) const;

 protected:
  /// Tokens that an answer may have; nullptr: any. `parsing`: how the answer is written. Failure kInvalid for what
  /// can't be held to.
  virtual std::shared_ptr<TokenFilter> filter_of(const ChatRequest& request, const AnswerParser::Options& parsing);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor::server
