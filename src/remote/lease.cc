#include "remote/lease.h"

#include <string_view>

#include "torpor/error.h"

namespace torpor::remote {
namespace {

constexpr int kAttempts = 3;

/// A damaged lease counts as one of the usual TTL: nobody renews it.
Lease lease_of(const Answer& answer, const std::string& session, const std::string& key) {
  try {
    return decode_lease(answer.text, key);
  } catch (const Error&) {
    Lease unread;
    unread.session = session;
    return unread;
  }
}

}  // namespace

Operation<bool> LeaseKeeper::renew(Exchange& exchange) {
  const std::string key = lease_key(lease_.session);
  Answer sweep = co_await exchange.ask(get_request(kSweepKey));
  if (sweep.done()) generations_->learn(decode_sweep(sweep.text, kSweepKey).generation);
  may_answer(sweep.received);  // after a pause: whoever sees a tag that is new waits for as long again
  for (int attempt = 0; attempt < kAttempts && !over_; ++attempt) {
    ++lease_.renewals;  // each text is put once: one whose answer was lost may still come to stand
    lease_.generation = generations_->announced();
    const std::string text = encode(lease_);
    Condition condition = tag_.empty() ? Condition::absent() : Condition::of_tag(tag_);
    // Observers see the new tag after this put was sent, never before.
    Answer put = co_await exchange.ask(put_request(key, text, std::move(condition)));
    Answer found;
    if (!put.done()) {
      may_answer(put.received);
      if (over_) break;
      found = co_await exchange.ask(get_request(key));
      if (found.status == Answer::Status::kAbsent && stands_) over_ = true;  // a sweep took this worker for dead
      may_answer(found.received);
      if (!found.done()) continue;
    }
    tag_ = put.done() ? std::move(put.tag) : std::move(found.tag);
    if (put.done() || found.text == text) {
      may_answer(put.sent);  // too late is too late
      renewed_ = put.sent;
      stands_ = true;
      co_return !over_;
    }
  }
  co_return false;
}

bool LeaseKeeper::may_answer(Instant now) {
  if (stands_ && now - renewed_ >= std::chrono::milliseconds(lease_.ttl_ms)) over_ = true;
  return stands_ && !over_;
}

Operation<bool> LeaseWatch::look(Exchange& exchange, bool read_all) {
  const std::set<std::string> sought = sought_;
  Answer listed = co_await exchange.ask(list_request(kNodesPrefix));
  if (!listed.done()) co_return false;
  std::map<std::string, Seen> seen;
  std::vector<Request> reads;
  std::vector<std::string> read, tags;
  for (const ObjectInfo& object : listed.objects) {
    const std::string session = object.key.substr(std::string_view(kNodesPrefix).size());
    if (!is_name(session)) continue;
    const auto known = seen_.find(session);
    const bool same = known != seen_.end() && known->second.tag == object.tag;
    if (known == seen_.end() || (read_all && known->second.read_tag != object.tag)) {
      reads.push_back(get_request(object.key));
      read.push_back(session);
      tags.push_back(object.tag);
    } else {
      Seen now = known->second;
      if (!same) now.since = listed.received;
      now.tag = object.tag;
      now.asked = listed.sent;
      seen.emplace(session, std::move(now));
    }
  }
  const std::vector<Answer> answers = co_await exchange.ask_all(reads);
  for (size_t i = 0; i < reads.size(); ++i) {
    if (answers[i].status == Answer::Status::kAbsent) continue;
    if (answers[i].status == Answer::Status::kLost) co_return false;
    const auto known = seen_.find(read[i]);
    const bool same = known != seen_.end() && known->second.tag == tags[i];
    seen[read[i]] = {.lease = lease_of(answers[i], read[i], reads[i].key), .tag = tags[i], .read_tag = tags[i],
                     .since = same ? known->second.since : answers[i].received, .asked = listed.sent};
  }
  seen_ = std::move(seen);
  for (const std::string& session : sought) {
    if (seen_.count(session) == 0) gone_.insert(session);
  }
  co_return true;
}

bool LeaseWatch::is_gone(const std::string& session) {
  sought_.insert(session);
  if (gone_.count(session) > 0) return true;
  const auto seen = seen_.find(session);
  return seen != seen_.end() && seen->second.is_gone();
}

const Lease* LeaseWatch::lease(const std::string& session) const {
  const auto seen = seen_.find(session);
  return seen == seen_.end() ? nullptr : &seen->second.lease;
}

}  // namespace torpor::remote
