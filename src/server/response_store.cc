#include "server/response_store.h"

namespace torpor::server {
void ResponseStore::put(const StoredResponse& stored) {
  const Json json{{"response", stored.response}, {"items", stored.items}, {"input", stored.input}};
  shelf_.put(stored.tenant, stored.id, to_text(json));
}

std::optional<StoredResponse> ResponseStore::find(const std::string& tenant, const std::string& id) {
  const auto text = shelf_.find(tenant, id);
  if (!text) return std::nullopt;
  try {
    const Json json = parse_json<Json>(*text);
    return StoredResponse{id, tenant, json.at("response"), json.at("items"), json.at("input")};
  } catch (const Json::exception&) {
    return std::nullopt;  // this version did not write it
  }
}

bool ResponseStore::remove(const std::string& tenant, const std::string& id) { return shelf_.remove(tenant, id); }

}  // namespace torpor::server
