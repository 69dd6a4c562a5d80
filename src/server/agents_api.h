#pragma once
/// /torpor/v1: agents over HTTP, in Torpor's own form, and its OpenAPI description. Within v1 members are only ever
/// added.
///
/// A tenant sees and names its own agents alone (server/keys.h). A failure is {"error": {"code", "message", ...}} with
/// the code of torpor::Error and the status of faces/error_table.h.

#include "server/http.h"
#include "torpor/engine.h"

namespace torpor::server {

/// Several threads call `handle` at a time.
class AgentsApi : public HttpHandler {
 public:
  /// `engine` must live longer.
  explicit AgentsApi(Engine& engine) : engine_(engine) {}
  void handle(const HttpRequest& request, HttpResponse& response) override;

 private:
  Engine& engine_;
};

}  // namespace torpor::server
