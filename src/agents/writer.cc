#include "agents/writer.h"

#include <algorithm>
#include <system_error>
#include <utility>

namespace torpor {

Writer::Writer(Store& store, Durability durability, size_t max_bytes)
    : store_(store), durability_(durability), max_bytes_(max_bytes) {
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    throw Error(ErrorCode::kResourceExhausted, std::string("No thread could be started for saves: ") + error.what() +
                                                   "; end other programs, or raise the limit of threads.");
  }
}

Writer::~Writer() {
  {
    const MutexLock lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Writer::submit(Job job) {
  MutexLock lock(mutex_);
  const auto waiting = std::find_if(queue_.begin() + (writing_ ? 1 : 0), queue_.end(),
                                    [&](const Queued& queued) { return queued.job.ticket == job.ticket; });
  if (waiting != queue_.end()) {
    // The newer state holds all of the older one's rows. What is on disk meanwhile is the state before both.
    bytes_ += job.new_bytes - waiting->job.new_bytes;
    waiting->job = std::move(job);
    return;
  }
  while (!queue_.empty() && bytes_ + job.new_bytes > max_bytes_) changed_.wait(lock);
  bytes_ += job.new_bytes;
  queue_.emplace_back(std::move(job));
  changed_.notify_all();
}

bool Writer::busy_with(uint64_t ticket) const {
  return std::any_of(queue_.begin(), queue_.end(), [&](const Queued& queued) { return queued.job.ticket == ticket; });
}

Writer::Saving Writer::await(uint64_t ticket) {
  const MutexLock lock(mutex_);
  const auto newest =
      std::find_if(queue_.rbegin(), queue_.rend(), [&](const Queued& queued) { return queued.job.ticket == ticket; });
  if (newest == queue_.rend()) {
    // It may have ended already, and then how is still to be collected.
    const auto ended = std::find_if(outcomes_.rbegin(), outcomes_.rend(),
                                    [&](const Outcome& outcome) { return outcome.ticket == ticket; });
    std::promise<SaveResult> known;
    if (ended == outcomes_.rend()) {
      known.set_value({});
    } else {
      ended->awaited = true;
      tell(known, *ended);
    }
    return known.get_future().share();
  }
  if (!newest->awaited) newest->saving = newest->awaited.emplace().get_future().share();
  return newest->saving;
}

void Writer::wait(uint64_t ticket) {
  MutexLock lock(mutex_);
  while (busy_with(ticket)) changed_.wait(lock);
}

void Writer::wait_all(const Progress& progress, size_t submitted) {
  MutexLock lock(mutex_);
  const size_t total = std::max(submitted, queue_.size());
  while (!queue_.empty()) {
    const size_t left = queue_.size();
    if (progress) {
      lock.unlock();
      progress(int(total - std::min(total, left)), int(total));
      lock.lock();
    }
    while (queue_.size() == left) changed_.wait(lock);
  }
  lock.unlock();
  if (progress && total > 0) progress(int(total), int(total));
}

void Writer::tell(std::promise<SaveResult>& promise, const Outcome& outcome) {
  if (outcome.error) {
    promise.set_exception(std::make_exception_ptr(*outcome.error));
  } else {
    promise.set_value(outcome.result);
  }
}

std::vector<Writer::Outcome> Writer::collect() {
  const MutexLock lock(mutex_);
  return std::exchange(outcomes_, {});
}

size_t Writer::queued_bytes() const {
  const MutexLock lock(mutex_);
  return bytes_;
}

Writer::Outcome Writer::write(const Job& job) {
  Outcome outcome{.agent = job.agent, .ticket = job.ticket, .version = job.version};
  try {
    outcome.result = job.agent.empty() ? store_.save_prefix(job.snapshot, durability_)
                                       : store_.save_agent_cache(job.agent, job.snapshot, job.model, job.user,
                                                                 durability_, job.notes);
  } catch (const Error& error) {
    outcome.error = error;
  } catch (const std::bad_alloc&) {
    outcome.error.emplace(ErrorCode::kResourceExhausted, "Out of memory while saving agent '" + job.agent + "'.");
  } catch (const std::exception& error) {
    outcome.error.emplace(ErrorCode::kInternal, "Saving agent '" + job.agent + "' failed: " + error.what());
  }
  return outcome;
}

void Writer::run() {
  MutexLock lock(mutex_);
  while (true) {
    while (!closing_ && queue_.empty()) changed_.wait(lock);
    if (queue_.empty()) return;
    writing_ = true;
    Queued& front = queue_.front();  // stays where it is: a deque's ends move, its elements don't
    lock.unlock();
    Outcome outcome = write(front.job);
    lock.lock();
    writing_ = false;
    bytes_ -= front.job.new_bytes;
    outcome.awaited = front.awaited.has_value();
    outcomes_.push_back(outcome);
    Queued done = std::move(front);
    queue_.pop_front();
    lock.unlock();
    done.job = {};  // lets go of memory before waiters count it
    if (done.awaited) tell(*done.awaited, outcome);
    changed_.notify_all();
    lock.lock();
  }
}

}  // namespace torpor
