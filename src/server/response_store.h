#pragma once
/// Answers of /v1/responses that later requests go on from.

#include <chrono>
#include <deque>
#include <optional>
#include <string>

#include "base/mutex.h"
#include "server/chat.h"

namespace torpor::server {

struct StoredResponse {
  std::string id, tenant;
  Json response;  ///< as it was answered
  Json items;     ///< the whole conversation: all input, then this answer's output
  Json input;     ///< of this request alone
};

/// Keeps answers in memory until they are `lifetime` old, or until newer ones have used up `count` or `bytes`: the
/// oldest goes first. Each belongs to its tenant. Any thread may call.
class ResponseStore {
 public:
  struct Limits {
    std::chrono::seconds lifetime = std::chrono::hours(24 * 30);
    size_t count = 4096;
    size_t bytes = size_t(256) << 20;
  };
  explicit ResponseStore(Limits limits) : limits_(limits) {}

  void put(StoredResponse response);
  /// nullopt when there is none, or it is another tenant's.
  std::optional<StoredResponse> find(const std::string& tenant, const std::string& id);
  bool remove(const std::string& tenant, const std::string& id);

 private:
  struct Entry {
    StoredResponse response;
    size_t bytes;
    std::chrono::steady_clock::time_point stored;
  };
  std::deque<Entry>::iterator locate(const std::string& tenant, const std::string& id) TORPOR_REQUIRES(mutex_);
  void drop_old() TORPOR_REQUIRES(mutex_);

  Limits limits_;
  Mutex mutex_;
  std::deque<Entry> entries_ TORPOR_GUARDED_BY(mutex_);  // oldest first
  size_t bytes_ TORPOR_GUARDED_BY(mutex_) = 0;
};

}  // namespace torpor::server
