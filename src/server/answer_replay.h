#pragma once
/// Answers that a retry gets again: requests with an `Idempotency-Key`.

#include <functional>
#include <map>
#include <string>

#include "base/mutex.h"
#include "server/answer_shelf.h"
#include "server/http.h"

namespace torpor::server {

/// Keeps complete answers of success on an AnswerShelf, an hour unless told otherwise. A key is its tenant's and its
/// path's. Any thread may call.
class AnswerReplay {
 public:
  // Clients repeat within minutes.
  static constexpr AnswerShelf::Limits kLimits{std::chrono::hours(1), 4096, size_t(64) << 20};
  explicit AnswerReplay(AnswerFiles files, AnswerShelf::Limits limits = kLimits) : shelf_("replay", limits, files) {}

  using Answer = std::function<void(HttpResponse&)>;
  /// Answers a request that has an Idempotency-Key: with the answer that this key has got before, else by `answer`, and
  /// keeps that before its last byte is sent, unless it fails. What can't be kept is answered all the same, and the log
  /// told. Failure kInvalid when the key came with another body, and kBusy, with a time to come again, while a request
  /// with it is being answered. Other requests are `answer`'s alone.
  void handle(const HttpRequest& request, HttpResponse& response, const Answer& answer);

 private:
  class Running;

  AnswerShelf shelf_;
  Mutex mutex_;
  /// Digests of the bodies that are being answered, by tenant, path and key.
  std::map<std::string, std::string> running_ TORPOR_GUARDED_BY(mutex_);
};

}  // namespace torpor::server
