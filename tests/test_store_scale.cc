/// What a store of many agents asks of the disk, counted in calls.

#include "counting_env.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

class StoreScale : public ::testing::Test {
 protected:
  static constexpr int kAgents = 10'000;

  StoreScale() {
    Store store(root_);
    const auto snapshot = make_snapshot(257);
    for (int i = 0; i < kAgents; ++i) store.save_agent_cache("agent-" + std::to_string(i), snapshot, "m", {}, Durability::kRename);
  }

  TemporaryDirectory directory_{TemporaryDirectory::in_memory()};
  fs::path root_ = directory_.path() / "store";
  CountingEnv env_;
};

TEST_F(StoreScale, OpeningLooksAtNoAgentAndLsReadsSidecarsAlone) {
  Store store(root_, &env_);
  EXPECT_EQ(env_.opened(), std::vector<std::string>{root_ / "torpor.json"});
  EXPECT_EQ(env_.lists, 0);
  EXPECT_LE(env_.stats, 4) << "the root, and the marker";

  env_.reset();
  EXPECT_EQ(store.list_cached_agents().size(), size_t(kAgents));
  const auto opened = env_.opened();
  EXPECT_EQ(opened.size(), size_t(kAgents));
  EXPECT_TRUE(std::all_of(opened.begin(), opened.end(), [](const auto& path) { return path.ends_with(".json"); }));
  EXPECT_EQ(env_.lists, 1);
  EXPECT_EQ(env_.stats, 1 + 2 * kAgents) << "the marker; the agent file, and the sidecar's size";
  EXPECT_EQ(env_.changes, 0);

  // One agent's life costs the same whoever else there is.
  env_.reset();
  EXPECT_TRUE(same(store.load_agent_cache("agent-77").snapshot, make_snapshot(257)));
  EXPECT_EQ(env_.opens, 2);
  EXPECT_EQ(env_.lists, 0);
  env_.reset();
  store.save_agent_cache("agent-77", make_snapshot(258), "m", {}, Durability::kRename);
  EXPECT_EQ(env_.lists, 0);
  EXPECT_LE(env_.opens, 10);
}

}  // namespace
}  // namespace torpor::testing
