#include "remote/session.h"

#include <algorithm>

#include "base/env.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor::remote {
namespace {

Lease lease_of(const std::string& session, const SessionOptions& options) {
  Lease lease;
  lease.session = session;
  lease.address = options.address;
  lease.ttl_ms = options.ttl.count();
  return lease;
}

}  // namespace

Session::Session(Driver& driver, SessionOptions options)
    : driver_(driver), options_(std::move(options)), name_("s-" + Env::posix().random_id()),
      renew_every_(std::chrono::nanoseconds(options_.ttl) / 3), keeper_(lease_of(name_, options_), generations_) {
  if (!driver_.run([&](Exchange& e) { return keeper_.renew(e); }, {}, &mutex_)) {
    // The lease's own requests keep their errors to themselves: this one tells why.
    driver_.run([&](Exchange& e) { return ask_firmly(e, get_request(lease_key(name_))); });
    throw Error(ErrorCode::kIo, "The lease '" + lease_key(name_) + "' could not be written to the bucket; try again.");
  }
  thread_ = std::thread([this] { renew_until_closed(); });
  try {
    ender_ = std::thread([this] { wait_for_end(); });
  } catch (...) {
    close();
    throw;
  }
}

void Session::close() {
  if (!thread_.joinable()) return;
  {
    const MutexLock lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  thread_.join();
  if (ender_.joinable()) ender_.join();
  try {
    driver_.run([&](Exchange& e) { return ask_firmly(e, remove_request(lease_key(name_))); });
  } catch (const std::exception& error) {
    log(LogLevel::kInfo, std::string("A lease is left in the bucket, where it runs out: ") + error.what());
  }
}

void Session::renew_until_closed() {
  do {
    const Instant begun = clock_now();
    {
      MutexLock lock(mutex_);
      for (Instant now = begun; now < begun + renew_every_ && !closed_; now = clock_now()) {
        changed_.wait_for(lock, begun + renew_every_ - now);
      }
      if (closed_) return;
    }
    try {
      driver_.run([&](Exchange& e) { return keeper_.renew(e); }, {}, &mutex_);
      if (may_answer()) look();
    } catch (const std::exception& error) {
      log(LogLevel::kInfo, std::string("The lease was not renewed this time: ") + error.what());
    }
  } while (may_answer());
}

void Session::wait_for_end() {
  // The machine may sleep meanwhile, which a wait does not count.
  const Instant most = std::chrono::nanoseconds(options_.ttl) / 10;
  {
    MutexLock lock(mutex_);
    for (Instant now = clock_now(); keeper_.may_answer(now); now = clock_now()) {
      if (closed_) return;
      changed_.wait_for(lock, std::min(most, keeper_.ends() - now));
    }
  }
  if (options_.on_end) options_.on_end();
}

bool Session::may_answer() {
  const MutexLock lock(mutex_);
  return keeper_.may_answer(clock_now());
}

bool Session::is_gone(const std::string& session) {
  const MutexLock lock(mutex_);
  return watch_.is_gone(session);
}

void Session::has_ended(const std::string& session) {
  const MutexLock lock(mutex_);
  watch_.has_ended(session);
}

bool Session::wait_until_gone(const std::string& session) {
  constexpr int kLooksInTtl = 10;
  std::string first;
  Instant every = std::chrono::milliseconds(1);  // of a session without a lease the second look knows
  for (int look_number = 0; look_number < 2 * kLooksInTtl; ++look_number) {
    if (look_number > 0) driver_.run([&](Exchange& e) { return ask_firmly(e, wait_request(every)); });
    look();
    const MutexLock lock(mutex_);
    if (watch_.is_gone(session)) return true;
    const auto seen = watch_.seen().find(session);
    if (seen == watch_.seen().end()) continue;
    if (first.empty()) first = seen->second.tag;
    if (first != seen->second.tag) return false;
    every = std::chrono::milliseconds(seen->second.lease.ttl_ms) / kLooksInTtl;
  }
  return false;
}

std::optional<std::string> Session::address_of(const std::string& session) {
  const MutexLock lock(mutex_);
  const Lease* const lease = watch_.lease(session);
  return lease == nullptr ? std::nullopt : std::optional(lease->address);
}

std::optional<LeaseWatch::Seen> Session::seen(const std::string& session) {
  const MutexLock lock(mutex_);
  const auto found = watch_.seen().find(session);
  return found == watch_.seen().end() ? std::nullopt : std::optional(found->second);
}

bool Session::look(Instant since) {
  MutexLock lock(mutex_);
  if (looks_ended_ == looks_begun_ && looked_ && look_began_ >= since) return true;
  const int64_t before = looks_begun_;
  while (looks_ended_ < looks_begun_) {
    changed_.wait(lock);
    if (looks_ended_ > before) return looked_;
  }
  ++looks_begun_;
  look_began_ = clock_now();
  lock.unlock();
  bool looked = false;
  std::exception_ptr failed;
  try {
    looked = driver_.run([&](Exchange& e) { return watch_.look(e); }, {}, &mutex_);
  } catch (...) {
    failed = std::current_exception();
  }
  lock.lock();
  looks_ended_ = looks_begun_;
  looked_ = looked;
  changed_.notify_all();
  if (failed) std::rethrow_exception(failed);
  return looked;
}

void Session::learn(int64_t generation) {
  const MutexLock lock(mutex_);
  generations_.learn(generation);
}

Session::Saving::Saving(Session& session) : session_(session), generation_([&] {
  const MutexLock lock(session.mutex_);
  return session.generations_.begin();
}()) {}

Session::Saving::~Saving() {
  const MutexLock lock(session_.mutex_);
  session_.generations_.end(generation_);
}

Swept Session::sweep_bucket(Instant look_every) {
  SweepOptions options;
  options.session = name_;
  options.save_ids = Env::posix().random_id().substr(0, 24);
  options.look_every = look_every;
  options.looks = int(std::max<int64_t>(std::chrono::minutes(1) / look_every, 2));
  const auto renew_every = [&](Instant time) {
    const MutexLock lock(mutex_);
    renew_every_ = time;
    changed_.notify_all();
  };
  const Instant usual = std::chrono::nanoseconds(options_.ttl) / 3;
  struct Usual {
    const std::function<void()> again;
    ~Usual() { again(); }
  } const back{[&] { renew_every(usual); }};
  renew_every(std::min(usual, look_every / 2));
  return driver_.run([&](Exchange& e) { return sweep(e, watch_, options); }, {}, &mutex_);
}

}  // namespace torpor::remote
