#pragma once
/// Workers, clients and sweepers on one simulated bucket, and what must hold at every moment of it.

#include <algorithm>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>

#include "remote/lease.h"
#include "remote/ownership.h"
#include "remote/sweep.h"
#include "simulated_bucket.h"
#include "torpor/error.h"

namespace torpor::testing {

using namespace remote;

/// Ways to get the protocol wrong. Each must be found.
enum class Flaw {
  kNone,
  kNoSaveId,        ///< a head that is another one is replaced all the same
  kWallClock,       ///< a lease is dead when its time is old by one's own wall clock
  kEarlyAnswer,     ///< a turn is acknowledged before the swap
  kNoGenerations,   ///< the sweeper removes whatever no head names at the moment
};

/// An agent's turns, first to last: what its file holds.
using Turns = std::vector<std::string>;

inline std::string joined(const Turns& turns) {
  std::string text;
  for (const std::string& turn : turns) text += turn + " ";
  return text;
}

inline Turns parted(const std::string& text) {
  std::istringstream stream(text);
  Turns turns;
  for (std::string turn; stream >> turn;) turns.push_back(turn);
  return turns;
}

/// What was promised, and whether the bucket keeps it. Looks at every put and every removal as it is applied.
class Promises {
 public:
  Promises(Events& events, SimulatedBucket& bucket) : events_(events), bucket_(bucket) {
    bucket.on_put = [this](const std::string& key, const std::string& text) {
      if (key.ends_with("/head")) head_changes(key, text);
    };
    bucket.on_remove = [this](const std::string& key) {
      for (const auto& [agent, state] : agents_) {
        if (state.needs.count(key) > 0) broken("'" + key + "' is removed, and the head of '" + agent + "' needs it");
      }
    };
  }

  /// The first promise that was not kept.
  const std::string& broken_promise() const { return broken_; }
  void broken(const std::string& what) {
    if (broken_.empty()) broken_ = what + " at " + std::to_string(events_.now() / kMillisecond) + " ms";
  }

  /// A client was told that the turns up to this one stand, by the head of this sequence.
  void acknowledged(const std::string& agent, const Turns& turns, int64_t sequence) {
    State& state = agents_[agent];
    if (sequence < state.tombstone) return;
    for (const std::string& turn : turns) {
      if (std::find(state.told.begin(), state.told.end(), turn) != state.told.end()) continue;
      // A worker that was paused may tell of it after others have told of later ones.
      const auto here = std::find(state.turns.begin(), state.turns.end(), turn);
      state.told.insert(std::find_if(state.told.begin(), state.told.end(),
                                     [&](const std::string& told) {
                                       return std::find(here, state.turns.end(), told) != state.turns.end();
                                     }),
                        turn);
    }
    holds(agent, state.told, state.turns, "the bucket");
  }
  /// What a client that asks now must be shown.
  Turns told(const std::string& agent) { return agents_[agent].told; }
  int64_t tombstone(const std::string& agent) { return agents_[agent].tombstone; }
  void holds(const std::string& agent, const Turns& told, const Turns& turns, const std::string& who) {
    size_t next = 0;
    for (const std::string& turn : turns) next += next < told.size() && told[next] == turn;
    if (next < told.size()) {
      broken("the turn " + told[next] + " of '" + agent + "' was acknowledged, and " + who + " lacks it");
    }
  }
  std::set<std::string> needed() const {
    std::set<std::string> all;
    for (const auto& [agent, state] : agents_) all.insert(state.needs.begin(), state.needs.end());
    return all;
  }

 private:
  struct State {
    std::optional<Head> head;
    std::map<int64_t, std::string> committers;  ///< by epoch
    std::set<std::string> needs;
    Turns turns, told;
    int64_t tombstone = 0;
  };

  void head_changes(const std::string& key, const std::string& text) {
    const std::string agent = key.substr(7, key.size() - 12);
    State& state = agents_[agent];
    const Head head = decode_head(text, key);
    if (state.head) {
      if (head.epoch < state.head->epoch) broken("the epoch of '" + agent + "' shrinks");
      if (head.sequence != state.head->sequence + 1) broken("a head of '" + agent + "' is lost");
    }
    const bool commits = !head.file.empty() && (!state.head || head.file != state.head->file);
    if (commits) {
      const auto [first, is_first] = state.committers.emplace(head.epoch, head.owner);
      if (head.owner.empty() || first->second != head.owner) broken("an epoch of '" + agent + "' has two committers");
    }
    state.head = head;
    if (head.deleted) {
      state.tombstone = head.sequence;
      state.told.clear();
    }
    state.needs.clear();
    state.turns.clear();
    if (head.file.empty()) {
      holds(agent, state.told, state.turns, "the bucket");
      return;
    }
    const std::string file = save_key(agent, head.file);
    state.needs.insert(file);
    const auto saved = bucket_.objects().find(file);
    if (saved == bucket_.objects().end()) return broken("'" + file + "' is missing");
    const std::string& bytes = saved->second.text;
    for (const std::string& name : decode_manifest(bytes, file)) {
      state.needs.insert(name);
      if (bucket_.objects().count(name) == 0) broken("'" + name + "', which '" + agent + "' needs, is missing");
    }
    state.turns = parted(bytes.substr(manifest_bytes(bytes, bytes.size(), file)));
    if (std::set<std::string>(state.turns.begin(), state.turns.end()).size() != state.turns.size()) {
      broken("a turn of '" + agent + "' was run twice");
    }
    holds(agent, state.told, state.turns, "the bucket");
  }

  Events& events_;
  SimulatedBucket& bucket_;
  std::map<std::string, State> agents_;
  std::string broken_;
};

struct Fleet;

/// What a worker says to a client.
struct Said {
  bool done = false;
  std::string owner;  ///< who has the agent, where that is known
};
using Reply = std::function<void(Said)>;

/// An exchange whose requests a worker makes, with the bytes that they speak of by number.
struct Errand : Exchange {
  std::vector<std::string> blobs;
};

/// A process from its start to its crash.
class Process {
 public:
  Process(Fleet& fleet, int worker, int64_t boot, double rate, SimTime wall);

  const std::string& session() const { return keeper_.lease().session; }
  bool is_alive() const { return alive_; }
  /// `predecessor`: the session of the process that it follows and knows to have ended; empty: it knows of none.
  void start(const std::string& predecessor);
  /// From now on nothing of it happens; `kill` frees what it has.
  void stop() { alive_ = false; }
  void kill();
  void pause(SimTime time);
  /// Runs at once, or as soon as the process is no longer paused.
  void handle(std::function<void()> action);

  void ask_turn(const std::string& agent, const std::string& turn, Reply reply);
  void ask_fork(const std::string& source, const std::string& target, Reply reply);
  void ask_removal(const std::string& agent, Reply reply);
  void ask_archive(const std::string& agent);
  void ask_release(const std::string& agent);
  /// What an owner answers from memory; nullopt: it doesn't.
  std::optional<Turns> read(const std::string& agent);
  void ask_sweep(std::function<void(bool)> ended);

 private:
  /// An agent in memory.
  struct Held {
    HeadVersion version;
    Turns turns;
    std::vector<std::string> keys;
  };
  struct Job {
    Errand errand;
    std::optional<Operation<bool>> operation;
    std::vector<Answer> answers;
    size_t open = 0;
  };
  /// One job at a time works on an agent.
  struct Working {
    Working(std::set<std::string>& agents, std::string agent) : agents(agents), agent(std::move(agent)) {
      agents.insert(this->agent);
    }
    ~Working() { agents.erase(agent); }
    Working(const Working&) = delete;
    std::set<std::string>& agents;
    std::string agent;
  };
  struct Ticket {
    explicit Ticket(Generations& generations) : generations(generations), generation(generations.begin()) {}
    ~Ticket() { generations.end(generation); }
    Ticket(const Ticket&) = delete;
    Generations& generations;
    int64_t generation;
  };

  using Start = std::function<Operation<bool>(Errand&)>;
  void run(const Start& start);
  void go_on(const std::shared_ptr<Job>& job);
  void every_third_of_a_ttl();
  Instant clock() const;
  std::string new_id();
  IsGone is_gone();
  Operation<Held*> hold(Errand& errand, std::string agent, Make make, Said& said);
  Operation<bool> turn(Errand& errand, std::string agent, std::string turn, Reply reply);
  Operation<bool> fork(Errand& errand, std::string source, std::string target, Reply reply);
  Operation<bool> removal(Errand& errand, std::string agent, Reply reply);
  Operation<bool> rewrite(Errand& errand, std::string agent, bool archive);
  Operation<bool> look_around(Errand& errand);
  Operation<bool> renew(Errand& errand);
  Operation<bool> remove_lease(Errand& errand, std::string session);
  Operation<bool> sweep_all(Errand& errand, std::function<void(bool)> ended);
  SaveRequest save_of(Errand& errand, const std::string& agent, const Turns& turns, std::vector<std::string> kept);

  Fleet& fleet_;
  const SimTime began_;
  double rate_;
  SimTime wall_;
  Generations generations_;
  LeaseKeeper keeper_;
  LeaseWatch watch_;
  std::map<std::string, Held> held_;
  std::set<std::string> working_;
  bool alive_ = true, renewing_ = false, looking_ = false;
  SimTime paused_until_ = 0;
  std::vector<std::function<void()>> waiting_;
  std::set<std::shared_ptr<Job>> jobs_;  ///< last: what runs refers to the rest
};

struct Fleet {
  Fleet(uint64_t seed, Flaw flaw);
  /// Runs a whole story. Empty, or the promise that was not kept.
  std::string run();

  Process& process(int worker) { return *processes[size_t(worker)]; }
  void start(int worker);
  void crash(Process& process);
  void client_asks(int agent);
  void background();

  Flaw flaw;
  Random random;
  Events events;
  SimulatedBucket bucket;
  Promises promises;
  bool is_calm = false;  ///< no more crashes, pauses and lost messages
  int64_t ids = 0, boots = 0;
  std::vector<std::shared_ptr<Process>> processes;  ///< the one of each worker
  std::vector<std::shared_ptr<Process>> ended;      ///< whose events may still come

  struct Client {
    std::string agent, source;  ///< `source`: it begins as a fork
    int turns = 0, done = 0, asked = 0;
    bool made = false, removes = false, over = false;
    std::string owner;
  };
  std::vector<Client> clients;
};

}  // namespace torpor::testing
