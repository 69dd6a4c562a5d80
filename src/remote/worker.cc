#include "remote/worker.h"

#include <algorithm>
#include <utility>

#include "base/json.h"
#include "base/parallel.h"
#include "remote/tier.h"
#include "remote/worker_errors.h"

namespace torpor::remote {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kReleasesAtOnce = 8, kCommitters = 8;
constexpr std::string_view kNotes = ".worker-";  // no agent's lock begins so
constexpr Instant kLongestPause = std::chrono::milliseconds(500);  ///< of who waits for an owner

}  // namespace

Worker::Worker(std::shared_ptr<ObjectStore> bucket, std::shared_ptr<ObjectStore> leases, const RemoteOptions& options)
    : options_(options), bucket_(std::move(bucket)), leases_(std::move(leases)), store_(options.store),
      driver_(*bucket_), lease_driver_(*leases_), tier_(driver_, store_, options.url),
      session_(lease_driver_, {.address = options.address, .ttl = options.ttl, .on_end = options.on_end}) {
  store_.set_disk_limits(options_.disk);
  tier_.set_disk_limits(options_.disk);
  end_predecessors();
  if (options_.ack != RemoteAck::kLocal) return;
  try {
    while (committers_.size() < kCommitters) committers_.emplace_back([this] { commit_due_turns(); });
  } catch (...) {
    end_committers();
    throw;
  }
}

Worker::~Worker() {
  end_committers();
  std::vector<std::string> owned;
  {
    const MutexLock lock(mutex_);
    for (const auto& [id, agent] : agents_) {
      if (agent.custody) owned.push_back(id);
    }
  }
  if (!alive()) return;  // they are others' by now, or the bucket can't be reached
  try {
    parallel_for(owned.size(), kReleasesAtOnce, [&](size_t i) { close(owned[i]); });
  } catch (...) {
    tell("Agents stay this worker's until its lease is gone");
  }
}

bool Worker::alive() const { return session_.may_answer(); }

void Worker::require_alive(const std::string& id) const {
  if (!alive()) throw elsewhere(id, "may be another worker's by now: this one's lease has run out; start it again.");
}

void Worker::end_predecessors() noexcept {
  const std::filesystem::path directory = options_.store / ".locks";
  const bool is_local = options_.ack == RemoteAck::kLocal;
  const auto end = [&](const std::string& text) {
    const Json note = parse_json<Json>(text, nullptr, /*throws=*/false);
    const auto text_of = [&](const char* name) {
      const auto found = note.is_object() ? note.find(name) : note.end();
      return found != note.end() && found->is_string() ? found->get<std::string>() : std::string();
    };
    const std::string session = text_of("session");
    if (text_of("url") != options_.url || !is_name(session)) return false;
    session_.has_ended(session);
    // The copies here may end with turns that it has answered and not committed: nobody else gets those agents sooner.
    if (text_of("ack") == "local") return true;
    try {
      lease_driver_.run([&](Exchange& exchange) { return ask_firmly(exchange, remove_request(lease_key(session))); });
      return true;
    } catch (...) {
      tell("The lease of a worker that was killed stays until it is gone");
      return false;
    }
  };
  try {
    clear_notes(directory, kNotes, end);
    const Json note{{"url", options_.url}, {"session", session_.name()}, {"ack", is_local ? "local" : "commit"}};
    note_.emplace(directory, std::string(kNotes) + session_.name(), dump_json(note));
  } catch (...) {
    tell("Should this worker be killed, its agents are free once its lease is gone");
  }
}

void Worker::wait_for_owner(const std::string& id, const std::string& owner) {
  const Instant pause = std::min<Instant>(options_.ttl / 8, kLongestPause);
  const Instant end = clock_now() + options_.ttl * 4;
  while (true) {
    session_.look(clock_now() - pause / 2);
    OwnerStep step = session_.is_gone(owner) ? OwnerStep::kGone : OwnerStep::kLook;
    std::string address;
    if (const std::optional<LeaseWatch::Seen> seen = session_.seen(owner); seen && step != OwnerStep::kGone) {
      const MutexLock lock(mutex_);
      step = judge_owner(first_seen_.try_emplace(owner, seen->since).first->second, *seen);
      address = seen->lease.address;
    }
    if (step == OwnerStep::kGone) {
      const MutexLock lock(mutex_);
      first_seen_.erase(owner);
      return;
    }
    if (step == OwnerStep::kAlive) {
      throw elsewhere(id, "is awake on another worker" + (address.empty() ? "" : ", at " + address) +
                              "; ask there, or once it sleeps.", address);
    }
    require_alive(id);
    if (clock_now() >= end) throw elsewhere(id, "has an owner whose lease can't be read; ask again later.");
    driver_.run([&](Exchange& exchange) { return ask_firmly(exchange, wait_request(pause)); });
  }
}

// ---- uses

bool Worker::owns(const std::string& id) const {
  const MutexLock lock(mutex_);
  const auto found = agents_.find(id);
  return found != agents_.end() && found->second.custody && alive();
}

bool Worker::open(const std::string& id, bool make) {
  if (!is_name(id)) return false;
  {
    MutexLock lock(mutex_);
    Agent& agent = agents_[id];
    ++agent.uses;
    while (agent.busy) changed_.wait(lock);
    if (agent.custody && alive()) return true;
    agent.busy = true;
  }
  std::optional<Custody> taken;
  std::exception_ptr failed;
  try {
    require_alive(id);
    taken = take(id, make);
  } catch (...) {
    failed = std::current_exception();
  }
  const bool opened = taken.has_value();
  finish(id, std::move(taken));
  if (!opened) done(id);
  if (failed) require_alive(id);
  if (failed) std::rethrow_exception(failed);
  return opened;
}

void Worker::done(const std::string& id) noexcept {
  const MutexLock lock(mutex_);
  const auto found = agents_.find(id);
  if (--found->second.uses == 0 && !found->second.busy && !found->second.custody) agents_.erase(found);
}

std::optional<Worker::Custody> Worker::begin(const std::string& id, bool idle) {
  MutexLock lock(mutex_);
  while (true) {
    const auto found = agents_.find(id);
    if (found == agents_.end() || !found->second.custody || (idle && found->second.uses > 0)) return std::nullopt;
    if (!found->second.busy) {
      found->second.busy = true;
      return found->second.custody;
    }
    changed_.wait(lock);
  }
}

bool Worker::begin_unused(const std::string& id) {
  const MutexLock lock(mutex_);
  const auto [found, is_new] = agents_.try_emplace(id);
  if (!is_new) return false;
  found->second.busy = true;
  return true;
}

bool Worker::begin_doubtful(const std::string& id) {
  const MutexLock lock(mutex_);
  if (agents_.count(id) > 0 || doubtful_.erase(id) == 0) return false;
  agents_[id].busy = true;
  return true;
}

void Worker::finish_in_doubt(const std::string& id) {
  {
    const MutexLock lock(mutex_);
    doubtful_.insert(id);
  }
  finish(id, std::nullopt);
}

void Worker::finish(const std::string& id, std::optional<Custody> custody) {
  const MutexLock lock(mutex_);
  const auto found = agents_.find(id);
  found->second.busy = false;
  if (custody) doubtful_.erase(id);
  found->second.custody = std::move(custody);
  if (found->second.uses == 0 && !found->second.custody) agents_.erase(found);
  changed_.notify_all();
}

std::optional<std::string> Worker::answered(const std::string& id, const KnownTurn& turn) const {
  constexpr size_t kMostId = 256;
  require_alive(id);
  const auto refuse = [&](const std::string& what) {
    return Error(ErrorCode::kInvalidArgument, what).with_agent(id).with_field("TurnRequest::id");
  };
  const MutexLock lock(mutex_);
  const auto found = agents_.find(id);
  if (found == agents_.end() || !found->second.custody) {
    throw elsewhere(id, "is not this worker's any more; ask again.");
  }
  if (turn.id.empty()) return std::nullopt;
  if (turn.id.size() > kMostId) throw refuse("A turn's id has at most 256 bytes; take a shorter one.");
  const Head& head = found->second.custody->version.head;
  switch (check_turn(head, turn.id, turn.digest)) {
    case TurnCheck::kRun: return std::nullopt;
    case TurnCheck::kAnswered: return head.turn->result;
    case TurnCheck::kPast:
      throw refuse("This turn of agent '" + id +
                   "' is over, and the agent has changed since; its messages tell what was said.");
    case TurnCheck::kOther: break;
  }
  throw refuse("The turn's id was another request's of agent '" + id + "' before; use a new one.");
}

// ---- taking and letting go

std::optional<Worker::Custody> Worker::take(const std::string& id, bool make) {
  const CopyStep without = judge(id, std::nullopt);
  const Make how = make || without == CopyStep::kAdopt ? Make::kAbsent : Make::kNever;
  const std::string save_id = draw();
  Acquired acquired;
  while (true) {
    acquired = driver_.run([&](Exchange& exchange) {
      return acquire(exchange, id, session_.name(), how, save_id,
                     [&](const std::string& owner) { return session_.is_gone(owner); });
    });
    if (acquired.outcome != Acquired::Outcome::kMoved) break;
    wait_for_owner(id, acquired.version.head.owner);
  }
  if (acquired.outcome == Acquired::Outcome::kUnknown) throw uncommitted(id, "the bucket did not answer");
  Custody custody{.version = std::move(acquired.version)};
  if (acquired.outcome == Acquired::Outcome::kAbsent) {
    if (without == CopyStep::kRefuse) refuse_copy(id, store_, "has no such agent any more");
    if (without == CopyStep::kRemove) store_.delete_agent_cache(id);
    return std::nullopt;
  }
  session_.learn(acquired.generation);
  try {
    bring(id, custody);
  } catch (...) {
    const std::exception_ptr failed = std::current_exception();
    let_go(id, custody);
    std::rethrow_exception(failed);
  }
  return custody;
}

std::optional<ReadSave> Worker::read_commit(const std::string& id, Custody& custody) {
  if (custody.version.head.file.empty()) return std::nullopt;
  std::optional<ReadSave> saved = driver_.run([&](Exchange& exchange) { return read_save(exchange, id); });
  if (!saved || saved->version.tag != custody.version.tag) throw elsewhere(id, "was taken over just now; ask again.");
  custody.keys = saved->keys;
  custody.checksum = hash_of(saved->agent_file);
  const std::optional<std::string> copy = checksum_of_copy(id);
  custody.owes_tail = copy && *copy != custody.checksum && is_copy(*copy, saved->agent_file);
  if (custody.owes_tail) custody.checksum = *copy;
  return saved;
}

void Worker::bring(const std::string& id, Custody& custody) {
  const std::optional<ReadSave> saved = read_commit(id, custody);
  if (const std::optional<KnownTurn> turn = due_turn(id, custody.version.head)) {
    custody = commit_copy(id, custody, turn);
    return;
  }
  const CopyStep step = judge(id, saved ? std::optional(custody.checksum) : std::nullopt);
  if (step == CopyStep::kRefuse) refuse_copy(id, store_, saved ? "has another one of that name" : "has it no more");
  if (step == CopyStep::kAdopt) {  // else a turn that fails would have no commit to go back to
    custody = commit_copy(id, custody, std::nullopt);
    return;
  }
  set_in_use(id);  // from here on the copy is one
  if (step == CopyStep::kRemove) store_.delete_agent_cache(id);
  if (step != CopyStep::kInstall) return;
  Pulled pulled;
  while (true) {
    try {
      pulled = tier_.pull_save(id, *saved, {.durability = options_.durability});
      break;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kResourceExhausted || !make_room()) throw;
    }
  }
  custody.keys = pulled.keys;
  for (const BucketProblem& damaged : pulled.damaged) {
    log(LogLevel::kWarning, "What the agent '" + id + "' lacks is computed again: " + damaged.problem);
    custody.damaged.push_back(damaged.key);
  }
}

void Worker::let_go(const std::string& id, const Custody& custody) noexcept {
  try {
    if (due_turn(id, custody.version.head)) return;  // nobody else has what it ends with
    const bool begun = !custody.version.head.file.empty();
    const Saved saved = driver_.run([&](Exchange& exchange) {
      return begun ? release(exchange, id, custody.version, draw())
                   : remove_agent(exchange, id, custody.version, draw());
    });
    // Whoever has it next must know whether the copy is the bucket's.
    if (saved.outcome != Saved::Outcome::kCommitted) return;
    const std::optional<std::string> copy = checksum_of_copy(id);
    if (begun && copy == custody.checksum) {
      tier_.keep_mark(id, {saved.version.head.file, custody.checksum, custody.damaged});
      store_.drop_record(use_of(id), options_.durability);
    } else if (!begun && !copy) {
      store_.drop_record(use_of(id), options_.durability);
    }
  } catch (...) {
    tell("The agent '" + id + "' may stay this worker's until its lease is gone");
  }
}

void Worker::free_head(const std::string& id) noexcept {
  try {
    if (const std::optional<Custody> custody = commit_again(id)) let_go(id, *custody);
  } catch (...) {
    tell("The agent '" + id + "' may stay this worker's until its lease is gone");
  }
}

void Worker::close(const std::string& id) noexcept {
  try {
    if (const std::optional<Custody> custody = begin(id, true)) {
      try {
        let_go(id, send_tail(id, *custody));
      } catch (...) {
        tell("The last rows of agent '" + id + "' are not in the bucket; who wakes it there computes them");
        free_head(id);
      }
      finish(id, std::nullopt);
    } else if (begin_doubtful(id)) {
      free_head(id);
      finish(id, std::nullopt);
    }
  } catch (...) {
    tell("An agent stays this worker's until its lease is gone");
  }
}

Worker::Custody Worker::send_tail(const std::string& id, Custody custody) {
  if (!custody.owes_tail || checksum_of_copy(id) != custody.checksum) return custody;
  const Session::Saving saving(session_);
  Pushed pushed = tier_.push_save(id, custody.version, custody.keys, saving.generation(),
                                  {.turn = custody.version.head.turn, .damaged = custody.damaged});
  if (pushed.outcome != Saved::Outcome::kCommitted) throw uncommitted(id, "its head is another");
  return {std::move(pushed.version), std::move(pushed.keys), {}, std::move(custody.checksum)};
}

bool Worker::make_room() noexcept {
  try {
    std::vector<AgentInfo> copies = store_.list_cached_agents();
    std::ranges::stable_sort(copies, {}, &AgentInfo::updated_at);
    for (const AgentInfo& copy : copies) {
      if (copy.hash.empty() || !begin_unused(copy.agent_id)) continue;
      bool removed = false;
      try {
        const std::optional<Mark> mark = tier_.read_mark(copy.agent_id);
        removed = mark && mark->checksum == copy.hash && !is_in_use(copy.agent_id) &&
                  store_.delete_agent_cache_of(copy.agent_id, copy.hash);
      } catch (...) {
        // Somebody has it, or it can't be read: the next one.
      }
      finish(copy.agent_id, std::nullopt);
      if (removed) return true;
    }
  } catch (...) {
    tell("No room was made on the disk");
  }
  return false;
}

}  // namespace torpor::remote
