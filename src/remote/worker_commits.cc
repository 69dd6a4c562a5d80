/// A worker's commits, and what it knows of the store's copies.

#include <algorithm>
#include <utility>

#include "base/hash.h"
#include "base/json.h"
#include "remote/tier.h"
#include "remote/worker.h"
#include "remote/worker_errors.h"

namespace torpor::remote {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kPatience = 3;  ///< leases, for which the commit of a turn that is over is tried

}  // namespace

// ---- commits

void Worker::commit(const std::string& id, const std::optional<KnownTurn>& turn) {
  std::optional<Custody> custody = begin(id);
  if (!custody) throw elsewhere(id, "is not this worker's any more, and the change is not kept; ask again.");
  try {
    require_alive(id);
    // An agent's first commit is waited for: what is told of it is nowhere before.
    if (options_.ack == RemoteAck::kLocal && turn && !custody->version.head.file.empty()) {
      note_due(id, *custody, *turn);
      const MutexLock lock(mutex_);
      due_.push_back({id, std::move(*custody), *turn});
      changed_.notify_all();
      return;
    }
    custody = commit_copy(id, std::move(*custody), turn);
  } catch (const LostAnswer& error) {
    finish_in_doubt(id);
    throw uncommitted(id, error.what());
  } catch (const Error& error) {  // what the store has is not what was committed
    error.field() == kAgentElsewhere ? finish(id, std::nullopt) : finish_in_doubt(id);
    if (error.code() == ErrorCode::kCancelled) require_alive(id);
    throw;
  } catch (...) {
    finish_in_doubt(id);
    throw;
  }
  finish(id, std::move(custody));
}

Worker::Custody Worker::commit_copy(const std::string& id, Custody custody, const std::optional<KnownTurn>& turn) {
  const std::optional<std::string> copy = checksum_of_copy(id);
  const bool is_known = turn && !turn->id.empty();
  if (!copy || (!is_known && *copy == custody.checksum)) return custody;
  std::optional<Turn> known;
  if (is_known) known = Turn{turn->id, turn->digest, turn->result};
  const bool first = custody.checksum.empty();
  Pushed saved;
  {
    const Session::Saving saving(session_);
    saved = tier_.push_save(id, custody.version, custody.keys, saving.generation(),
                            {.turn = std::move(known), .damaged = custody.damaged,
                             .tail = options_.tail == RemoteTail::kTurn});
  }
  if (saved.outcome == Saved::Outcome::kMoved) {
    throw elsewhere(id, "was taken over by another worker, and the change is not kept; ask again.");
  }
  if (saved.outcome != Saved::Outcome::kCommitted) throw uncommitted(id, "no answer came");
  if (first) set_in_use(id);  // the copy is one from now on
  return {std::move(saved.version), std::move(saved.keys), {}, *copy, saved.without_tail};
}

// ---- commits of turns that are over

void Worker::note_due(const std::string& id, const Custody& custody, const KnownTurn& turn) {
  const Json note{{"agent", id}, {"base", custody.version.head.file}, {"copy", checksum_of_copy(id).value_or("")},
                  {"turn", turn.id}, {"digest", turn.digest}, {"result", turn.result}};
  store_.keep_record(use_of(id), dump_json(note, -1, Json::error_handler_t::replace), options_.durability);
}

std::optional<KnownTurn> Worker::due_turn(const std::string& id, const Head& head) const {
  if (head.file.empty()) return std::nullopt;
  std::string text;
  try {
    text = store_.read_record(use_of(id));
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound || error.code() == ErrorCode::kCorruption) return std::nullopt;
    throw;
  }
  const Json note = parse_json<Json>(text, nullptr, /*throws=*/false);
  const auto text_of = [&](const char* name) {
    const auto found = note.is_object() ? note.find(name) : note.end();
    return found != note.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  const std::string copy = text_of("copy");
  if (text_of("base") != head.file || copy.empty() || checksum_of_copy(id) != copy) return std::nullopt;
  return KnownTurn{text_of("turn"), text_of("digest"), text_of("result")};
}

std::optional<Worker::Custody> Worker::commit_again(const std::string& id) {
  const Acquired acquired = driver_.run([&](Exchange& exchange) {
    return acquire(exchange, id, session_.name(), Make::kNever, draw(), [](const std::string&) { return false; });
  });
  if (acquired.outcome == Acquired::Outcome::kUnknown) throw uncommitted(id, "the bucket did not answer");
  if (acquired.outcome != Acquired::Outcome::kOwned) return std::nullopt;
  session_.learn(acquired.generation);
  Custody custody{.version = acquired.version};
  read_commit(id, custody);
  const std::optional<KnownTurn> turn = due_turn(id, custody.version.head);
  return turn ? commit_copy(id, std::move(custody), turn) : std::move(custody);
}

void Worker::commit_due_turns() {
  while (true) {
    Due due;
    {
      MutexLock lock(mutex_);
      while (due_.empty() && !ending_) changed_.wait(lock);
      if (due_.empty()) return;
      due = std::move(due_.front());
      due_.pop_front();
    }
    settle(due);
  }
}

void Worker::settle(const Due& due) noexcept {
  const Instant end = clock_now() + options_.ttl * kPatience;
  std::optional<Custody> custody;
  try {
    for (bool again = false;; again = true) {
      try {
        custody = again ? commit_again(due.id) : commit_copy(due.id, due.custody, due.turn);
        break;
      } catch (const Error&) {  // also where the head is another: an answer that was lost may be why
        if (!alive() || clock_now() >= end) throw;
      }
      driver_.run([&](Exchange& exchange) { return ask_firmly(exchange, wait_request(options_.ttl / 8)); });
    }
    // Memory has what the copy has. Where that is no commit, it is as after one that failed.
    if (custody && checksum_of_copy(due.id) != custody->checksum) custody.reset();
    if (!custody) throw elsewhere(due.id, "was taken over by another worker.");
  } catch (...) {
    tell("The last turn of agent '" + due.id +
         "', which was answered, is in this machine's store and not in the bucket");
  }
  custody ? finish(due.id, std::move(custody)) : finish_in_doubt(due.id);
}

void Worker::end_committers() noexcept {
  {
    const MutexLock lock(mutex_);
    ending_ = true;
    changed_.notify_all();
  }
  for (std::thread& committer : committers_) committer.join();
  committers_.clear();
}

void Worker::remove(const std::string& id) {
  const std::optional<Custody> custody = begin(id);
  if (!custody) throw elsewhere(id, "is not this worker's any more; ask again.");
  std::exception_ptr failed;
  try {
    require_alive(id);
    const Saved saved = driver_.run(
        [&](Exchange& exchange) { return remove_agent(exchange, id, custody->version, draw()); });
    if (saved.outcome == Saved::Outcome::kMoved) throw elsewhere(id, "was taken over by another worker; ask again.");
    if (saved.outcome != Saved::Outcome::kCommitted) throw uncommitted(id, "no answer came");
  } catch (...) {
    failed = std::current_exception();
  }
  finish(id, std::nullopt);
  if (failed) std::rethrow_exception(failed);
}

// ---- the store's copy

std::optional<std::string> Worker::checksum_of_copy(const std::string& id) const {
  if (!store_.contains(id)) return std::nullopt;
  try {
    return store_.agent_info(id).hash;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) return std::nullopt;
    if (error.code() != ErrorCode::kCorruption) throw;
    return "";  // it is equal to none
  }
}

CopyStep Worker::judge(const std::string& id, const std::optional<std::string>& committed) const {
  const std::optional<Mark> mark = tier_.read_mark(id);
  const std::optional<std::string> cached = mark ? std::optional(mark->checksum) : std::nullopt;
  return judge_copy(checksum_of_copy(id), cached, is_in_use(id), committed);
}

Record Worker::use_of(const std::string& id) const {
  return {"worker-" + Hasher().update_field(options_.url).update_field(id).hex(), 0, 0};
}

bool Worker::is_in_use(const std::string& id) const {
  try {
    store_.read_record(use_of(id));
    return true;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) return false;
    if (error.code() != ErrorCode::kCorruption) throw;
    return true;
  }
}

void Worker::set_in_use(const std::string& id) {
  if (!is_in_use(id)) store_.keep_record(use_of(id), id, options_.durability);
}

}  // namespace torpor::remote
