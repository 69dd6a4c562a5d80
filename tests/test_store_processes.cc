/// Several processes and one store, forked from one that has it open.

#include <list>
#include <tuple>

#include "fault_env.h"
#include "forked_child.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

const KvLayout kLayout = small_layout(KvDtype::kF16, 2, 2, 16);

TEST(StoreProcesses, ChildrenOfOneStoreSaveAtOnce) {
  TemporaryDirectory directory(TemporaryDirectory::in_memory());
  Store store(directory.path() / "store");
  store.save_agent_cache("parent", make_snapshot(10, kLayout), "m");
  constexpr int kChildren = 4, kSaves = 60;
  const auto snapshot_of = [](int child, int i) { return make_snapshot(300 + i, kLayout, uint32_t(child + 1), 1000 * (child + 1)); };
  {
    std::list<ForkedChild> children;
    for (int child = 0; child < kChildren; ++child) {
      children.emplace_back([&, child] {
        const std::string id = "child-" + std::to_string(child);
        for (int i = 0; i < kSaves; ++i) {
          const auto snapshot = snapshot_of(child, i);
          store.save_agent_cache(id, snapshot, "m", {}, Durability::kRename);
          if (!same(store.load_agent_cache(id).snapshot, snapshot)) throw std::runtime_error("another process's bytes");
        }
      });
    }
    for (auto& child : children) EXPECT_EQ(child.first_part(), 0);
  }
  for (int child = 0; child < kChildren; ++child) {
    EXPECT_TRUE(same(store.load_agent_cache("child-" + std::to_string(child)).snapshot, snapshot_of(child, kSaves - 1)));
  }
  EXPECT_EQ(store.gc().files_removed, 0) << "nobody left a temporary file behind";
}

TEST(StoreProcesses, AnAgentThatWentToSleepInTheParentIsFreeThoughAChildLives) {
  TemporaryDirectory directory;
  Store store(directory.path() / "store"), other(directory.path() / "store");
  store.save_agent_cache("ada", make_snapshot(10), "m");
  auto lock = store.lock_agent("ada");
  ForkedChild child([&] { lock.reset(); });
  EXPECT_EQ(child.first_part(), 0);
  EXPECT_EQ(code_of([&] { std::ignore = other.lock_agent("ada"); }), ErrorCode::kBusy)
      << "awake in the parent, whatever the child does";
  lock.reset();
  EXPECT_NO_THROW(other.lock_agent("ada"));
}

TEST(StoreProcesses, ATemporaryNameThatIsTakenIsSomebodyElses) {
  // Every name is refused as taken: nothing of that name may be removed.
  class Taken : public FaultEnv {
   public:
    using FaultEnv::FaultEnv;
    int removals = 0;
    int raw_open(const char* path, OpenMode mode) override {
      return mode == OpenMode::kCreateNew ? -EEXIST : FaultEnv::raw_open(path, mode);
    }
    int raw_remove(const char* path) override { return ++removals, FaultEnv::raw_remove(path); }
  };
  TemporaryDirectory directory;
  Taken env(directory.path() / "store", directory.path() / "attic");
  Store store(directory.path() / "store", &env);
  EXPECT_EQ(code_of([&] { store.save_agent_cache("ada", make_snapshot(10), "m"); }), ErrorCode::kIo);
  EXPECT_EQ(env.removals, 0);
}

TEST(StoreProcesses, WithoutLinksSavesThatBeginAlikeKeepEachItsOwnRows) {
  TemporaryDirectory directory(TemporaryDirectory::in_memory());
  FaultEnv env(directory.path() / "store", directory.path() / "attic");
  env.no_links();
  Store store(directory.path() / "store", &env);
  const auto a = make_snapshot(600, kLayout, 1), b = make_snapshot(600, kLayout, 2);
  store.save_agent_cache("a", a, "m");
  store.save_agent_cache("b", b, "m");
  EXPECT_TRUE(same(Store(directory.path() / "store").load_agent_cache("a").snapshot, a));
  EXPECT_TRUE(same(Store(directory.path() / "store").load_agent_cache("b").snapshot, b));
}

}  // namespace
}  // namespace torpor::testing
