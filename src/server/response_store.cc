#include "server/response_store.h"

namespace torpor::server {
namespace {

std::string key_of(const std::string& tenant, const std::string& id) { return to_text(Json::array({tenant, id})); }

}  // namespace

void ResponseStore::put(const StoredResponse& stored) {
  const Json json{{"response", stored.response}, {"items", stored.items}, {"input", stored.input}};
  shelf_.put(key_of(stored.tenant, stored.id), to_text(json));
}

std::optional<StoredResponse> ResponseStore::find(const std::string& tenant, const std::string& id) {
  const auto text = shelf_.find(key_of(tenant, id));
  if (!text) return std::nullopt;
  try {
    const Json json = Json::parse(*text);
    return StoredResponse{id, tenant, json.at("response"), json.at("items"), json.at("input")};
  } catch (const Json::exception&) {
    return std::nullopt;  // this version did not write it
  }
}

bool ResponseStore::remove(const std::string& tenant, const std::string& id) { return shelf_.remove(key_of(tenant, id)); }

}  // namespace torpor::server
