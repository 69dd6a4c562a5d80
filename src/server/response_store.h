#pragma once
/// Answers of /v1/responses that later requests go on from.

#include <optional>
#include <string>

#include "server/answer_shelf.h"
#include "server/chat.h"

namespace torpor::server {

struct StoredResponse {
  std::string id, tenant;
  Json response;  ///< as it was answered
  Json items;     ///< the whole conversation: all input, then this answer's output
  Json input;     ///< of this request alone
};

/// Keeps them on an AnswerShelf, 30 days unless told otherwise. Each belongs to its tenant. Any thread may call.
class ResponseStore {
 public:
  static constexpr AnswerShelf::Limits kLimits{std::chrono::hours(24 * 30), 4096, size_t(256) << 20};
  explicit ResponseStore(AnswerFiles files, AnswerShelf::Limits limits = kLimits) : shelf_("response", limits, files) {}

  /// As AnswerShelf::put.
  void put(const StoredResponse& response);
  /// nullopt when there is none, or it is another tenant's.
  std::optional<StoredResponse> find(const std::string& tenant, const std::string& id);
  bool remove(const std::string& tenant, const std::string& id);

 private:
  AnswerShelf shelf_;
};

}  // namespace torpor::server
