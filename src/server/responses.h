#pragma once
/// OpenAI's dialect of responses: /v1/responses.

#include <string>

#include "server/chat.h"
#include "server/http.h"
#include "server/response_store.h"

namespace torpor::server {

/// POST /v1/responses.
void create_response(const HttpRequest& http, TurnRunner& runner, ResponseStore& store, HttpResponse& response);
/// GET and DELETE /v1/responses/ID, and GET /v1/responses/ID/input_items.
void get_response(const HttpRequest& http, const std::string& id, ResponseStore& store, HttpResponse& response);
void delete_response(const HttpRequest& http, const std::string& id, ResponseStore& store, HttpResponse& response);
void list_input_items(const HttpRequest& http, const std::string& id, ResponseStore& store, HttpResponse& response);

}  // namespace torpor::server
