// Promise 2: save, new process, load, decode gives the same logits, bit for bit, as never having stopped.
//
// The parent computes the uninterrupted logits and saves; a child (this program again, with --wake) loads from the store
// and computes them from there.

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <random>

#include <unistd.h>

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include "base/hash.h"
#include "torpor/cache.h"
#include "torpor/engine.h"
#include "torpor/error.h"
#include "torpor/generate.h"
#include "torpor/model.h"
#include "torpor/store.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;

const std::string kModel = TORPOR_SOURCE_DIR "/.models/smollm2-135m";
std::string program;

// Tokens decoded one at a time after the wake; their logits are compared.
const std::vector<int32_t> kContinuation = {198, 504, 2141};
const std::vector<KvFormat> kFormats = {KvDtype::kF32,       KvDtype::kF16,           KvDtype::kBF16,
                                        {KvDtype::kF16, 8}, {KvDtype::kF16, {8, 4}}, {KvDtype::kBF16, 4, 32}};

std::vector<int32_t> test_tokens(int n) {
  std::mt19937 random(11);
  std::vector<int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(int32_t(17 + random() % 40000));
  return tokens;
}

void feed(Model& model, KvCache& cache, std::span<const int32_t> tokens, Hasher* hasher = nullptr) {
  const ForwardSequence sequence{tokens, &cache, false};
  const mx::array logits = model.forward({&sequence, 1});
  cache.record_tokens(tokens);
  if (hasher) hasher->update(std::as_bytes(std::span(logits.data<float>(), logits.size())));
}

std::string continue_and_hash(Model& model, KvCache& cache) {
  Hasher hasher;
  for (const int32_t& token : kContinuation) feed(model, cache, {&token, 1}, &hasher);
  return hasher.hex();
}

// `agent hash` per line for every agent of the store.
int wake_all(const std::string& root, const std::string& model_name) {
  auto model = Model::load(model_name);
  Store store(root);
  for (const AgentInfo& info : store.list_cached_agents()) {
    LoadOptions options;
    options.allocate = mlx_buffer;
    options.map_rows = true;
    options.window_rows_only = true;
    auto cache = KvCache::restore(store.load_agent_cache(info.agent_id, options).snapshot, model->backend());
    std::cout << info.agent_id << ' ' << continue_and_hash(*model, *cache) << std::endl;
  }
  return 0;
}

std::map<std::string, std::string> run_child(const std::string& root, const std::string& model) {
  std::map<std::string, std::string> hashes;
  const std::string command = "'" + program + "' --wake '" + root + "' '" + model + "'";
  FILE* pipe = popen(command.c_str(), "r");
  std::array<char, 256> line;
  while (fgets(line.data(), line.size(), pipe)) {
    std::string text(line.data());
    const size_t space = text.find(' ');
    hashes[text.substr(0, space)] = text.substr(space + 1, 32);
  }
  EXPECT_EQ(pclose(pipe), 0);
  return hashes;
}

class TempStore : public testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/torpor-test-XXXXXX";
    root_ = mkdtemp(pattern);
  }
  void TearDown() override { fs::remove_all(root_); }
  std::string root_;
};

class Wake : public TempStore, public testing::WithParamInterface<const char*> {};

TEST_P(Wake, LogitsInANewProcessEqualTheUninterruptedOnes) {
  const std::string directory = std::string(TORPOR_SOURCE_DIR "/.models/") + GetParam();
  if (!fs::exists(directory)) GTEST_SKIP() << directory << " is not there (scripts/fetch-model)";
  auto model = Model::load(directory);
  // Around a segment's end, and around and beyond Gemma's window of 512.
  const std::vector<int> lengths = {1, 255, 256, 257, 511, 512, 513, 700, 1300};
  const std::vector<int32_t> tokens = test_tokens(lengths.back());
  Store store(root_);
  std::map<std::string, std::string> expected;
  for (const KvFormat& asked : kFormats) {
    const KvFormat format = model->refined(asked);
    Identity identity = model->identity();
    identity.kv = format.name();
    std::string name = format.name();
    std::replace_if(name.begin(), name.end(), [](char c) { return c == ' ' || c == ','; }, '-');
    auto cache = KvCache::create(model->kv_layout(format), format, model->backend());
    int fed = 0;
    for (int length : lengths) {
      feed(*model, *cache, std::span(tokens).subspan(size_t(fed), size_t(length - fed)));
      fed = length;
      const std::string agent = name + "-" + std::to_string(length);
      store.save_agent_cache(agent, cache->snapshot(identity), directory);
      auto uninterrupted = cache->clone();
      expected[agent] = continue_and_hash(*model, *uninterrupted);
    }
    // A fork at a token that the window of the whole agent has left behind.
    store.copy_agent_cache(name + "-1300", name + "-fork", {.n_tokens = 700});
    expected[name + "-fork"] = expected[name + "-700"];
    // The clone stands for never having stopped; once per format the cache itself is held to it.
    EXPECT_EQ(continue_and_hash(*model, *cache), expected[name + "-1300"]);
  }
  EXPECT_EQ(run_child(root_, directory), expected);
}

INSTANTIATE_TEST_SUITE_P(Models, Wake, testing::Values("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"),
                         [](const auto& model) {
                           std::string name = model.param;
                           std::erase_if(name, [](char c) { return !std::isalnum(static_cast<unsigned char>(c)); });
                           return name;
                         });

TurnRequest request(const std::string& agent, const std::string& prompt, int max_tokens = 8) {
  TurnRequest turn;
  turn.agent = agent;
  turn.prompt = prompt;
  turn.generate.max_tokens = max_tokens;
  return turn;
}

using EngineTurns = TempStore;

TEST_F(EngineTurns, AWokenAgentAnswersAsOneThatNeverSlept) {
  std::string long_prompt = "Remember this list:";
  for (int i = 0; i < 120; ++i) long_prompt += " item " + std::to_string(i * 37 % 101) + ";";
  const std::vector<std::string> prompts = {long_prompt, "What is the first item?", "And the last one?"};

  Engine awake({kModel, root_ + "/awake"});
  std::vector<TurnResult> uninterrupted;
  for (const std::string& prompt : prompts) uninterrupted.push_back(awake.turn(request("a", prompt)));

  for (size_t i = 0; i < prompts.size(); ++i) {
    Engine fresh({kModel, root_ + "/asleep"});
    const TurnResult woken = fresh.turn(request("a", prompts[i]));
    EXPECT_EQ(woken.text, uninterrupted[i].text);
    EXPECT_EQ(woken.tokens.context, uninterrupted[i].tokens.context);
    EXPECT_EQ(woken.tokens.prompt, woken.tokens.cached + woken.tokens.prefilled);
    // Nothing is computed twice: all that the last turn left is reused.
    EXPECT_EQ(woken.tokens.cached, i == 0 ? 0 : uninterrupted[i - 1].tokens.context);
    EXPECT_EQ(fresh.next_logits("a").size(), size_t(fresh.model().vocab_size));
    if (i + 1 == prompts.size()) {
      EXPECT_EQ(fresh.next_logits("a"), awake.next_logits("a"));
    }
  }
}

TEST_F(EngineTurns, ACancelledPrefillIsContinuedByTheSamePromptAndForgottenByAnother) {
  std::string long_prompt;
  for (int i = 0; i < 500; ++i) long_prompt += "word" + std::to_string(i % 13) + " ";
  std::atomic<bool> cancel{false};
  TurnRequest turn = request("a", long_prompt);
  turn.generate.cancel = &cancel;
  int read = 0;
  turn.generate.on_prefill = [&](int done, int) {
    cancel = true;
    read = done;
  };

  Engine engine({kModel, root_}), elsewhere({kModel, root_ + "/reference"});
  const TurnResult whole = elsewhere.turn(request("a", long_prompt));
  const TurnResult cut = engine.turn(turn);
  EXPECT_EQ(cut.finish_reason, FinishReason::kCancelled);
  EXPECT_GT(read, 0);
  EXPECT_LT(read, cut.tokens.prompt);
  EXPECT_EQ(cut.tokens.context, read);  // nothing is computed behind the callback's back
  EXPECT_EQ(cut.text, "");
  engine.sleep("a");

  const TurnResult again = engine.turn(request("a", long_prompt));
  EXPECT_EQ(again.tokens.cached, read);
  EXPECT_EQ(again.text, whole.text);
  EXPECT_EQ(again.tokens.context, whole.tokens.context);
}

TEST_F(EngineTurns, ForksGoTheirOwnWayBitForBitAndRewindingIsAFreshPrefill) {
  Engine engine({kModel, root_});
  std::string prompt;
  for (int i = 0; i < 300; ++i) prompt += "word" + std::to_string(i % 13) + " ";
  TurnRequest turn = request("a", prompt);
  turn.raw = true;
  engine.turn(turn);
  const std::vector<int32_t> tokens = engine.store().load_agent_cache("a").tokens;
  auto model = Model::load(kModel);
  // What a model that has just read the first `n` tokens says next.
  const auto fresh = [&](std::span<const int32_t> read) {
    const KvFormat format = model->default_kv_format();
    auto cache = KvCache::create(model->kv_layout(format), format, model->backend());
    if (read.size() > 1) feed(*model, *cache, read.first(read.size() - 1));
    const ForwardSequence last{read.last(1), cache.get(), false};
    const mx::array logits = model->forward({&last, 1});
    return std::vector<float>(logits.data<float>(), logits.data<float>() + logits.size());
  };

  engine.fork("a", "b");
  engine.fork("a", "c", 300);
  for (const char* id : {"a", "b", "c"}) {
    TurnRequest more = request(id, std::string(" and then ") + id);
    more.raw = true;
    EXPECT_GE(engine.turn(more).tokens.cached, 300);
    EXPECT_EQ(engine.next_logits(id), fresh(engine.store().load_agent_cache(id).tokens)) << id;
  }
  for (const int n : {513, 512, 500, 257, 256, 255, 1}) {
    if (n % 2 == 0) engine.sleep("b");  // awake and asleep in turn
    engine.rewind("b", n);
    EXPECT_EQ(engine.next_logits("b"), fresh(std::span(tokens).first(size_t(n)))) << n;
  }
}

TEST_F(EngineTurns, MemoryUsageNamesTheModelAndWhatAgentsShare) {
  Engine engine({kModel, root_});
  engine.turn(request("a", "Hello."));
  engine.fork("a", "b");
  const MemoryUsage usage = engine.memory_usage();
  EXPECT_EQ(usage.model_bytes, engine.model().weight_bytes);
  ASSERT_EQ(usage.agents.size(), 2u);
  EXPECT_EQ(usage.agents[0].shared_bytes, usage.agents[0].bytes);
  EXPECT_EQ(usage.kv_bytes, usage.agents[0].bytes);
}

TEST_F(EngineTurns, ErrorsLeaveTheAgentAsItWas) {
  Engine engine({kModel, root_});
  TurnRequest first = request("a", "Hello.");
  first.system = "Be brief.";
  const TurnResult before = engine.turn(first);

  TurnRequest other_system = request("a", "Hello again.");
  other_system.system = "Be long.";
  EXPECT_THROW(engine.turn(other_system), Error);
  EXPECT_THROW(engine.turn(request("a", "bad \xff utf-8")), Error);
  std::string huge;
  for (int i = 0; i < 9000; ++i) huge += "a b ";
  try {
    engine.turn(request("a", huge));
    FAIL() << "a prompt past the context was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kResourceExhausted) << error.what();
  }
  EXPECT_THROW(engine.turn(request("new", huge)), Error);
  EXPECT_FALSE(engine.store().contains("new"));
  EXPECT_THROW(engine.turn(request("../x", "Hi")), Error);

  // One that comes after rows were computed takes them back.
  const std::vector<float> logits = engine.next_logits("a");
  TurnRequest failing = request("a", "Hello again.");
  failing.generate.on_prefill = [](int, int) { throw Error(ErrorCode::kIo, "The terminal is gone."); };
  EXPECT_THROW(engine.turn(failing), Error);
  EXPECT_EQ(engine.next_logits("a"), logits);
  failing.agent = "new";
  failing.system.reset();
  EXPECT_THROW(engine.turn(failing), Error);
  const std::vector<AgentMemory> awake = engine.memory_usage().agents;
  ASSERT_EQ(awake.size(), 1u);  // and a new agent is none
  EXPECT_FALSE(awake[0].unsaved);

  const TurnResult after = engine.turn(request("a", "Hello again."));
  EXPECT_EQ(after.tokens.cached, before.tokens.context);
}

TEST_F(EngineTurns, AnotherOwnerIsToldBusyAndAnotherKvDtypeIncompatible) {
  Engine first({kModel, root_});
  first.turn(request("a", "Hello."));
  Engine second({kModel, root_});
  try {
    second.turn(request("a", "Hello."));
    FAIL() << "two engines have one agent";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBusy) << error.what();
  }
  first.sleep("a");
  EXPECT_GT(second.turn(request("a", "Hello.")).tokens.cached, 0);
  second.sleep("a");

  EngineOptions options{kModel, root_};
  options.kv_format = KvDtype::kF32;
  Engine third(options);
  try {
    third.turn(request("a", "Hello."));
    FAIL() << "a cache of another dtype was used";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIncompatible);
    EXPECT_NE(std::string(error.what()).find("kv"), std::string::npos) << error.what();
  }
}

TEST_F(EngineTurns, LostRowsAreComputedAgainFromTheTokens) {
  std::string prompt;
  for (int i = 0; i < 300; ++i) prompt += "word" + std::to_string(i % 13) + " ";
  std::string expected;
  {
    Engine engine({kModel, root_});
    engine.turn(request("a", prompt));
    engine.sleep("a");
    const fs::path copy = root_ + "/copy";
    fs::create_directory(copy);
    for (const char* name : {"a.safetensors", "a.json", "segments"}) {
      fs::copy(root_ + "/" + name, copy / name, fs::copy_options::recursive);
    }
    Engine intact({kModel, copy});
    expected = intact.turn(request("a", "Go on.")).text;
  }
  // One byte of the second segment: the first is kept, the rest is prefilled again.
  const std::string second = Store(root_).agent_info("a").segments.at(1);
  const std::string path = root_ + "/segments/" + second.substr(0, 2) + "/" + second + ".safetensors";
  FILE* file = fopen(path.c_str(), "r+b");
  ASSERT_NE(file, nullptr) << path;
  fseek(file, -100, SEEK_END);
  const int byte = fgetc(file);
  fseek(file, -100, SEEK_END);
  fputc(byte ^ 1, file);
  fclose(file);

  // A turn that ends before the lost rows are back must not put the shorter agent in the place of the whole one.
  std::atomic<bool> cancel{false};
  TurnRequest cut = request("a", "Go on.");
  cut.generate.cancel = &cancel;
  cut.generate.on_prefill = [&](int, int) { cancel = true; };
  {
    Engine engine({kModel, root_});
    EXPECT_EQ(engine.turn(cut).finish_reason, FinishReason::kCancelled);
    engine.sleep("a");
  }

  Engine engine({kModel, root_});
  const TurnResult result = engine.turn(request("a", "Go on."));
  EXPECT_TRUE(result.damage.has_value());
  EXPECT_EQ(result.tokens.cached, 256);
  EXPECT_EQ(result.text, expected);
  EXPECT_TRUE(engine.store().verify("a").at(0).problems.empty());
}

TEST_F(EngineTurns, LookingAtAnAgentDoesNotKeepItAwake) {
  Engine engine({kModel, root_});
  engine.turn(request("a", "Hello."));
  engine.sleep("a");
  EXPECT_FALSE(engine.next_logits("a").empty());
  EXPECT_NO_THROW((void)Store(root_).lock_agent("a"));
  EXPECT_THROW(engine.next_logits("nobody"), Error);
}

TEST_F(EngineTurns, RawTurnsAndExtractorAgree) {
  auto model = std::shared_ptr<Model>(Model::load(kModel));
  CacheExtractor extractor(model, Tokenizer::load(kModel));
  GenerateOptions options;
  options.max_tokens = 12;
  auto first = extractor.generate("The sea was", nullptr, options);
  const int held = get_cache_size(*first.cache);
  EXPECT_EQ(held, first.details.prefilled + 12);
  auto second = extractor.generate(" and then", std::move(first.cache), options);
  EXPECT_EQ(get_cache_size(*second.cache), held + second.details.prefilled + 12);
  EXPECT_TRUE(validate_cache_structure(*second.cache));
  EXPECT_GT(get_cache_memory(*second.cache), 0u);

  Engine engine({kModel, root_});
  TurnRequest turn = request("raw", "The sea was", 12);
  turn.raw = true;
  EXPECT_EQ(engine.turn(turn).text, first.text);
  turn.prompt = " and then";
  EXPECT_EQ(engine.turn(turn).text, second.text);
}

}  // namespace
}  // namespace torpor

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "--wake") return torpor::wake_all(argv[2], argv[3]);
  torpor::program = argv[0];
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
