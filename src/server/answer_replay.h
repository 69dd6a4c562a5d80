#pragma once
/// Answers that a retry gets again: requests with an `Idempotency-Key`.

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>

#include "base/mutex.h"
#include "server/http.h"

namespace torpor::server {

/// Keeps complete answers of status 200 for an hour, or until newer ones have used up the bytes: the oldest goes first.
/// A key is
/// its tenant's and its path's. Any thread may call.
class AnswerReplay {
 public:
  explicit AnswerReplay(size_t most_bytes = size_t(64) << 20) : most_bytes_(most_bytes) {}

  using Answer = std::function<void(HttpResponse&)>;
  /// Answers a request that has an Idempotency-Key: with the answer that this key has got before, else by `answer`, and
  /// keeps
  /// that unless it throws. Failure kInvalid when the key came with another body. Other requests are `answer`'s alone.
  void handle(const HttpRequest& request, HttpResponse& response, const Answer& answer);

 private:
  struct Entry {
    std::string key;
    std::string body_digest;
    HttpHeaders headers;
    std::string body;
    bool streamed;
    std::chrono::steady_clock::time_point kept;
  };
  bool replay(const std::string& key, const std::string& digest, HttpResponse& response);
  void keep(Entry entry);

  size_t most_bytes_;
  Mutex mutex_;
  std::deque<Entry> entries_ TORPOR_GUARDED_BY(mutex_);  // oldest first
  size_t bytes_ TORPOR_GUARDED_BY(mutex_) = 0;
};

}  // namespace torpor::server
