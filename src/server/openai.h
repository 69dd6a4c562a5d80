#pragma once
/// OpenAI's dialect: chat completions, and completions.

#include "server/chat.h"
#include "server/http.h"

namespace torpor::server {

/// What OpenAI's clients bear during a long silence: a comment. An event without JSON data would break their parsers.
inline constexpr const char* kOpenAiKeepAlive = ": keep-alive\n\n";

/// `usage` as chat completions and completions count it: cached tokens are among the prompt's.
Json usage_json(const AnswerEnd& end);

/// POST /v1/chat/completions.
void answer_chat_completions(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);
/// POST /v1/completions: text that is continued as it stands.
void answer_completions(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);

}  // namespace torpor::server
