#include "remote/tier.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "base/env.h"
#include "base/hash.h"
#include "base/parallel.h"
#include "torpor/error.h"

namespace torpor::remote {
namespace {

constexpr size_t kObjectsAtOnce = 8;           ///< in memory
constexpr uint64_t kMostStateBytes = uint64_t(2) << 30, kMostHeader = uint64_t(4) << 20;
constexpr int kPulls = 4;                      ///< of an agent that is saved meanwhile
constexpr int kWaitsForOwner = 3;              ///< each for another one that took it meanwhile
constexpr const char* kTakenRows = "other rows are in the bucket under the names of these, computed otherwise";

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

std::string path_of(const std::string& key) {
  const auto name = parse_pool_key(key);
  return name && is_file_path(name->path) ? name->path : std::string();
}

/// By path; of two keys of one path the one that was put last.
std::map<std::string, std::string> keys_by_path(const std::vector<std::string>& keys) {
  std::map<std::string, std::string> by_path;
  for (const std::string& key : keys) {
    const auto name = parse_pool_key(key);
    if (!name || path_of(key).empty()) continue;
    std::string& known = by_path[name->path];
    if (known.empty() || parse_pool_key(known)->generation < name->generation) known = key;
  }
  return by_path;
}

Error busy_elsewhere(const std::string& agent, const std::string& owner) {
  return Error(ErrorCode::kBusy, "The agent '" + agent + "' is awake on another machine ('" + owner +
                                     "'); let it go to sleep there first.")
      .with_agent(agent);
}

Error lost(const std::string& agent) {
  return Error(ErrorCode::kIo, "The bucket gave no answer that tells what became of the agent '" + agent +
                                   "'; try again later.")
      .with_agent(agent);
}

}  // namespace

// ---- CountedStore

PutResult CountedStore::put(const std::string& key, std::span<const std::byte> bytes, const Condition& condition,
                            const ObjectMetadata& metadata) {
  ++puts_;
  sent_ += int64_t(bytes.size());
  return store_.put(key, bytes, condition, metadata);
}
std::optional<Object> CountedStore::get(const std::string& key, std::uint64_t most_bytes) {
  ++gets_;
  auto object = store_.get(key, most_bytes);
  if (object) received_ += int64_t(object->bytes.size());
  return object;
}
std::optional<ObjectInfo> CountedStore::head(const std::string& key) {
  ++gets_;
  return store_.head(key);
}
void CountedStore::read(const std::string& key, std::uint64_t offset, std::span<std::byte> out) {
  ++gets_;
  store_.read(key, offset, out);
  received_ += int64_t(out.size());
}
std::vector<ObjectInfo> CountedStore::list(const std::string& prefix) {
  ++lists_;
  return store_.list(prefix);
}
void CountedStore::remove(const std::string& key) {
  ++removals_;
  store_.remove(key);
}
CountedStore::Counts CountedStore::counts() const { return {puts_, gets_, lists_, removals_, sent_, received_}; }

// ---- Tier: one step

Tier::Tier(Driver& driver, Store& store, std::string url)
    : driver_(driver), store_(store), url_(std::move(url)), files_(store) {}

Pushed Tier::push_save(const std::string& agent, const HeadVersion& version, const std::vector<std::string>& keys,
                       int64_t generation, const PushOptions& options) {
  const std::optional<std::string> without_tail =
      options.tail ? std::nullopt : files_.agent_file_without_tail(agent);
  const std::string agent_file = without_tail ? *without_tail : files_.agent_file(agent);
  const AgentContents contents = check_agent_file(bytes_of(agent_file), agent);
  const std::map<std::string, std::string> held = keys_by_path(keys);
  const std::set<std::string> damaged(options.damaged.begin(), options.damaged.end());
  SaveRequest request{.agent = agent, .save_id = store_.env().random_id(), .turn = options.turn};
  for (const std::string& path : contents.files) {
    if (const auto key = held.find(path); key != held.end()) {
      if (damaged.contains(key->second)) mend(key->second, path);
      request.kept.push_back(key->second);
    } else {
      request.uploads.push_back({path, files_.checksum(path), request.uploads.size()});
    }
  }
  request.agent_file = request.uploads.size();
  const Blobs blobs = [&](size_t number) -> Blob {
    if (number == request.agent_file) return {bytes_of(agent_file), nullptr};
    WholeFile file = files_.read(request.uploads[number].path);
    return {file.bytes, std::move(file.owner)};
  };
  const auto attempt = [&] {
    return driver_.run([&](Exchange& exchange) { return save(exchange, version, request, generation); }, blobs);
  };
  Pushed pushed{attempt(), without_tail.has_value()};
  if (pushed.outcome != Saved::Outcome::kVariant) return pushed;
  // Damage keeps a name from its own bytes: these take their place again.
  for (const std::string& path : pushed.taken) {
    int64_t bytes = 0;
    const std::string key = pool_key({path, generation});
    if (!check_objects({key}, bytes).empty()) mend(key, path);
  }
  static_cast<Saved&>(pushed) = attempt();
  if (pushed.outcome != Saved::Outcome::kVariant) return pushed;
  throw Error(ErrorCode::kIncompatible, "The agent '" + agent + "' can't be kept in " + url_ + ": " + kTakenRows +
                                            " ('" + pushed.taken.front() + "'); use another prefix.")
      .with_agent(agent);
}

/// Under its name and without a condition: what is there under that name has no other bytes, but for damage. The head
/// that names it, or the save under way, keeps it from being swept.
void Tier::mend(const std::string& key, const std::string& path) {
  const WholeFile file = files_.read(path);
  driver_.run([&](Exchange& exchange) { return ask_firmly(exchange, put_request(key, {}, {}, 0)); },
              [&](size_t) -> Blob { return {file.bytes, file.owner}; });
}

Pulled Tier::pull_save(const std::string& agent, const ReadSave& read, const PullOptions& options) {
  Pulled pulled;
  pulled.version = read.version;
  pulled.keys = read.keys;
  const std::string from = save_key(agent, read.version.head.file);
  Arrival arrival(files_, agent, read.agent_file, where(from));
  const std::map<std::string, std::string> keys = keys_by_path(read.keys);
  std::vector<std::pair<std::string, std::string>> wanted;  // path, key
  for (const std::string& path : arrival.missing(options.check)) {
    if (const auto key = keys.find(path); key != keys.end()) {
      wanted.emplace_back(path, key->second);
    } else {
      ++pulled.dropped;
    }
  }
  std::mutex mutex;
  parallel_for(wanted.size(), kObjectsAtOnce, [&](size_t i) {
    const auto& [path, key] = wanted[i];
    const uint64_t most = path.starts_with("segments/") ? uint64_t(arrival.contents().segment_bytes) + kMostHeader
                                                    : kMostStateBytes;
    std::string problem;
    try {
      const Answer answer = driver_.run([&](Exchange& e) { return ask_firmly(e, get_request(key, most)); });
      if (answer.done()) {
        arrival.put(path, bytes_of(answer.text), where(key), options.durability);
        const std::lock_guard lock(mutex);
        ++pulled.objects;
        pulled.bytes += int64_t(answer.text.size());
        return;
      }
      problem = "The object '" + where(key) + "' is missing.";
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kCorruption) throw;
      problem = error.what();
    }
    const std::lock_guard lock(mutex);
    pulled.damaged.push_back({key, problem});
  });
  if (!pulled.damaged.empty()) {
    // A save that is the agent's no more may have been swept while it was read.
    const Answer now = driver_.run([&](Exchange& e) { return ask_firmly(e, get_request(head_key(agent))); });
    if (!now.done() || decode_head(now.text, head_key(agent)).file != read.version.head.file) {
      throw Error(ErrorCode::kNotFound, "The agent '" + agent + "' was saved while it was brought here; try again.")
          .with_agent(agent);
    }
  }
  std::sort(pulled.damaged.begin(), pulled.damaged.end(),
            [](const BucketProblem& a, const BucketProblem& b) { return a.key < b.key; });
  // Without its first ids nobody can wake it.
  const auto& files = arrival.contents().files;
  const auto first_ids =
      std::find_if(files.begin(), files.end(), [](const std::string& path) { return path.starts_with("parts/"); });
  for (const BucketProblem& problem : pulled.damaged) {
    if (first_ids == files.end() || path_of(problem.key) != *first_ids) continue;
    throw Error(ErrorCode::kCorruption, problem.problem).with_agent(agent).with_path(where(problem.key));
  }
  arrival.commit(options.durability);
  return pulled;
}

// ---- Tier: whole

Acquired Tier::own(Session& session, const std::string& agent, Make make) {
  const std::string save_id = store_.env().random_id();
  for (int wait = 0;; ++wait) {
    const Acquired acquired = driver_.run([&](Exchange& exchange) {
      return acquire(exchange, agent, session.name(), make, save_id,
                     [&](const std::string& owner) { return session.is_gone(owner); });
    });
    if (acquired.outcome == Acquired::Outcome::kOwned) {
      session.learn(acquired.generation);
      return acquired;
    }
    if (acquired.outcome != Acquired::Outcome::kMoved) return acquired;
    if (wait == kWaitsForOwner || !session.wait_until_gone(acquired.version.head.owner)) return acquired;
  }
}

void Tier::let_go(const std::string& agent, const HeadVersion& version) {
  const Saved saved = driver_.run(
      [&](Exchange& exchange) { return release(exchange, agent, version, store_.env().random_id()); });
  if (saved.outcome == Saved::Outcome::kUnknown) throw lost(agent);
}

Saved Tier::push(Session& session, const std::string& agent, bool force) {
  const auto awake = store_.lock_agent(agent);
  const AgentInfo info = store_.agent_info(agent);
  const std::optional<Mark> mark = read_mark(agent);
  const Acquired acquired = own(session, agent, Make::kAbsent);
  if (acquired.outcome == Acquired::Outcome::kMoved) throw busy_elsewhere(agent, acquired.version.head.owner);
  if (acquired.outcome != Acquired::Outcome::kOwned) throw lost(agent);
  try {
    const Session::Saving saving(session);
    std::optional<ReadSave> read;
    try {
      read = driver_.run([&](Exchange& exchange) { return read_save(exchange, agent); });
    } catch (const Error& error) {
      if (!force || error.code() != ErrorCode::kCorruption) throw;  // a damaged save is replaced
    }
    PushOptions options;
    if (read) {
      const bool is_same = is_copy(info.hash, read->agent_file);
      if (is_same) options.turn = acquired.version.head.turn;
      const bool goes_on = is_same || (mark && mark->save == read->version.head.file);
      if (!goes_on && !force) {
        throw Error(ErrorCode::kInvalidArgument,
                    "The bucket's state of the agent '" + agent +
                        "' is not what the store's copy goes on from; bring it here first, or replace it by force.")
            .with_agent(agent);
      }
      if (mark && mark->save == read->version.head.file) options.damaged = mark->damaged;
    }
    Saved saved = push_save(agent, acquired.version, read ? read->keys : std::vector<std::string>(),
                            saving.generation(), options);
    if (saved.outcome == Saved::Outcome::kMoved) throw busy_elsewhere(agent, saved.version.head.owner);
    if (saved.outcome == Saved::Outcome::kUnknown) throw lost(agent);
    keep_mark(agent, {saved.version.head.file, info.hash, {}});
    let_go(agent, saved.version);
    return saved;
  } catch (const Error&) {
    give_back(agent, acquired.version);
    throw;
  }
}

void Tier::give_back(const std::string& agent, const HeadVersion& version) noexcept {
  try {
    if (version.head.file.empty()) {  // it was begun here, and nothing came of it
      driver_.run([&](Exchange& e) { return remove_agent(e, agent, version, store_.env().random_id()); });
    } else {
      let_go(agent, version);
    }
  } catch (const std::exception&) {
    // The lease's end frees it.
  }
}

Pulled Tier::pull(const std::string& agent, bool force, const PullOptions& options) {
  for (int attempt = 1;; ++attempt) {
    const auto read = driver_.run([&](Exchange& exchange) { return read_save(exchange, agent); });
    if (!read) {
      throw Error(ErrorCode::kNotFound, "There is no agent '" + agent + "' in " + url_ + ".").with_agent(agent);
    }
    const std::string there = hash_of(read->agent_file);
    if (store_.contains(agent) && !force) {
      const std::string here = store_.agent_info(agent).hash;
      const std::optional<Mark> mark = read_mark(agent);
      const bool is_same = is_copy(here, read->agent_file);
      if (is_same && here != there && !options.check) {  // it has what the save was made of, and rows that this lacks
        keep_mark(agent, {read->version.head.file, here, {}});
        return {.version = read->version, .keys = read->keys};
      }
      if (!is_same && !(mark && mark->checksum == here)) {
        throw Error(ErrorCode::kInvalidArgument, "The store's copy of the agent '" + agent +
                                                     "' has changed since it was last in step with " + url_ +
                                                     "; send it there first, or drop the changes by force.")
            .with_agent(agent);
      }
    }
    try {
      Pulled pulled = pull_save(agent, *read, options);
      Mark mark{read->version.head.file, there, {}};
      for (const BucketProblem& problem : pulled.damaged) mark.damaged.push_back(problem.key);
      keep_mark(agent, mark);
      return pulled;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kNotFound || attempt == kPulls) throw;
    }
  }
}

std::vector<BucketProblem> Tier::check_objects(const std::vector<std::string>& keys, int64_t& bytes) {
  std::vector<BucketProblem> problems;
  std::mutex mutex;
  parallel_for(keys.size(), kObjectsAtOnce, [&](size_t i) {
    const std::string &key = keys[i], path = path_of(key);
    std::string problem;
    int64_t read = 0;
    if (path.empty()) {
      problem = "The object '" + where(key) + "' has a name that no segment, state or part has.";
    } else {
      try {
        const Answer answer =
            driver_.run([&](Exchange& e) { return ask_firmly(e, get_request(key, kMostStateBytes)); });
        read = int64_t(answer.text.size());
        if (answer.done()) {
          check_whole_file(path, bytes_of(answer.text), where(key));
        } else {
          problem = "The object '" + where(key) + "' is missing.";
        }
      } catch (const Error& error) {
        if (error.code() != ErrorCode::kCorruption && error.code() != ErrorCode::kIncompatible) throw;
        problem = error.what();
      }
    }
    const std::lock_guard lock(mutex);
    bytes += read;
    if (!problem.empty()) problems.push_back({key, problem});
  });
  std::sort(problems.begin(), problems.end(),
            [](const BucketProblem& a, const BucketProblem& b) { return a.key < b.key; });
  return problems;
}

BucketReport Tier::verify(const std::function<void(const std::string& agent)>& told) {
  BucketReport report;
  std::set<std::string> checked, named;
  const auto list = [&](const char* prefix) {
    return driver_.run([&](Exchange& exchange) { return ask_firmly(exchange, list_request(prefix)); }).objects;
  };
  for (const std::string& agent : agents_of(list(kAgentsPrefix))) {
    if (told) told(agent);
    std::optional<ReadSave> read;
    try {
      read = driver_.run([&](Exchange& exchange) { return read_save(exchange, agent); });
      if (!read) continue;
      ++report.agents;
      const std::string from = save_key(agent, read->version.head.file);
      named.insert(from);
      ++report.objects;
      report.bytes += int64_t(read->agent_file.size());
      const AgentContents contents = check_agent_file(bytes_of(read->agent_file), where(from));
      if (contents.info.agent_id != agent) {
        report.problems.push_back({from, "'" + where(from) + "' is damaged: it is the agent '" +
                                             contents.info.agent_id + "'."});
      }
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kCorruption && error.code() != ErrorCode::kIncompatible) throw;
      report.problems.push_back({error.path().empty() ? head_key(agent) : error.path(), error.what()});
      if (!read) continue;
    }
    std::vector<std::string> fresh;
    for (const std::string& key : read->keys) {
      named.insert(key);
      if (checked.insert(key).second) fresh.push_back(key);
    }
    report.objects += int64_t(fresh.size());
    for (BucketProblem& problem : check_objects(fresh, report.bytes)) report.problems.push_back(std::move(problem));
  }
  for (const char* prefix : kPoolPrefixes) {
    for (const ObjectInfo& object : list(prefix)) {
      if (named.contains(object.key)) continue;
      ++report.unneeded;
      report.unneeded_bytes += int64_t(object.bytes);
    }
  }
  return report;
}

Archived Tier::archive(Session& session, const std::string& agent) {
  using Outcome = Archived::Outcome;
  Archived archived;
  const auto before = driver_.run([&](Exchange& exchange) { return read_save(exchange, agent); });
  archived.outcome = before ? Outcome::kNothing : Outcome::kAbsent;
  const auto is_row = [](const std::string& key) { return !key.starts_with("parts/"); };
  if (!before || std::none_of(before->keys.begin(), before->keys.end(), is_row)) return archived;
  const Acquired acquired = own(session, agent, Make::kNever);
  if (acquired.outcome == Acquired::Outcome::kUnknown) throw lost(agent);
  archived.outcome = acquired.outcome == Acquired::Outcome::kAbsent ? Outcome::kAbsent : Outcome::kBusy;
  if (acquired.outcome != Acquired::Outcome::kOwned) return archived;
  try {
    const Session::Saving saving(session);
    const auto read = driver_.run([&](Exchange& exchange) { return read_save(exchange, agent); });
    if (!read) throw lost(agent);
    SaveRequest request{.agent = agent, .save_id = store_.env().random_id(), .turn = acquired.version.head.turn};
    for (const std::string& key : read->keys) {
      if (is_row(key)) ++archived.dropped;
      else request.kept.push_back(key);
    }
    const Saved saved = driver_.run(
        [&](Exchange& e) { return save(e, acquired.version, request, saving.generation()); },
        [&](size_t) -> Blob { return {bytes_of(read->agent_file), nullptr}; });
    if (saved.outcome == Saved::Outcome::kUnknown) throw lost(agent);
    archived.outcome = saved.outcome == Saved::Outcome::kCommitted ? Outcome::kDone : Outcome::kBusy;
    if (archived.outcome == Outcome::kDone) let_go(agent, saved.version);
    return archived;
  } catch (const Error&) {
    give_back(agent, acquired.version);
    throw;
  }
}

std::vector<std::pair<std::string, int64_t>> Tier::agents() {
  const std::vector<ObjectInfo> objects =
      driver_.run([&](Exchange& exchange) { return ask_firmly(exchange, list_request(kAgentsPrefix)); }).objects;
  // A head is written by owners that come and go, too: the newest save tells when the agent was at work.
  std::map<std::string, int64_t> written;
  for (const ObjectInfo& object : objects) {
    const std::string rest = object.key.substr(std::string_view(kAgentsPrefix).size());
    const size_t slash = rest.find('/');
    if (slash == rest.npos || !parse_save_name(rest.substr(slash + 1))) continue;
    int64_t& time = written[rest.substr(0, slash)];
    time = std::max(time, object.modified_ms);
  }
  std::vector<std::pair<std::string, int64_t>> agents;
  for (const std::string& agent : agents_of(objects)) {
    if (const auto time = written.find(agent); time != written.end()) agents.emplace_back(agent, time->second);
  }
  return agents;
}

std::vector<std::string> agents_of(const std::vector<ObjectInfo>& objects) {
  std::vector<std::string> agents;
  for (const ObjectInfo& object : objects) {
    const std::string rest = object.key.substr(std::min(object.key.size(), std::string_view(kAgentsPrefix).size()));
    const size_t slash = rest.find('/');
    if (slash != rest.npos && rest.substr(slash) == "/head" && is_name(rest.substr(0, slash))) {
      agents.push_back(rest.substr(0, slash));
    }
  }
  return agents;
}

bool is_copy(const std::string& checksum, const std::string& agent_file) {
  return !checksum.empty() && (checksum == hash_of(agent_file) || checksum == checksum_of_whole(bytes_of(agent_file)));
}

std::string hash_of(const std::string& agent_file) {
  return agent_file.size() < kChecksumAt + kChecksumDigits ? std::string()
                                                           : agent_file.substr(kChecksumAt, kChecksumDigits);
}

// ---- marks: a record of the store, one value on each line

namespace {

Record mark_record(const std::string& url, const std::string& agent) {
  return {.name = "bucket-" + hash_hex(url + "\n" + agent)};
}

}  // namespace

std::optional<Mark> Tier::read_mark(const std::string& agent) const {
  std::string text;
  try {
    text = store_.read_record(mark_record(url_, agent));
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound || error.code() == ErrorCode::kCorruption) return std::nullopt;
    throw;
  }
  std::vector<std::string> lines;
  for (size_t at = 0, end; (end = text.find('\n', at)) != text.npos; at = end + 1) {
    lines.push_back(text.substr(at, end - at));
  }
  if (lines.size() < 2) return std::nullopt;
  return Mark{lines[0], lines[1], {lines.begin() + 2, lines.end()}};
}

void Tier::keep_mark(const std::string& agent, const Mark& mark) {
  std::string text = mark.save + "\n" + mark.checksum + "\n";
  for (const std::string& key : mark.damaged) text += key + "\n";
  store_.keep_record(mark_record(url_, agent), text);
}

}  // namespace torpor::remote
