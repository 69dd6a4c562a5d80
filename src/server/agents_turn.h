#pragma once
/// What /torpor/v1/agents computes or sends in pieces: turns, comparisons, exports; and how it words errors.

#include <chrono>
#include <string>
#include <utility>

#include "server/chat.h"
#include "server/http.h"
#include "server/metrics.h"
#include "torpor/engine.h"

namespace torpor::server {

/// An agent as the store names it, and as its tenant does.
struct AgentName {
  std::string id, name, tenant;
  std::string salt;  ///< TurnRequest::salt
};

/// The events of turns. The stream begins with the first, so that what fails before has a status of its own.
class TurnEvents {
 public:
  explicit TurnEvents(HttpResponse& response) : response_(response) {}
  bool begun() const { return begun_; }
  void send(const char* event, const Json& data) {
    if (!std::exchange(begun_, true)) {
      response_.begin(200, {{"content-type", "text/event-stream; charset=utf-8"}});
      response_.keep_alive(": still here\n\n", std::chrono::seconds(10));
    }
    response_.write(std::string("event: ") + event + "\ndata: " + to_text(data) + "\n\n");
  }

 private:
  HttpResponse& response_;
  bool begun_ = false;
};

/// A turn that metrics count from its construction to its destruction.
class CountedTurn {
 public:
  CountedTurn(Metrics& metrics, const AgentName& agent)
      : turn(metrics.turns(), agent.tenant, agent.name), metrics_(metrics) {
    metrics_.turn_begins();
  }
  ~CountedTurn() {
    metrics_.turn_ends(reason, generated);
    turn.end(reason, generated);
  }
  CountedTurn(const CountedTurn&) = delete;
  CountedTurn& operator=(const CountedTurn&) = delete;

  void complete(const TurnResult& result) {
    metrics_.turn_starts(result.tokens.prompt, result.tokens.cached);
    metrics_.first_token(result.timing_ms.ttft / 1000);
    turn.starts(result.tokens.prompt, result.tokens.cached);
    reason = finish_reason_name(result.finish_reason);
    generated = result.tokens.generated;
  }

  TurnLog::Turn turn;
  std::string reason = "error";
  int generated = 0;

 private:
  Metrics& metrics_;
};

/// One turn, as the members of `body` ask for it (turn_members). `request` says whose share of the engine it takes, and
/// whether it can wait. Gives its result; null when it was streamed. A turn whose client goes is taken back. Throws
/// torpor::Error before anything was answered; later ones end the stream with an event `error`.
Json run_agent_turn(Engine& engine, Metrics& metrics, const AgentName& agent, TurnRequest::Presence presence,
                    const HttpRequest& request, const Json& body, HttpResponse& response);

/// How much of a conversation, an array of messages, the agent holds as of its last save, and where the two part.
/// kInvalidArgument for what is no message.
Json compare_messages(Engine& engine, const AgentName& agent, const Json& messages);

/// Saves the agent if it has changed, and sends it as Store::export_agent writes it.
void send_export(Engine& engine, const AgentName& agent, HttpResponse& response);

/// What a turn's members of `body` say (sampling_members). Failure kInvalid as sampling_options gives it.
GenerateOptions generate_options(const Json& body, int vocab_size);

/// {"error": {"code", "message", ...}}, in the tenant's own names for its agents.
Json error_json(const Error& error, const std::string& tenant);

}  // namespace torpor::server
