#pragma once
/// The body of POST /v1/responses.

#include <map>
#include <string>
#include <utility>

#include "server/fields.h"
#include "server/response_store.h"

namespace torpor::server {

struct ResponseRequest {
  ChatRequest chat;
  Json input = Json::array();  ///< the items of this request
  Json items = Json::array();  ///< the whole conversation
  bool store = true;
  bool encrypted_content = false;  ///< reasoning items shall have it
  /// Of tools that a client declares in a namespace: the name by which the model knows it, to namespace and name.
  std::map<std::string, std::pair<std::string, std::string>> namespaces;
};

ResponseRequest read_response_request(const HttpRequest& http, Field body, ResponseStore& store);

/// The answer of a request that went before. Failure kNotFound when it is not kept, or not any more.
StoredResponse stored_response(const std::string& tenant, const std::string& id, ResponseStore& store,
                               const std::string& param);

}  // namespace torpor::server
