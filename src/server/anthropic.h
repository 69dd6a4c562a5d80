#pragma once
/// Anthropic's dialect: messages, and the count of a prompt's tokens.

#include "server/chat.h"
#include "server/http.h"

namespace torpor::server {

/// POST /v1/messages.
void answer_messages(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);
/// POST /v1/messages/count_tokens.
void answer_count_tokens(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);

}  // namespace torpor::server
