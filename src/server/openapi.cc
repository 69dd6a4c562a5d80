#include "server/openapi.h"

namespace torpor::server {

const Json& described_routes() {
  static const Json kRoutes = Json::parse(openapi_file("openapi.json"));
  return kRoutes;
}

}  // namespace torpor::server
