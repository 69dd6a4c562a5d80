#pragma once
/// Ollama's dialect: what its clients need to list models and to chat. Models are neither pulled nor made.

#include "server/chat.h"
#include "server/http.h"

namespace torpor::server {

/// POST /api/chat and /api/generate.
void answer_ollama_chat(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);
void answer_ollama_generate(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);
/// GET /api/tags, /api/ps and /api/version; POST /api/show.
void answer_ollama_tags(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);
void answer_ollama_ps(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);
void answer_ollama_version(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);
void answer_ollama_show(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);

}  // namespace torpor::server
