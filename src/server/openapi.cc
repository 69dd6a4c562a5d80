#include "server/openapi.h"

namespace torpor::server {

const Json& described_routes() {
  static const Json kRoutes = parse_json<Json>(openapi_file("openapi.json"));
  return kRoutes;
}

}  // namespace torpor::server
