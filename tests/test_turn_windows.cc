// What turns write of a model whose long windows' rows are kept apart. Rows are made up, in the shape of Gemma 4 31B:
// of eleven parts of a token's rows ten are of a window of 1,024. Tokenizer and template are a real model's.

#include <gtest/gtest.h>

#include "agents/turn_transaction.h"
#include "manager_fixture.h"

namespace torpor {
namespace {

const std::string kModel = TORPOR_SOURCE_DIR "/.models/smollm2-135m";

class TurnWindows : public ::testing::Test {
 protected:
  static KvLayout layout(bool apart) {
    KvLayout layout;
    for (int layer = 0; layer < 11; ++layer) {
      for (const char* part : {"_keys", "_values"}) {
        layout.tensors.push_back({.name = "layer_" + std::to_string(layer) + part, .dtype = KvDtype::kF16,
                                  .n_kv_heads = kHeads, .dim = kDim, .window = layer == 0 ? 0 : 1024,
                                  .apart = apart && layer > 0});
      }
    }
    return layout;
  }
  std::unique_ptr<AgentManager> make(const std::string& name, bool apart) {
    store_ = std::make_unique<Store>(directory_.path() / name);
    return std::make_unique<AgentManager>(
        *store_, ManagerOptions{.model_name = "m", .identity = testing::test_identity(), .numerics = "a",
                                .layout = layout(apart), .durability = Durability::kRename});
  }
  /// A turn that is saved: the bytes written. `agent` receives what it began with.
  int64_t answer(AgentManager& manager, const std::string& id, const std::string& prompt, int answered,
                 std::optional<std::string> system = std::nullopt, int* reused = nullptr) {
    TurnTransaction turn(manager, manager.wake(id),
                         {.prompt = prompt, .system = std::move(system), .tokenizer = tokenizer_,
                          .chat_template = template_});
    if (reused != nullptr) *reused = turn.reused();
    for (const auto& tokens : {std::vector<int32_t>(turn.pending().begin(), turn.pending().end()), ids(answered, 9)}) {
      const Growth growth{&turn.cache(), int(tokens.size())};
      manager.reserve({&growth, 1});
      compute(turn.cache(), tokens);
    }
    turn.commit({"assistant", "answer"}, true);
    return turn.save(SaveMode::kWait).get().bytes_written;
  }
  static std::string words(int n, const std::string& word = " lamp") {
    std::string text;
    for (int i = 0; i < n; ++i) text += word;
    return text;
  }

  testing::TemporaryDirectory directory_{testing::TemporaryDirectory::in_memory()};
  std::unique_ptr<Store> store_;
  const std::shared_ptr<const Tokenizer> tokenizer_ = Tokenizer::load(kModel);
  const std::shared_ptr<const ChatTemplate> template_ = ChatTemplate::load(kModel);
};

TEST_F(TurnWindows, ALongPrefillWritesWhatItsCheckpointsSeeAndATurnNoMoreThanBefore) {
  std::vector<int64_t> first, turns, on_disk;
  for (const bool apart : {false, true}) {
    auto manager = make(apart ? "apart" : "together", apart);
    first.push_back(answer(*manager, "a", words(6600), 50, words(1500)));
    int64_t written = 0;
    for (int turn = 0; turn < 10; ++turn) {
      written += answer(*manager, "a", words(250, " sea"), 50);
      manager->sleep("a");
      expect_sound(*manager->wake("a")->cache);
    }
    turns.push_back(written / 10);
    manager.reset();
    store_.reset();
    on_disk.push_back(Store(directory_.path() / (apart ? "apart" : "together")).get_cache_disk_usage().total_bytes);
  }
  RecordProperty("first_together", std::to_string(first[0]));
  RecordProperty("first_apart", std::to_string(first[1]));
  RecordProperty("turn_together", std::to_string(turns[0]));
  RecordProperty("turn_apart", std::to_string(turns[1]));
  RecordProperty("disk_together", std::to_string(on_disk[0]));
  RecordProperty("disk_apart", std::to_string(on_disk[1]));
  EXPECT_LT(first[1], first[0] * 45 / 100);
  EXPECT_LT(turns[1], turns[0] * 103 / 100);
  EXPECT_LT(on_disk[1], on_disk[0] * 45 / 100);
}

TEST_F(TurnWindows, AnotherAgentOfTheSameSystemPromptBeginsWithItAfterALongConversation) {
  const std::string system = words(1500);
  {
    auto manager = make("store", true);
    for (int turn = 0; turn < 12; ++turn) {
      answer(*manager, "a", words(400, " sea"), 50, turn == 0 ? std::optional(system) : std::nullopt);
    }
  }
  auto manager = make("store", true);
  int reused = 0;
  answer(*manager, "b", words(30, " tree"), 5, system, &reused);
  EXPECT_EQ(reused, 1500 / kSegmentTokens * kSegmentTokens);
  expect_sound(*manager->wake("b")->cache);
  // It goes back to before its last turn, and that of the other one to before its own.
  const AgentInfo info = store_->agent_info("a");
  EXPECT_EQ(resumable_tokens(info, info.cache_size), info.cache_size);
  EXPECT_LT(info.states->size(), info.segments.size());
}

}  // namespace
}  // namespace torpor
