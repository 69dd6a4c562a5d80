#pragma once
/// What /torpor/v1/agents computes or sends in pieces: turns, comparisons, exports; and how it words errors.

#include <string>

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

/// One turn, as the members `prompt`, `system`, `max_tokens`, `temperature`, `top_p`, `seed` and `stream` of `body` ask
/// for it. `request` says whose share of the engine it takes, and whether it can wait. Gives its result; null when it was
/// streamed. A turn whose client goes is taken back. Throws torpor::Error before anything was answered; later ones end
/// the stream with an event `error`.
Json run_agent_turn(Engine& engine, Metrics& metrics, const AgentName& agent, TurnRequest::Presence presence,
                    const HttpRequest& request, const Json& body, HttpResponse& response);

/// How much of a conversation, an array of messages, the agent holds as of its last save, and where the two part.
/// kInvalidArgument for what is no message.
Json compare_messages(Engine& engine, const AgentName& agent, const Json& messages);

/// Saves the agent if it has changed, and sends it as Store::export_agent writes it.
void send_export(Engine& engine, const AgentName& agent, HttpResponse& response);

/// {"error": {"code", "message", ...}}, in the tenant's own names for its agents.
Json error_json(const Error& error, const std::string& tenant);

}  // namespace torpor::server
