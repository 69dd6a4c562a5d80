#include "simulated_fleet.h"

namespace torpor::testing {
namespace {

constexpr int kWorkers = 3;
constexpr SimTime kTtl = 10 * kSecond;
constexpr SimTime kPatience = 4 * kSecond;  ///< after which a client asks again

Lease lease_of(int worker, int64_t boot) {
  Lease lease;
  lease.session = "w" + std::to_string(worker) + "-" + std::to_string(boot);
  lease.address = std::to_string(worker);
  lease.ttl_ms = kTtl / kMillisecond;
  return lease;
}

/// Every second turn seals a segment; one is common to all agents.
std::vector<std::pair<std::string, std::string>> segments_of(const Turns& turns) {
  std::vector<std::pair<std::string, std::string>> segments;
  std::string text = "system ";
  for (size_t i = 0; i <= turns.size(); ++i) {
    if (i % 2 == 0) {
      const std::string name = hash_hex(text);
      segments.emplace_back("segments/" + name.substr(0, 2) + "/" + name, hash_hex(text + "rows"));
    }
    if (i < turns.size()) text += turns[i] + " ";
  }
  return segments;
}

/// A sweep as one would write it without thinking.
Operation<bool> careless_sweep(Exchange& exchange) {
  std::set<std::string> named;
  Answer agents = co_await ask_firmly(exchange, list_request(kAgentsPrefix));
  for (const ObjectInfo& object : agents.objects) {
    if (!object.key.ends_with("/head")) continue;
    Answer text = co_await ask_firmly(exchange, get_request(object.key));
    const Head head = decode_head(text.text, object.key);
    if (head.file.empty()) continue;
    const std::string file = object.key.substr(0, object.key.size() - 4) + head.file;
    Answer saved = co_await ask_firmly(exchange, get_request(file));
    if (!saved.done()) co_return false;
    for (const std::string& key : decode_manifest(saved.text, file)) named.insert(key);
  }
  Answer pool = co_await ask_firmly(exchange, list_request("segments/"));
  for (const ObjectInfo& object : pool.objects) {
    if (named.count(object.key) > 0) continue;
    co_await ask_firmly(exchange, remove_request(object.key));
  }
  co_return true;
}

}  // namespace

Process::Process(Fleet& fleet, int worker, int64_t boot, double rate, SimTime wall)
    : fleet_(fleet),
      began_(fleet.events.now()),
      rate_(rate),
      wall_(wall),
      keeper_(lease_of(worker, boot), generations_) {}

Instant Process::clock() const {
  return std::chrono::microseconds(int64_t(double(fleet_.events.now()) * rate_) + 1'000'000 * int64_t(rate_ * 1000));
}

std::string Process::new_id() {
  std::string id = std::to_string(++fleet_.ids);
  return std::string(32 - id.size(), '0') + id;
}

void Process::kill() {
  alive_ = false;
  jobs_.clear();
  waiting_.clear();
}

void Process::pause(SimTime time) {
  paused_until_ = fleet_.events.now() + time;
  fleet_.events.after(time, [this] {
    if (!alive_ || fleet_.events.now() < paused_until_) return;
    std::vector<std::function<void()>> actions;
    std::swap(actions, waiting_);
    for (const auto& action : actions) handle(action);
  });
}

void Process::handle(std::function<void()> action) {
  if (!alive_) return;
  if (fleet_.events.now() < paused_until_) {
    waiting_.push_back(std::move(action));
    return;
  }
  action();
}

void Process::run(const Start& start) {
  auto job = std::make_shared<Job>();
  jobs_.insert(job);
  job->operation.emplace(start(job->errand));
  job->operation->start();
  go_on(job);
}

void Process::go_on(const std::shared_ptr<Job>& job) {
  if (job->operation->done()) {
    try {
      job->operation->result();
    } catch (const LostAnswer&) {  // whoever asked asks again
    } catch (const Error& error) {
      fleet_.promises.broken(std::string("a worker met an error: ") + error.what());
    }
    jobs_.erase(job);
    return;
  }
  if (!fleet_.is_calm && fleet_.random.chance(0.002)) return fleet_.crash(*this);
  if (!fleet_.is_calm && fleet_.random.chance(0.002)) {
    const bool long_one = fleet_.random.chance(0.2);
    pause((long_one ? fleet_.random.between(60, 4000) : fleet_.random.between(1, 20)) * kSecond);
  }
  const std::vector<Request> requests = job->errand.requests();
  job->answers.assign(requests.size(), {});
  job->open = requests.size();
  const Instant sent = clock();
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::weak_ptr<Job> waits = job;  // its process may end before the answer comes
    const auto answered = [this, waits, i, sent](Answer answer) {
      handle([this, waits, i, sent, answer = std::move(answer)] {
        const std::shared_ptr<Job> job = waits.lock();
        if (!job) return;
        job->answers[i] = answer;
        job->answers[i].sent = sent;
        job->answers[i].received = clock();
        if (--job->open > 0) return;
        job->errand.answer(std::move(job->answers));
        go_on(job);
      });
    };
    if (requests[i].kind == Request::Kind::kWait) {
      const auto time = std::chrono::duration_cast<std::chrono::microseconds>(requests[i].wait).count();
      fleet_.events.after(SimTime(double(time) / rate_), [answered] { answered({}); });
    } else {
      const auto blob = requests[i].blob;
      fleet_.bucket.send(requests[i], blob ? job->errand.blobs[*blob] : std::string(), answered);
    }
  }
}

IsGone Process::is_gone() {
  return [this](const std::string& session) {
    if (fleet_.flaw != Flaw::kWallClock) return watch_.is_gone(session);
    const auto lease = fleet_.bucket.objects().find(lease_key(session));
    return lease == fleet_.bucket.objects().end() || fleet_.events.now() + wall_ - lease->second.modified > kTtl;
  };
}

Operation<bool> Process::renew(Errand& errand) {
  const bool renewed = co_await keeper_.renew(errand);
  renewing_ = false;
  co_return renewed;
}

Operation<bool> Process::look_around(Errand& errand) {
  const bool looked = co_await watch_.look(errand);
  looking_ = false;
  co_return looked;
}

void Process::every_third_of_a_ttl() {
  handle([this] {
    if (!renewing_) {
      renewing_ = true;
      run([this](Errand& errand) { return renew(errand); });
    }
    if (alive_ && !looking_) {
      looking_ = true;
      run([this](Errand& errand) { return look_around(errand); });
    }
    if (!alive_) return;
    // A worker that can't renew ends; its supervisor starts another.
    const bool has_begun = fleet_.events.now() - began_ > kTtl;
    if (has_begun && !keeper_.may_answer(clock())) return fleet_.crash(*this);
    fleet_.events.after(SimTime(double(kTtl / 3) / rate_), [this] {
      if (alive_) every_third_of_a_ttl();
    });
  });
}

/// The agent in memory, woken where it is not; nullptr: not now.
Operation<Process::Held*> Process::hold(Errand& errand, std::string agent, Make make, Said& said) {
  if (const auto found = held_.find(agent); found != held_.end()) co_return &found->second;
  Acquired acquired = co_await acquire(errand, agent, session(), make, new_id(), is_gone());
  if (acquired.outcome != Acquired::Outcome::kOwned) {
    said.owner = acquired.version.head.owner;
    co_return nullptr;
  }
  generations_.learn(acquired.generation);
  Held held{acquired.version, {}, {}};
  if (!held.version.head.file.empty()) {
    std::optional<ReadSave> read = co_await read_save(errand, agent);
    if (!read || read->version.tag != held.version.tag) co_return nullptr;
    std::vector<Request> rows;
    for (const std::string& key : read->keys) rows.push_back(get_request(key));
    const std::vector<Answer> answers = co_await ask_all_firmly(errand, rows);
    for (const Answer& answer : answers) {
      if (answer.done()) continue;
      const Answer now = co_await ask_firmly(errand, get_request(head_key(agent)));
      if (now.tag == held.version.tag) fleet_.promises.broken("rows of '" + agent + "' are missing at its wake");
      co_return nullptr;
    }
    held.keys = read->keys;
    held.turns = parted(read->agent_file);
  }
  if (!keeper_.may_answer(clock())) co_return nullptr;
  co_return &(held_[agent] = std::move(held));
}

SaveRequest Process::save_of(Errand& errand, const std::string& agent, const Turns& turns,
                             std::vector<std::string> kept) {
  SaveRequest request;
  request.agent = agent;
  request.save_id = new_id();
  std::set<std::string> paths;
  for (const std::string& key : kept) paths.insert(parse_pool_key(key)->path);
  for (const auto& [path, content] : segments_of(turns)) {
    if (paths.count(path) > 0) continue;
    errand.blobs.push_back(std::string(kChecksumAt, '-') + content);
    request.uploads.push_back({path, content, errand.blobs.size() - 1});
  }
  request.kept = std::move(kept);
  errand.blobs.push_back(joined(turns));
  request.agent_file = errand.blobs.size() - 1;
  return request;
}

Operation<bool> Process::turn(Errand& errand, std::string agent, std::string turn, Reply reply) {
  Said said;
  if (!keeper_.may_answer(clock()) || working_.count(agent) > 0) co_return false;
  const Working working(working_, agent);
  Held* held = co_await hold(errand, agent, Make::kAbsent, said);
  if (held == nullptr) {
    reply(said);
    co_return false;
  }
  const TurnCheck check = check_turn(held->version.head, turn, std::string(32, '1'));
  if (check == TurnCheck::kAnswered) {
    fleet_.promises.acknowledged(agent, {turn}, held->version.head.sequence);
    said.done = true;
    reply(said);
  }
  if (check != TurnCheck::kRun) co_return true;
  Turns turns = held->turns;
  turns.push_back(turn);
  if (fleet_.flaw == Flaw::kEarlyAnswer) {
    fleet_.promises.acknowledged(agent, {turn}, held->version.head.sequence + 1);
    said.done = true;
    reply(said);
  }
  co_await errand.ask(wait_request(std::chrono::microseconds(fleet_.random.between(10, 500) * kMillisecond)));
  const Ticket ticket(generations_);
  SaveRequest request = save_of(errand, agent, turns, held->keys);
  request.turn = Turn{turn, std::string(32, '1'), turn};
  Saved saved = co_await save(errand, held->version, std::move(request), ticket.generation);
  if (saved.outcome != Saved::Outcome::kCommitted) {
    held_.erase(agent);
    reply(said);
    co_return false;
  }
  *held = {saved.version, turns, saved.keys};
  if (fleet_.flaw != Flaw::kEarlyAnswer) fleet_.promises.acknowledged(agent, {turn}, saved.version.head.sequence);
  said.done = true;
  reply(said);
  co_return true;
}

Operation<bool> Process::fork(Errand& errand, std::string source, std::string target, Reply reply) {
  Said said;
  if (!keeper_.may_answer(clock()) || working_.count(target) > 0) co_return false;
  const Working working(working_, target);
  Held* held = co_await hold(errand, target, Make::kAbsent, said);
  if (held == nullptr || !held->version.head.file.empty()) {
    said.done = held != nullptr;  // an earlier attempt came through
    reply(said);
    co_return false;
  }
  const Ticket ticket(generations_);
  std::optional<ReadSave> read = co_await read_save(errand, source);
  if (!read) {
    reply(said);
    co_return false;
  }
  const Turns turns = parted(read->agent_file);
  co_await errand.ask(wait_request(std::chrono::microseconds(fleet_.random.between(1, 3000) * kMillisecond)));
  SaveRequest request = save_of(errand, target, turns, read->keys);
  Saved saved = co_await save(errand, held->version, std::move(request), ticket.generation);
  if (saved.outcome == Saved::Outcome::kCommitted) {
    *held = {saved.version, turns, saved.keys};
    fleet_.promises.acknowledged(target, turns, saved.version.head.sequence);
    said.done = true;
  } else {
    held_.erase(target);
  }
  reply(said);
  co_return said.done;
}

Operation<bool> Process::removal(Errand& errand, std::string agent, Reply reply) {
  Said said;
  if (!keeper_.may_answer(clock()) || working_.count(agent) > 0) co_return false;
  const Working working(working_, agent);
  Held* held = co_await hold(errand, agent, Make::kNever, said);
  if (held == nullptr) {
    said.done = said.owner.empty();
    reply(said);
    co_return false;
  }
  Saved saved = co_await remove_agent(errand, agent, held->version, new_id());
  held_.erase(agent);
  said.done = saved.outcome == Saved::Outcome::kCommitted;
  reply(said);
  co_return said.done;
}

/// Drops an agent's rows, or lets go of the agent.
Operation<bool> Process::rewrite(Errand& errand, std::string agent, bool archive) {
  const auto held = held_.find(agent);
  if (held == held_.end() || !keeper_.may_answer(clock()) || working_.count(agent) > 0) co_return false;
  const Working working(working_, agent);
  if (!archive) {
    // It is out of memory before others may have it: nobody reads it here meanwhile.
    const HeadVersion version = std::move(held->second.version);
    held_.erase(held);
    co_await release(errand, agent, version, new_id());
    co_return true;
  }
  const Ticket ticket(generations_);
  SaveRequest request;
  request.agent = agent;
  request.save_id = new_id();
  request.turn = held->second.version.head.turn;
  errand.blobs.push_back(joined(held->second.turns));
  const Saved saved = co_await save(errand, held->second.version, std::move(request), ticket.generation);
  if (saved.outcome == Saved::Outcome::kCommitted) {
    held->second.version = saved.version;
    held->second.keys.clear();
  } else {
    held_.erase(agent);
  }
  co_return true;
}

Operation<bool> Process::sweep_all(Errand& errand, std::function<void(bool)> ended) {
  if (fleet_.flaw == Flaw::kNoGenerations) {
    const bool swept = co_await careless_sweep(errand);
    ended(swept);
    co_return swept;
  }
  SweepOptions options;
  options.session = session();
  options.save_ids = new_id().substr(8);
  const Swept swept = co_await sweep(errand, watch_, options);
  ended(swept.outcome == Swept::Outcome::kDone);
  co_return true;
}

void Process::ask_turn(const std::string& agent, const std::string& name, Reply reply) {
  handle([=, this] { run([=, this](Errand& errand) { return turn(errand, agent, name, reply); }); });
}
void Process::ask_fork(const std::string& source, const std::string& target, Reply reply) {
  handle([=, this] { run([=, this](Errand& errand) { return fork(errand, source, target, reply); }); });
}
void Process::ask_removal(const std::string& agent, Reply reply) {
  handle([=, this] { run([=, this](Errand& errand) { return removal(errand, agent, reply); }); });
}
void Process::ask_archive(const std::string& agent) {
  handle([=, this] { run([=, this](Errand& errand) { return rewrite(errand, agent, true); }); });
}
void Process::ask_release(const std::string& agent) {
  handle([=, this] { run([=, this](Errand& errand) { return rewrite(errand, agent, false); }); });
}
void Process::ask_sweep(std::function<void(bool)> ended) {
  handle([=, this] { run([=, this](Errand& errand) { return sweep_all(errand, ended); }); });
}

std::optional<Turns> Process::read(const std::string& agent) {
  const auto held = held_.find(agent);
  if (held == held_.end() || !keeper_.may_answer(clock())) return std::nullopt;
  return held->second.turns;
}

Operation<bool> Process::remove_lease(Errand& errand, std::string session) {
  co_await ask_firmly(errand, remove_request(lease_key(session)));
  co_return true;
}

void Process::start(const std::string& predecessor) {
  if (!predecessor.empty()) {
    watch_.has_ended(predecessor);
    run([=, this](Errand& errand) { return remove_lease(errand, predecessor); });
  }
  every_third_of_a_ttl();
}

// --- the fleet

Fleet::Fleet(uint64_t seed, Flaw flaw) : flaw(flaw), random(seed), bucket(events, random), promises(events, bucket) {
  bucket.forces_heads = flaw == Flaw::kNoSaveId;
}

void Fleet::start(int worker) {
  auto process = std::make_shared<Process>(*this, worker, ++boots, 1 + double(random.pick(181) - 90) / 1000,
                                           random.between(-60, 60) * kSecond);
  const std::shared_ptr<Process> before = std::exchange(processes[size_t(worker)], process);
  process->start(before && random.chance(0.5) ? before->session() : std::string());
}

void Fleet::crash(Process& process) {
  if (!process.is_alive()) return;
  for (int worker = 0; worker < kWorkers; ++worker) {
    if (processes[size_t(worker)].get() != &process) continue;
    ended.push_back(processes[size_t(worker)]);
    // Its jobs go when the event that this happened in is over: one of them may be it.
    events.after(0, [dying = processes[size_t(worker)]] { dying->kill(); });
    process.stop();
    events.after(random.between(100, 3000) * kMillisecond, [this, worker] { start(worker); });
  }
}

void Fleet::client_asks(int number) {
  Client& client = clients[size_t(number)];
  if (client.over) return;
  const int attempt = ++client.asked;
  int worker = int(random.pick(kWorkers));
  if (random.chance(0.8)) worker = number % kWorkers;
  for (int other = 0; other < kWorkers; ++other) {
    if (!client.owner.empty() && process(other).session() == client.owner) worker = other;
  }
  client.owner.clear();
  const auto reply = [this, number, attempt](Said said) {
    events.after(random.between(1, 20) * kMillisecond, [=, this] {
      Client& client = clients[size_t(number)];
      if (client.asked != attempt) return;  // it has asked again meanwhile, or has an answer
      const int answered = ++client.asked;
      if (said.done && !client.made) {
        client.made = true;
      } else if (said.done) {
        ++client.done;
      }
      client.owner = said.owner;
      client.over = client.done == client.turns + (client.removes ? 1 : 0);
      events.after(random.between(50, said.done ? 1500 : 500) * kMillisecond, [=, this] {
        if (clients[size_t(number)].asked == answered) client_asks(number);
      });
    });
  };
  const std::string turn = client.agent + "-" + std::to_string(client.done);
  const bool lost = !is_calm && random.chance(0.02);
  // What repeats a request on its way may come late.
  const int copies = lost ? 0 : !is_calm && random.chance(0.02) ? 2 : 1;
  for (int copy = 0; copy < copies; ++copy) {
    const SimTime there = copy == 0 ? random.between(1, 20) * kMillisecond : random.between(1, 8) * kSecond;
    events.after(there, [=, this] {
      const Client& client = clients[size_t(number)];
      if (!client.made) {
        process(worker).ask_fork(client.source, client.agent, reply);
      } else if (client.removes && turn == client.agent + "-" + std::to_string(client.turns)) {
        if (copy == 0) process(worker).ask_removal(client.agent, reply);
      } else if (!(client.removes && copy > 0)) {
        process(worker).ask_turn(client.agent, turn, reply);
      }
    });
  }
  events.after(kPatience, [=, this] {
    if (clients[size_t(number)].asked == attempt) client_asks(number);
  });
}

/// What happens beside the turns.
void Fleet::background() {
  Process& one = process(int(random.pick(kWorkers)));
  const std::string agent = clients[size_t(random.pick(int64_t(clients.size())))].agent;
  switch (random.pick(8)) {
    case 0: one.ask_sweep([](bool) {}); break;
    case 1: one.ask_archive(agent); break;
    case 2: one.ask_release(agent); break;
    case 3:
      if (!is_calm && random.chance(0.1)) crash(one);
      break;
    default: {
      // A read of what an owner has in memory; all that was told before must be in it.
      const Turns told = promises.told(agent);
      const int64_t tombstone = promises.tombstone(agent);
      one.handle([=, this, &one] {
        const auto turns = one.read(agent);
        if (turns && tombstone == promises.tombstone(agent)) promises.holds(agent, told, *turns, "its owner");
      });
    }
  }
  if (!is_calm) events.after(random.between(100, 1500) * kMillisecond, [this] { background(); });
}

std::string Fleet::run() {
  processes.resize(kWorkers);
  for (int worker = 0; worker < kWorkers; ++worker) start(worker);
  for (int i = 0; i < 5; ++i) {
    Client client;
    client.agent = "agent" + std::to_string(i);
    client.turns = int(random.between(2, 7));
    client.made = i < 3;
    client.removes = i % 2 == 1;
    if (i >= 3) client.source = "agent" + std::to_string((i - 3) * 2);
    clients.push_back(client);
  }
  for (int i = 0; i < 5; ++i) {
    events.after(random.between(4000, i < 3 ? 6000 : 20000) * kMillisecond, [this, i] { client_asks(i); });
  }
  events.after(5 * kSecond, [this] { background(); });
  const SimTime calm = random.between(20, 60) * kSecond;
  events.after(calm, [this] {
    is_calm = true;
    bucket.end_trouble();
  });

  const auto run_until = [&](const std::function<bool()>& done, SimTime limit) {
    while (promises.broken_promise().empty() && !done() && events.now() < limit && events.step()) {
    }
    return done();
  };
  // Whoever is paused wakes within the longest pause; then all goes well.
  const SimTime end = calm + 6000 * kSecond;
  const auto all_over = [&] {
    return is_calm && std::all_of(clients.begin(), clients.end(), [](const Client& client) { return client.over; });
  };
  if (!run_until(all_over, end) && promises.broken_promise().empty()) promises.broken("a client was never answered");
  // At last two sweeps leave nothing that no head needs, once no put of the time before the calm is on its way. Whoever
  // wakes from a pause puts what nobody needs after that; then two more don't leave it.
  run_until([&] { return events.now() > calm + kLatest; }, end);
  for (int clean = 0, tries = 0, wakes = 0; clean < 2 && tries < 400 && promises.broken_promise().empty(); ++tries) {
    auto ended = std::make_shared<std::optional<bool>>();
    process(tries % kWorkers).ask_sweep([ended](bool done) { *ended = done; });
    run_until([&] { return ended->has_value(); }, events.now() + 100 * kSecond);
    clean += ended->value_or(false) ? 1 : 0;
    if (clean == 2 && flaw == Flaw::kNone) {
      const std::set<std::string> needed = promises.needed();
      std::string left;
      for (const auto& [key, object] : bucket.objects()) {
        const bool is_record = key.ends_with("/head") || key == kSweepKey || key.starts_with(kNodesPrefix);
        if (!is_record && needed.count(key) == 0) left = key;
      }
      if (!left.empty() && ++wakes == 4) promises.broken("'" + left + "' is left, and nobody needs it");
      if (left.empty() || wakes == 4) continue;
      const SimTime later = events.now() + kLatest;
      run_until([&] { return events.now() > later; }, later + kLatest);
      clean = 0;
    } else if (tries == 399) {
      promises.broken("no sweep came to its end");
    }
  }
  return promises.broken_promise();
}

}  // namespace torpor::testing
