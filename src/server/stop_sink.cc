#include "server/stop_sink.h"

#include <algorithm>

namespace torpor::server {

void StopSink::release() {
  if (!waiting_.empty() && !withhold_text_) sink_.text(waiting_);
  position_ += waiting_.size();
  waiting_.clear();
}

void StopSink::text(std::string_view delta) {
  if (!met_.empty()) return;
  if (waiting_.empty() && parser_ != nullptr) position_ = parser_->position();
  waiting_ += delta;
  size_t first = std::string::npos;
  for (const std::string& stop : stop_) {
    const size_t at = waiting_.find(stop);
    if (at < first || (at == first && at != std::string::npos && stop.size() > met_.size())) {
      first = at;
      met_ = stop;
    }
  }
  if (!met_.empty()) {
    waiting_.resize(first);
    release();
    return;
  }
  size_t kept = 0;
  for (const std::string& stop : stop_) {
    for (size_t n = std::min(stop.size() - 1, waiting_.size()); n > kept; --n) {
      if (std::string_view(waiting_).ends_with(std::string_view(stop).substr(0, n))) kept = n;
    }
  }
  std::string rest = waiting_.substr(waiting_.size() - kept);
  waiting_.resize(waiting_.size() - kept);
  release();
  waiting_ = std::move(rest);
}

void StopSink::thinking(std::string_view delta) {
  if (!met_.empty()) return;
  release();
  sink_.thinking(delta);
}

void StopSink::tool_call(const std::string& name) {
  if (!met_.empty()) return;
  release();
  sink_.tool_call(name);
}

void StopSink::arguments(std::string_view delta) {
  if (met_.empty()) sink_.arguments(delta);
}

void StopSink::finish(const AnswerEnd& end) {
  release();
  sink_.finish(end);
}

}  // namespace torpor::server
