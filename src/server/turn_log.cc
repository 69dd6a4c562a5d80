#include "server/turn_log.h"

#include <utility>

namespace torpor::server {

template <typename Change>
void TurnLog::change(uint64_t id, Change change) {
  const MutexLock lock(mutex_);
  change(running_.at(id));
}

TurnLog::Turn::Turn(TurnLog& log, const std::string& tenant, const std::string& agent) : log_(log) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  TurnRecord record;
  record.tenant = tenant;
  record.agent = agent;
  record.begun_at = std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
  const MutexLock lock(log_.mutex_);
  record.id = id_ = ++log_.last_;
  log_.running_.emplace(id_, std::move(record));
}

TurnLog::Turn::~Turn() {
  if (!ended_) end("error", 0);
}

double TurnLog::Turn::lap() {
  const Clock::time_point before = std::exchange(since_, Clock::now());
  return std::chrono::duration<double, std::milli>(since_ - before).count();
}

void TurnLog::Turn::starts(int prompt_tokens, int cached_tokens) {
  log_.change(id_, [&](TurnRecord& record) {
    if (record.state == TurnRecord::State::kWaiting) {
      record.waited_ms = lap();
      record.state = TurnRecord::State::kReading;
    }
    record.prompt_tokens = prompt_tokens;
    record.cached_tokens = cached_tokens;
  });
}

void TurnLog::Turn::reads(int done, int total) {
  log_.change(id_, [&](TurnRecord& record) {
    if (record.state == TurnRecord::State::kWaiting) {
      record.waited_ms = lap();
      record.state = TurnRecord::State::kReading;
    }
    record.done = done;
    record.total = total;
  });
}

void TurnLog::Turn::answers() {
  log_.change(id_, [&](TurnRecord& record) {
    if (record.state == TurnRecord::State::kAnswering) return;
    (record.state == TurnRecord::State::kWaiting ? record.waited_ms : record.read_ms) = lap();
    record.state = TurnRecord::State::kAnswering;
  });
}

void TurnLog::Turn::end(const std::string& reason, int generated_tokens, const std::string& missed,
                        const std::string& agent) {
  if (std::exchange(ended_, true)) return;
  const MutexLock lock(log_.mutex_);
  TurnRecord record = std::move(log_.running_.extract(id_).mapped());
  switch (record.state) {
    case TurnRecord::State::kWaiting: record.waited_ms = lap(); break;
    case TurnRecord::State::kReading: record.read_ms = lap(); break;
    default: record.answered_ms = lap();
  }
  record.state = TurnRecord::State::kEnded;
  record.reason = reason;
  record.generated_tokens = generated_tokens;
  record.missed = missed;
  if (!agent.empty()) record.agent = agent;
  log_.ended_.push_front(std::move(record));
  if (log_.ended_.size() > kKept) log_.ended_.pop_back();
}

std::vector<TurnRecord> TurnLog::running(const std::string& tenant) const {
  std::vector<TurnRecord> found;
  const MutexLock lock(mutex_);
  for (const auto& [id, record] : running_) {
    if (record.tenant == tenant) found.push_back(record);
  }
  return found;
}

size_t TurnLog::running() const {
  const MutexLock lock(mutex_);
  return running_.size();
}

std::vector<TurnRecord> TurnLog::ended(const std::string& tenant) const {
  std::vector<TurnRecord> found;
  const MutexLock lock(mutex_);
  for (const TurnRecord& record : ended_) {
    if (record.tenant == tenant) found.push_back(record);
  }
  return found;
}

}  // namespace torpor::server
