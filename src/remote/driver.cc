#include "remote/driver.h"

#include <time.h>

#include "base/parallel.h"
#include "torpor/error.h"

namespace torpor::remote {
namespace {

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

Instant clock_now() {
#ifdef CLOCK_BOOTTIME
  constexpr clockid_t kClock = CLOCK_BOOTTIME;  // it goes on while the machine sleeps
#else
  constexpr clockid_t kClock = CLOCK_MONOTONIC;  // so does this one where there is no other
#endif
  timespec now{};
  ::clock_gettime(kClock, &now);
  return std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec);
}

void Driver::cancel() noexcept {
  const MutexLock lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

void Driver::throw_if_cancelled() const {
  if (cancelled_) throw Error(ErrorCode::kCancelled, "What was asked of the bucket was cancelled.");
}

void Driver::wait(Instant time) {
  const Instant end = clock_now() + time;
  MutexLock lock(mutex_);
  for (Instant now = clock_now(); now < end && !cancelled_; now = clock_now()) changed_.wait_for(lock, end - now);
}

std::vector<Answer> Driver::answer_all(const std::vector<Request>& requests, const Blobs& blobs) {
  std::vector<Answer> answers(requests.size());
  parallel_for(requests.size(), most_at_once_, [&](size_t i) { answers[i] = answer(requests[i], blobs); });
  throw_if_cancelled();
  return answers;
}

Answer Driver::answer(const Request& request, const Blobs& blobs) {
  throw_if_cancelled();
  Answer answer;
  answer.sent = clock_now();
  try {
    make(request, blobs, answer);
  } catch (const LostAnswer&) {
    answer.status = Answer::Status::kLost;
    answer.error = std::current_exception();
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kCancelled) throw;
    const bool reads = request.kind == Request::Kind::kRead;
    answer.status = reads && error.code() == ErrorCode::kNotFound     ? Answer::Status::kAbsent
                    : reads && error.code() == ErrorCode::kCorruption ? Answer::Status::kDamaged
                                                                      : Answer::Status::kRefused;
    answer.error = std::current_exception();
  }
  answer.received = clock_now();
  return answer;
}

void Driver::make(const Request& request, const Blobs& blobs, Answer& answer) {
  switch (request.kind) {
    case Request::Kind::kPut: {
      const Blob blob = request.blob ? blobs(*request.blob) : Blob{};
      std::vector<std::byte> joined;
      std::span<const std::byte> bytes = std::as_bytes(std::span(request.text));
      if (bytes.empty()) {
        bytes = blob.bytes;
      } else if (!blob.bytes.empty()) {
        joined.reserve(bytes.size() + blob.bytes.size());
        joined.assign(bytes.begin(), bytes.end());
        joined.insert(joined.end(), blob.bytes.begin(), blob.bytes.end());
        bytes = joined;
      }
      PutResult put = store_.put(request.key, bytes, request.condition);
      if (put.status == PutStatus::kPrecondition) answer.status = Answer::Status::kPrecondition;
      answer.tag = std::move(put.tag);
      break;
    }
    case Request::Kind::kGet:
      if (std::optional<Object> object = store_.get(request.key, request.bytes)) {
        answer.tag = std::move(object->info.tag);
        answer.text = text_of(object->bytes);
      } else {
        answer.status = Answer::Status::kAbsent;
      }
      break;
    case Request::Kind::kRead:
      answer.text.resize(size_t(request.bytes));
      store_.read(request.key, request.offset, std::as_writable_bytes(std::span(answer.text)));
      break;
    case Request::Kind::kList: answer.objects = store_.list(request.key); break;
    case Request::Kind::kRemove: store_.remove(request.key); break;
    case Request::Kind::kWait: wait(request.wait); break;
  }
}

}  // namespace torpor::remote
