/// Several models in one server: loaded when they are named, unloaded when they are not, all within one budget.

#include <atomic>
#include <barrier>
#include <set>
#include <thread>

#include <gtest/gtest.h>

#include "server/model_pool.h"
#include "store_fixture.h"
#include "tiny_model.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

using torpor::testing::TemporaryDirectory;
using torpor::testing::TinyAttention;

/// Keeps what it hears of an answer.
class Heard : public AnswerSink {
 public:
  std::string model, said;
  AnswerEnd end;
  void start(const AnswerStart& start) override { model = start.model; }
  void thinking(std::string_view) override {}
  void text(std::string_view delta) override { said += delta; }
  void tool_call(const std::string&) override {}
  void arguments(std::string_view) override {}
  void finish(const AnswerEnd& ended) override { end = ended; }
};

class ModelPoolTest : public ::testing::Test {
 protected:
  ModelPoolTest() {
    torpor::testing::write_tiny_model(path("plain"), TinyAttention::kPlain);
    torpor::testing::write_tiny_model(path("biased"), TinyAttention::kBiased);
  }
  std::string path(const std::string& name) const { return (directory_.path() / name).string(); }
  ModelPoolOptions options(size_t memory_budget = 0) const {
    ModelPoolOptions made;
    made.models = {{"plain", path("plain")}, {"biased", path("biased")}};
    made.aliases = {{"claude-*", "biased"}, {"small", "plain"}};
    made.engine.store = directory_.path() / "store";
    made.engine.durability = Durability::kRename;
    made.engine.memory_budget = memory_budget;
    return made;
  }
  Heard ask(ModelPool& pool, const std::string& model, const std::string& agent = "", int words = 1,
            int max_tokens = 4) const {
    ChatRequest request;
    request.model = model;
    request.agent = agent;
    request.messages.push_back({Role::kUser, "Hi."});
    for (int i = 0; i < words; ++i) request.messages.back().text += " " + std::to_string(i * i);
    request.max_tokens = max_tokens;
    request.sampling.temperature = 0;
    Heard heard;
    pool.run(request, heard, gone_);
    return heard;
  }
  static std::set<std::string> loaded(ModelPool& pool) {
    std::set<std::string> names;
    for (const ModelEntry& entry : pool.models()) {
      if (entry.loaded) names.insert(entry.name);
    }
    return names;
  }
  using Names = std::set<std::string>;

  const TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  const std::atomic<bool> gone_{false};
};

TEST_F(ModelPoolTest, AProgramsModelIsFoundByAnotherPathToIt) {
  ModelPool pool(options());
  EXPECT_EQ(pool.of_source(path("plain/../biased/")).name(), "biased");
  EXPECT_EQ(pool.of_source("biased").name(), "biased");
  EXPECT_EQ(pool.of_source("/moved/away/biased").name(), "biased");
  for (const std::string source : {"their/model", "/moved/away/bias"}) {
    try {
      pool.of_source(source);
      FAIL() << source;
    } catch (const Failure& failure) {
      EXPECT_EQ(failure.kind, Failure::Kind::kNotFound);
      EXPECT_NE(std::string(failure.what()).find("'plain', 'biased'"), std::string::npos) << failure.what();
    }
  }
}

TEST_F(ModelPoolTest, AModelIsLoadedWhenARequestNamesItByNamePathOrAlias) {
  ModelPool pool(options());
  EXPECT_EQ(loaded(pool), Names{"plain"});
  EXPECT_EQ(ask(pool, "").model, "plain");
  EXPECT_EQ(ask(pool, "small").model, "plain");
  EXPECT_EQ(loaded(pool), Names{"plain"});
  EXPECT_EQ(ask(pool, "claude-haiku-9").model, "biased");
  EXPECT_EQ(loaded(pool), (Names{"plain", "biased"}));
  EXPECT_EQ(ask(pool, path("biased")).model, "biased");
  try {
    ask(pool, "smaller");
    FAIL();
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.kind, Failure::Kind::kNotFound);
    EXPECT_NE(std::string(failure.what()).find("'biased'"), std::string::npos);
  }
  const auto entries = pool.models();
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_EQ(entries[1].name, "biased");
  EXPECT_EQ(entries[1].context, 4096);
}

TEST_F(ModelPoolTest, WhatIsKnownOfAModelThatIsNotLoadedIsWhatItSaysLoaded) {
  ModelPool pool(options());
  const ModelEntry before = pool.models()[1];
  ask(pool, "biased");
  const ModelEntry after = pool.models()[1];
  EXPECT_EQ(before.context, after.context);
  EXPECT_EQ(before.family, after.family);
  EXPECT_EQ(before.created, after.created);
  EXPECT_GT(before.bytes, 0);
}

TEST_F(ModelPoolTest, AModelThatNobodyUsesIsUnloadedWithItsAgentsSavedAndTheFirstStays) {
  ModelPool pool(options());
  ask(pool, "biased", "bea");
  const Heard second = ask(pool, "biased", "bea", 2);
  {
    const ModelPool::Lease used = pool.model("biased");
    pool.unload_idle(std::chrono::milliseconds(0));
    EXPECT_EQ(loaded(pool), (Names{"plain", "biased"}));
  }
  pool.unload_idle(std::chrono::hours(1));
  EXPECT_EQ(loaded(pool), (Names{"plain", "biased"}));
  { const auto looked = pool.loaded(); }
  const EngineWork before = pool.work();
  EXPECT_GT(before.answer_tokens, 0);
  pool.unload_idle(std::chrono::milliseconds(0));
  EXPECT_EQ(loaded(pool), Names{"plain"});
  EXPECT_EQ(pool.work().answer_tokens, before.answer_tokens) << "no total falls when a model goes";
  EXPECT_EQ(pool.work().prompt_tokens, before.prompt_tokens);
  EXPECT_EQ(pool.of_agent("bea", true).name(), "plain");
  EXPECT_EQ(loaded(pool), Names{"plain"});
  EXPECT_EQ(pool.of_agent("bea", false).name(), "biased");
  EXPECT_EQ(ask(pool, "biased", "bea", 2).said, second.said);
}

TEST_F(ModelPoolTest, ModelsAnswerAtOnceAsEachAloneWithinOneBudget) {
  constexpr int kAgents = 6, kWords = 150;
  const auto agent = [](int i) { return "agent" + std::to_string(i); };
  const auto model = [](int i) { return i % 2 == 0 ? std::string("plain") : std::string("biased"); };
  std::vector<std::string> alone;
  size_t budget = 0;
  {
    ModelPoolOptions apart = options();
    apart.engine.store = directory_.path() / "apart";
    ModelPool pool(apart);
    for (int i = 0; i < kAgents; ++i) alone.push_back(ask(pool, model(i), agent(i), kWords + i, 12).said);
    budget = size_t(pool.model("").engine().memory_usage().kv_bytes) / 2;  // of three of them
  }
  ModelPool pool(options(budget));
  std::barrier together(kAgents);
  std::vector<std::string> said(kAgents);
  std::vector<std::thread> threads;
  for (int i = 0; i < kAgents; ++i) {
    threads.emplace_back([&, i] {
      together.arrive_and_wait();
      said[size_t(i)] = ask(pool, model(i), agent(i), kWords + i, 12).said;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(said, alone);
  int64_t awake = 0;
  for (const AgentStatus& status : pool.agents()) awake += status.awake ? 1 : 0;
  EXPECT_EQ(pool.agents().size(), size_t(kAgents));
  EXPECT_LT(awake, kAgents);
  const MemoryUsage plain = pool.model("plain").engine().memory_usage(), biased = pool.model("biased").engine().memory_usage();
  EXPECT_EQ(plain.kv_bytes, biased.kv_bytes);
  EXPECT_LE(plain.kv_bytes, int64_t(budget));
  // One of a model whose agents are all asleep has the other's memory.
  for (int i = 1; i < kAgents; i += 2) pool.model("biased").engine().sleep(agent(i));
  for (int i = 0; i < kAgents; i += 2) ask(pool, "plain", agent(i), kWords + i, 12);
  const int64_t before = pool.model("plain").engine().memory_usage().evictions;
  ask(pool, "biased", agent(1), kWords + 1, 12);
  ask(pool, "biased", agent(3), kWords + 3, 12);
  EXPECT_GT(pool.model("plain").engine().memory_usage().evictions, before);
}

TEST_F(ModelPoolTest, SessionsThatHaveExpiredAreForgottenAndNothingElse) {
  ModelPool pool(options());
  const auto say = [&](const std::string& model, const std::string& session, const std::string& text, const std::string& tenant) {
    ChatRequest request;
    request.model = model;
    request.session = session;
    request.tenant = tenant;
    request.messages.push_back({Role::kUser, text});
    request.max_tokens = 2;
    Heard heard;
    pool.run(request, heard, gone_);
  };
  const auto names = [&] {
    std::set<std::string> all;
    for (const AgentStatus& status : pool.agents()) all.insert(status.agent);
    return all;
  };
  say("plain", "one", "Hi.", "local");
  say("plain", "one", "Another beginning.", "local");  // a branch
  say("biased", "one", "Hi.", "acme");
  say("plain", "kept", "Hi.", "acme");
  ask(pool, "plain", "ada");
  ask(pool, "plain", "session-of-mine");
  EXPECT_EQ(names().size(), 6u);
  const std::string kept = session_agent("acme", "plain", "kept");
  pool.model("plain").engine().pin(kept);
  pool.forget_sessions(std::chrono::hours(1));
  EXPECT_EQ(names().size(), 6u);
  pool.forget_sessions(std::chrono::seconds(-2));  // all are older than what is to come
  EXPECT_EQ(names(), (Names{"ada", "session-of-mine", kept}));
}

TEST_F(ModelPoolTest, MistakesAreToldAtTheStart) {
  const auto refused = [](const ModelPoolOptions& options, ErrorCode code) {
    try {
      ModelPool pool(options);
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code) << error.what();
    }
  };
  ModelPoolOptions twice = options();
  twice.models.push_back({"plain", path("biased")});
  refused(twice, ErrorCode::kInvalidArgument);
  ModelPoolOptions absent = options();
  absent.models.push_back({"absent", path("absent")});
  refused(absent, ErrorCode::kNotFound);
  ModelPoolOptions of_none = options();
  of_none.aliases.push_back({"gpt-*", "other"});
  refused(of_none, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace torpor::server
