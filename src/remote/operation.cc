#include "remote/operation.h"

#include <algorithm>

namespace torpor::remote {
namespace {

constexpr int kTries = 4;
constexpr size_t kBatch = 64;  ///< requests made side by side
constexpr Instant kBeforeAskingAgain = std::chrono::milliseconds(50);  ///< then four times that, and so on

}  // namespace

Request put_request(std::string key, std::string text, Condition condition, std::optional<size_t> blob) {
  Request request;
  request.kind = Request::Kind::kPut;
  request.key = std::move(key);
  request.text = std::move(text);
  request.condition = std::move(condition);
  request.blob = blob;
  return request;
}

Request get_request(std::string key, uint64_t most_bytes) {
  Request request;
  request.bytes = most_bytes;
  request.key = std::move(key);
  return request;
}

Request read_request(std::string key, uint64_t offset, uint64_t bytes) {
  Request request;
  request.kind = Request::Kind::kRead;
  request.key = std::move(key);
  request.offset = offset;
  request.bytes = bytes;
  return request;
}

Request list_request(std::string prefix) {
  Request request;
  request.kind = Request::Kind::kList;
  request.key = std::move(prefix);
  return request;
}

Request remove_request(std::string key) {
  Request request;
  request.kind = Request::Kind::kRemove;
  request.key = std::move(key);
  return request;
}

Request wait_request(Instant time) {
  Request request;
  request.kind = Request::Kind::kWait;
  request.wait = time;
  return request;
}

Operation<Swap> swap(Exchange& exchange, std::string key, Condition condition, std::string text) {
  Swap result;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    Answer put = co_await exchange.ask(put_request(key, text, condition));
    if (put.status == Answer::Status::kRefused) {
      if (attempt == 0) std::rethrow_exception(put.error);
      co_return result;  // an earlier put may be applied still
    }
    if (put.done()) {
      result.outcome = Swap::Outcome::kDone;
      result.tag = std::move(put.tag);
      co_return result;
    }
    Answer found = co_await exchange.ask(get_request(key));
    if (found.status == Answer::Status::kRefused) co_return result;  // what the put did is not known
    if (found.status == Answer::Status::kLost) continue;
    const bool absent = found.status == Answer::Status::kAbsent;
    if (!absent && found.text == text) {
      result.outcome = Swap::Outcome::kDone;
      result.tag = std::move(found.tag);
      co_return result;
    }
    const bool as_before = absent ? condition.kind == Condition::Kind::kAbsent
                                  : condition.kind == Condition::Kind::kTag && condition.tag == found.tag;
    if (as_before) continue;  // not applied yet: the same text again does no harm
    result.outcome = Swap::Outcome::kOther;
    result.tag = std::move(found.tag);
    if (!absent) result.text = std::move(found.text);
    co_return result;
  }
  co_return result;
}

Operation<std::vector<Answer>> ask_all_firmly(Exchange& exchange, std::vector<Request> requests,
                                              bool damaged_too) {
  std::vector<Answer> all(requests.size());
  for (size_t first = 0; first < requests.size(); first += kBatch) {
    std::vector<size_t> open;
    for (size_t i = first; i < std::min(requests.size(), first + kBatch); ++i) open.push_back(i);
    for (int attempt = 1; !open.empty(); ++attempt) {
      // Another put of the object may be under way.
      if (attempt > 1) co_await exchange.ask(wait_request(kBeforeAskingAgain * (1 << 2 * (attempt - 2))));
      std::vector<Request> asked;
      for (size_t i : open) asked.push_back(requests[i]);
      std::vector<Answer> answers = co_await exchange.ask_all(std::move(asked));
      std::vector<size_t> lost;
      for (size_t k = 0; k < open.size(); ++k) {
        using Status = Answer::Status;
        const Status status = answers[k].status;
        const bool is_lost = status == Status::kLost;
        const bool is_damaged = status == Status::kDamaged && !damaged_too;
        if (status == Status::kRefused || is_damaged || (is_lost && attempt == kTries)) {
          std::rethrow_exception(answers[k].error);
        }
        if (is_lost) lost.push_back(open[k]);
        all[open[k]] = std::move(answers[k]);
      }
      open = std::move(lost);
    }
  }
  co_return all;
}

Operation<Answer> ask_firmly(Exchange& exchange, Request request) {
  std::vector<Request> one;
  one.push_back(std::move(request));
  std::vector<Answer> answers = co_await ask_all_firmly(exchange, std::move(one));
  co_return std::move(answers.front());
}

}  // namespace torpor::remote
