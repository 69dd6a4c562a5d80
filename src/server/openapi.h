#pragma once
/// What is described of the server's routes, by OpenAPI 3.1.

#include <string_view>

#include "server/chat.h"

namespace torpor::server {

/// src/server/openapi.json: all routes but those of AgentsApi, which describes its own, and the schemas of both. A part of a path
/// in braces stands for any one part. With "x-slashes" in its parameter it stands for all that follows. Any thread.
const Json& described_routes();
/// The bytes of that file, which are in the program; empty for another name.
std::string_view openapi_file(std::string_view name);

}  // namespace torpor::server
