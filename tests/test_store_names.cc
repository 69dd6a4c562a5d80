/// Agents whose ids differ in case alone, on a file system that takes one name for the other.

#include <functional>

#include "folding_env.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

class StoreNames : public ::testing::Test {
 protected:
  void SetUp() override {
    store_.save_agent_cache("ada", make_snapshot(300), "m", {{"note", "ada's"}});
    before_ = tree(root_);
  }
  /// Refused in one sentence that names the id, and nothing on the disk is another.
  void refused(ErrorCode code, const std::function<void()>& call, const std::string& word = "'ADA'") {
    std::string message;
    EXPECT_EQ(code_of(call, &message), code) << message;
    EXPECT_NE(message.find(word), std::string::npos) << message;
    EXPECT_EQ(tree(root_), before_);
  }

  TemporaryDirectory directory_;
  const fs::path root_ = directory_.path() / "store";
  FoldingEnv env_;
  Store store_{root_, &env_};
  std::map<std::string, std::string> before_;
};

TEST_F(StoreNames, NoAgentIsFoundUnderAnotherCase) {
  EXPECT_FALSE(store_.contains("ADA"));
  refused(ErrorCode::kNotFound, [&] { store_.agent_info("ADA"); });
  refused(ErrorCode::kNotFound, [&] { store_.load_agent_cache("ADA"); });
  refused(ErrorCode::kNotFound, [&] { store_.agent_tokens("ADA"); });
  refused(ErrorCode::kNotFound, [&] { store_.verify("ADA"); });
  refused(ErrorCode::kNotFound, [&] { store_.upgrade_agent("ADA"); });
  refused(ErrorCode::kNotFound, [&] { store_.export_agent("ADA", directory_.path() / "ADA.safetensors"); });
  EXPECT_EQ(store_.list_cached_agents().size(), 1u);
}

TEST_F(StoreNames, NoAgentIsRemovedUnderAnotherCase) {
  refused(ErrorCode::kNotFound, [&] { store_.delete_agent_cache("ADA"); });
  refused(ErrorCode::kNotFound, [&] { store_.delete_agent_cache("ADA", true); });
  // Nor when the file does not say whose it is any more.
  write_all(root_ / "ada.safetensors", before_["ada.safetensors"].substr(0, 60));
  before_ = tree(root_);
  refused(ErrorCode::kNotFound, [&] { store_.delete_agent_cache("ADA", true); });
  store_.delete_agent_cache("ada");
  EXPECT_FALSE(fs::exists(root_ / "ada.safetensors"));
}

TEST_F(StoreNames, NoAgentIsReplacedByOneOfAnotherCase) {
  refused(ErrorCode::kInvalidArgument, [&] { (void)store_.lock_agent("ADA"); });
  refused(ErrorCode::kInvalidArgument, [&] { store_.save_agent_cache("ADA", make_snapshot(5), "m"); });
  refused(ErrorCode::kInvalidArgument, [&] { Store(root_, &env_).save_agent_cache("Ada", make_snapshot(5), "m"); }, "'Ada'");
  refused(ErrorCode::kInvalidArgument, [&] { store_.copy_agent_cache("ada", "ADA"); });
  refused(ErrorCode::kInvalidArgument, [&] { store_.copy_agent_cache("ada", "ADA", {.replace = true}); });
  store_.export_agent("ada", directory_.path() / "export.safetensors");
  refused(ErrorCode::kInvalidArgument, [&] { store_.import_agent(directory_.path() / "export.safetensors", "ADA"); });
  write_all(root_ / "ada.safetensors", before_["ada.safetensors"].substr(0, 60));
  before_ = tree(root_);
  refused(ErrorCode::kInvalidArgument, [&] { store_.save_agent_cache("ADA", make_snapshot(5), "m"); });
}

TEST_F(StoreNames, ARenameToAnotherCaseTakesTwoSteps) {
  refused(ErrorCode::kInvalidArgument, [&] { store_.rename_agent_cache("ada", "ADA"); });
  refused(ErrorCode::kNotFound, [&] { store_.rename_agent_cache("ADA", "bob"); });
  store_.rename_agent_cache("ada", "bob");
  store_.rename_agent_cache("bob", "ADA");
  EXPECT_TRUE(store_.contains("ADA"));
  EXPECT_FALSE(store_.contains("ada"));
  EXPECT_TRUE(same(store_.load_agent_cache("ADA").snapshot, make_snapshot(300)));
  EXPECT_EQ(tree(root_).count("ADA.json"), 1u);
  EXPECT_TRUE(store_.verify()[0].problems.empty());
}

TEST_F(StoreNames, TheAgentItselfIsWorkedOnAsEverywhere) {
  { const auto lock = store_.lock_agent("ada"); }
  store_.save_agent_cache("ada", make_snapshot(310), "m");
  store_.copy_agent_cache("ada", "ada", {.n_tokens = 290, .replace = true});
  store_.copy_agent_cache("ada", "eve");
  EXPECT_TRUE(same(store_.load_agent_cache("eve").snapshot, make_snapshot(290)));
  store_.delete_agent_cache("ada");
  // The name is free again, in any case.
  store_.save_agent_cache("ADA", make_snapshot(3), "m");
  EXPECT_EQ(store_.list_cached_agents().size(), 2u);
  EXPECT_EQ(store_.list_cached_agents()[0].agent_id, "ADA");
}

TEST(StoreNamesElsewhere, WhereCaseIsToldApartBothAgentsLive) {
  TemporaryDirectory directory;
  Store store(directory.path() / "store");
  store.save_agent_cache("ada", make_snapshot(3), "m");
  if (fs::exists(directory.path() / "store/ADA.safetensors")) GTEST_SKIP() << "this file system folds case";
  store.save_agent_cache("ADA", make_snapshot(4), "m");
  store.delete_agent_cache("ADA");
  EXPECT_TRUE(store.contains("ada"));
  EXPECT_FALSE(store.contains("ADA"));
}

}  // namespace
}  // namespace torpor::testing
