#pragma once
/// The models that there are, as OpenAI and Anthropic list them.

#include <cstdint>
#include <filesystem>
#include <string>

#include "server/chat.h"
#include "server/http.h"

namespace torpor::server {

/// "2026-11-25T10:00:00Z".
std::string utc_time(int64_t seconds);

/// When the model in a directory was made: seconds since the epoch, 0 where that can't be known.
int64_t model_time(const std::filesystem::path& dir);

/// Failure kNotFound when there is none of that name.
ModelEntry find_model(TurnRunner& runner, const std::string& name);

void answer_models(const HttpRequest& http, TurnRunner& runner, HttpResponse& response);
void answer_model(const HttpRequest& http, const std::string& name, TurnRunner& runner, HttpResponse& response);

}  // namespace torpor::server
