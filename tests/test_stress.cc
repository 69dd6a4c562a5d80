// Everything at once: threads that talk to, fork, cut, rename, remove, prefetch, save and put to sleep a dozen agents
// in the memory of three. Whatever the order was, each agent must be what its own history makes of it: every history is
// replayed on an engine that nothing disturbs, and texts, ids and logits must be the same, bit for bit.
//
// TORPOR_STRESS_SEED chooses other operations; how threads interleave is the system's choice.
// TORPOR_STRESS_OPERATIONS sets how many there are (1,000; `make soak` does more, and sanitizers fewer).

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include <gtest/gtest.h>

#include "faces/error_table.h"
#include "store_fixture.h"
#include "tiny_lfm2.h"
#include "tiny_model.h"
#include "torpor/engine.h"
#include "torpor/error.h"

namespace torpor {
namespace {

using testing::TemporaryDirectory;
namespace fs = std::filesystem;

constexpr int kThreads = 4, kAgents = 12;
constexpr int kRunsOfAnAgent = 3;   // of 256 tokens, the open one among them
constexpr int kLongEnough = 1200;   // tokens: beyond them an agent is cut, not talked to

int operations() {
  const char* given = std::getenv("TORPOR_STRESS_OPERATIONS");
  return given != nullptr ? std::atoi(given) : 1000;
}

/// One change of an agent, with what it answered. An agent's history is the list of these from its beginning. Forks
/// share theirs.
struct Change {
  std::shared_ptr<const Change> before;
  std::optional<TurnRequest> turn;  ///< else a cut
  int64_t tokens = 0;               ///< held afterwards
  std::string text;
  // What was looked at when the agent was in this state, by the one thread that had it.
  mutable std::vector<float> logits;
  mutable std::vector<int32_t> ids;
};
using History = std::shared_ptr<const Change>;

std::string words(std::mt19937& random, int n) {
  static const char* const kWords[] = {"the",    "quick", "fox",   "jumps", "over",
                                       "return", "null",  "range", "lazy",  "dog"};
  std::string text;
  for (int i = 0; i < n; ++i) text.append(i == 0 ? "" : " ").append(kWords[random() % 10]);
  return text;
}

/// Three system prompts that agents share, so that new ones begin with rows of others.
const std::string& system_prompt(size_t which) {
  static const std::array<std::string, 3> prompts = [] {
    std::mt19937 random(3);
    std::array<std::string, 3> made;
    // The first two part ways within a sealed run.
    const std::string common = words(random, 60);
    for (std::string& prompt : made) prompt = words(random, 110);
    made[0] = common + " " + made[0];
    made[1] = common + " " + made[1];
    return made;
  }();
  return prompts[which];
}

struct Slot {
  std::mutex mutex;  ///< whoever changes the agent has it
  History history;   ///< nullptr: there is no such agent
  std::mutex name_mutex;
  std::string name;  ///< may be read by whoever changes nothing

  std::string current_name() {
    const std::lock_guard lock(name_mutex);
    return name;
  }
  void set_name(const std::string& other) {
    const std::lock_guard lock(name_mutex);
    name = other;
  }
};

/// The parameter: whether the model has recurrent layers.
class Stress : public ::testing::TestWithParam<bool> {
 protected:
  Stress() { GetParam() ? testing::write_tiny_lfm2(model_) : testing::write_tiny_model(model_); }

  EngineOptions options(const char* store) {
    EngineOptions made;
    made.model = model_.string();
    made.store = directory_.path() / store;
    made.durability = Durability::kRename;
    return made;
  }

  /// One random operation. Throws what the engine throws.
  void operate(std::mt19937& random);
  // The caller has the slot.
  void turn(Slot& slot, std::mt19937& random);
  void cut(Slot& slot, std::mt19937& random);
  void rename(Slot& slot);
  void remove(Slot& slot);
  /// Notes what the agent's state is, for the replay to compare with.
  void look(Slot& slot, bool ids);
  // Nobody has a slot.
  void fork(std::mt19937& random);
  void change(Slot& slot, unsigned chosen, std::mt19937& random);
  void work(unsigned seed);

  void replay(Engine& engine, const History& history, const std::string& name);

  /// Where to cut an agent of `tokens` tokens: half of the time inside a sealed run, where it has one.
  static int64_t cut_of(int64_t tokens, std::mt19937& random) {
    const int64_t sealed = tokens / kSegmentTokens * kSegmentTokens;
    const int64_t bound = sealed > 0 && random() % 4 != 0 ? sealed : tokens;
    return std::max<int64_t>(1, bound / 3 + int64_t(random() % uint32_t(bound - bound / 3)));
  }
  static bool inside_sealed_run(int64_t at, int64_t tokens) {
    return at % kSegmentTokens != 0 && at < tokens / kSegmentTokens * kSegmentTokens;
  }
  void count_cut(int64_t at, int64_t tokens) { cuts_ += inside_sealed_run(at, tokens) ? 1 : 0; }
  std::string new_name() { return "agent-" + std::to_string(++names_); }
  void finished(History history) {
    const std::lock_guard lock(mutex_);
    histories_.push_back(std::move(history));
  }

  const TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  const fs::path model_ = directory_.path() / "model";
  std::unique_ptr<Engine> engine_;
  std::array<Slot, kAgents> slots_;
  const int operations_ = operations();
  std::atomic<int> begun_{0}, done_{0}, cuts_{0}, names_{0};
  std::mutex mutex_;
  std::vector<History> histories_;        ///< of agents that are no more
  std::map<std::string, int> refusals_;
  std::vector<History> nameless_;
};

TurnRequest new_turn(std::mt19937& random, bool fresh) {
  TurnRequest request;
  request.prompt = words(random, 40 + int(random() % 140));
  request.raw = random() % 4 == 0;
  if (fresh && !request.raw) request.system = system_prompt(random() % 3);
  request.save = std::array{SaveMode::kBehind, SaveMode::kWait, SaveMode::kNo, SaveMode::kBehind}[random() % 4];
  request.generate.max_tokens = 1 + int(random() % 8);
  request.generate.sampling = {.temperature = 1, .top_p = 1, .seed = random()};
  return request;
}

void expect_told(const TurnResult& result) {
  EXPECT_FALSE(result.damage) << *result.damage;
  EXPECT_FALSE(result.save_error) << result.save_error->what();
}

void Stress::turn(Slot& slot, std::mt19937& random) {
  if (slot.history && slot.history->tokens > kLongEnough) return cut(slot, random);
  TurnRequest request = new_turn(random, slot.history == nullptr);
  request.agent = slot.history ? slot.current_name() : new_name();
  TurnRequest heard = request;
  if (random() % 8 == 0) heard.generate.on_text = [this](std::string_view) { engine_->memory_usage(); };
  const TurnResult result = engine_->turn(heard);
  expect_told(result);
  slot.history = std::make_shared<Change>(Change{slot.history, request, result.tokens.context, result.text, {}, {}});
  slot.set_name(request.agent);
}

void Stress::cut(Slot& slot, std::mt19937& random) {
  const int64_t held = slot.history->tokens, at = cut_of(held, random);
  engine_->rewind(slot.current_name(), at);
  slot.history = std::make_shared<Change>(Change{slot.history, std::nullopt, at, "", {}, {}});
  count_cut(at, held);
}

void Stress::fork(std::mt19937& random) {
  const size_t from = random() % kAgents, to = (from + 1 + random() % (kAgents - 1)) % kAgents;
  Slot &source = slots_[from], &target = slots_[to];
  const std::scoped_lock locks(source.mutex, target.mutex);
  if (!source.history) return turn(source, random);
  if (target.history) remove(target);
  const std::string name = new_name();
  const int64_t held = source.history->tokens;
  if (random() % 3 == 0) {
    engine_->fork(source.current_name(), name);
    target.history = source.history;
  } else {
    const int64_t at = cut_of(held, random);
    engine_->fork(source.current_name(), name, at);
    target.history = std::make_shared<Change>(Change{source.history, std::nullopt, at, "", {}, {}});
    count_cut(at, held);
  }
  target.set_name(name);
}

void Stress::rename(Slot& slot) {
  const std::string name = new_name();
  engine_->rename(slot.current_name(), name);
  slot.set_name(name);
}

void Stress::remove(Slot& slot) {
  look(slot, false);
  engine_->remove(slot.current_name());
  finished(std::exchange(slot.history, nullptr));
}

void Stress::look(Slot& slot, bool ids) {
  const std::string name = slot.current_name();
  const std::vector<float> logits = engine_->next_logits(name);
  // Forks share a state: what two of them say of it must be the same.
  const std::lock_guard lock(mutex_);
  if (slot.history->logits.empty()) slot.history->logits = logits;
  EXPECT_EQ(slot.history->logits, logits) << name;
  if (!ids) return;
  engine_->sleep(name);
  slot.history->ids = engine_->store().agent_tokens(name);
  EXPECT_EQ(int64_t(slot.history->ids.size()), slot.history->tokens) << name;
}

void Stress::change(Slot& slot, unsigned chosen, std::mt19937& random) {
  const std::lock_guard lock(slot.mutex);
  if (!slot.history || chosen < 40) {
    turn(slot, random);
  } else if (chosen < 61) {
    cut(slot, random);
  } else if (chosen < 65) {
    rename(slot);
  } else {
    remove(slot);
  }
}

void Stress::operate(std::mt19937& random) {
  Slot& slot = slots_[random() % kAgents];
  const unsigned chosen = random() % 100;
  if (chosen < 67) return change(slot, chosen, random);
  if (chosen < 82) return fork(random);
  if (chosen < 87) {
    const TurnRequest request = new_turn(random, true);
    const TurnResult result = engine_->turn(request);
    expect_told(result);
    const std::lock_guard lock(mutex_);
    nameless_.push_back(std::make_shared<Change>(Change{nullptr, request, result.tokens.context, result.text, {}, {}}));
    return;
  }
  // What changes no agent is done to whatever agent has the name just now, or had it.
  const std::string name = slot.current_name();
  if (name.empty()) return change(slot, 0, random);
  if (chosen < 91) {
    engine_->prefetch(name);
  } else if (chosen < 94) {
    engine_->save(name);
  } else if (chosen < 97) {
    engine_->sleep(name);
  } else if (chosen < 98) {
    engine_->save_all();
  } else if (chosen < 99) {
    engine_->finish_saves();
  } else {
    const MemoryUsage usage = engine_->memory_usage();
    EXPECT_LE(usage.kv_bytes, usage.budget);
  }
}

void Stress::work(unsigned seed) {
  std::mt19937 random(seed);
  while (begun_++ < operations_) {
    try {
      operate(random);
      ++done_;
    } catch (const Error& error) {
      const bool expected = error.code() == ErrorCode::kResourceExhausted || error.code() == ErrorCode::kBusy ||
                            error.code() == ErrorCode::kNotFound;
      EXPECT_TRUE(expected) << error.what();
      const std::lock_guard lock(mutex_);
      ++refusals_[faces::error_mapping(error.code()).name];
    }
  }
}

void Stress::replay(Engine& engine, const History& history, const std::string& name) {
  std::vector<const Change*> changes;
  for (const Change* at = history.get(); at != nullptr; at = at->before.get()) changes.push_back(at);
  for (auto at = changes.rbegin(); at != changes.rend(); ++at) {
    const Change& change = **at;
    if (change.turn) {
      TurnRequest request = *change.turn;
      request.agent = name;
      request.save = SaveMode::kNo;
      const TurnResult result = engine.turn(request);
      ASSERT_EQ(result.text, change.text) << name;
      ASSERT_EQ(result.tokens.context, change.tokens) << name;
    } else {
      engine.rewind(name, change.tokens);
    }
    if (!change.logits.empty()) {
      ASSERT_EQ(engine.next_logits(name), change.logits) << name;
    }
    if (!change.ids.empty()) {
      engine.sleep(name);
      ASSERT_EQ(engine.store().agent_tokens(name), change.ids) << name;
    }
  }
  engine.remove(name);
}

TEST_P(Stress, AgentsAreWhatTheirHistoriesMakeOfThem) {
  const char* given = std::getenv("TORPOR_STRESS_SEED");
  const unsigned seed = given != nullptr ? unsigned(std::strtoul(given, nullptr, 10)) : std::random_device()();
  std::printf("TORPOR_STRESS_SEED=%u\n", seed);
  std::fflush(stdout);

  EngineOptions bounded = options("store");
  // Two layers with keys and values, of one head of 32 floats or two of 16.
  const size_t run_bytes = size_t(kSegmentTokens) * 2 * 2 * 32 * sizeof(float);
  bounded.memory_budget = 3 * kRunsOfAnAgent * run_bytes;
  engine_ = std::make_unique<Engine>(bounded);

  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([this, seed, i] { work(seed + unsigned(i)); });
  for (std::thread& thread : threads) thread.join();
  engine_->finish_saves();

  const MemoryUsage usage = engine_->memory_usage();
  std::string refused;
  for (const auto& [name, count] : refusals_) refused += std::string(" ") + name + " " + std::to_string(count);
  std::printf("done %d, cuts inside sealed runs %d, evictions %lld, refused%s\n", done_.load(), cuts_.load(),
              static_cast<long long>(usage.evictions), refused.c_str());
  EXPECT_GE(done_, operations_ * 8 / 10);
  EXPECT_GE(cuts_, operations_ / 10);
  EXPECT_GE(usage.evictions, operations_ / 5);
  for (Slot& slot : slots_) {
    if (!slot.history) continue;
    look(slot, true);
    finished(slot.history);
  }
  EXPECT_EQ(engine_->store().get_cache_disk_usage().agents, engine_->store().list_cached_agents().size());
  for (const VerifyReport& report : engine_->store().verify()) {
    EXPECT_TRUE(report.problems.empty()) << report.agent_id << ": " << report.problems.front();
  }
  engine_.reset();

  // Of histories that others go on from, only those are replayed: they are looked at on the way.
  std::set<const Change*> inner;
  for (const History& history : histories_) {
    for (const Change* at = history->before.get(); at != nullptr; at = at->before.get()) inner.insert(at);
  }
  Engine undisturbed(options("undisturbed"));
  int replayed = 0;
  std::set<const Change*> seen;
  for (const History& history : histories_) {
    if (inner.count(history.get()) != 0 || !seen.insert(history.get()).second) continue;
    replay(undisturbed, history, "replay-" + std::to_string(++replayed));
    if (HasFatalFailure()) return;
  }
  for (const History& prompt : nameless_) replay(undisturbed, prompt, "nameless-" + std::to_string(++replayed));
}

INSTANTIATE_TEST_SUITE_P(Models, Stress, ::testing::Bool(), [](const ::testing::TestParamInfo<bool>& recurrent) {
  return recurrent.param ? "WithStates" : "OfRowsAlone";
});

}  // namespace
}  // namespace torpor
