/// The store as its callers see it: round trips, sharing, the catalogue, locks, exchange.

#include "store_fixture.h"

#include <sys/stat.h>

namespace torpor::testing {
namespace {

class StoreTest : public ::testing::Test {
 protected:
  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  Store store_{root_};

  int count_segments() const {
    int n = 0;
    for (const auto& [name, bytes] : tree(root_)) n += name.starts_with("segments/");
    return n;
  }
};

TEST_F(StoreTest, RoundTripsEveryLengthAndDtype) {
  for (KvDtype dtype : {KvDtype::kF32, KvDtype::kF16, KvDtype::kBF16}) {
    for (int n : {0, 1, 255, 256, 257, 600}) {
      const auto snapshot = make_snapshot(n, small_layout(dtype, 3, 2, 5));
      const std::string id = std::string(kv_dtype_name(dtype)) + "-" + std::to_string(n);
      const auto saved = store_.save_agent_cache(id, snapshot, "some/model", {{"note", "grüße \"x\""}, {"a", ""}});
      EXPECT_EQ(saved.segments_written + saved.segments_shared, n / 256) << id;
      // A new Store: nothing may come from memory.
      const auto loaded = Store(root_).load_agent_cache(id);
      EXPECT_TRUE(same(loaded.snapshot, snapshot)) << id;
      EXPECT_FALSE(loaded.damage.has_value());
      EXPECT_EQ(loaded.info.cache_size, n);
      EXPECT_EQ(loaded.info.model, "some/model");
      EXPECT_EQ(loaded.info.user, (std::vector<std::pair<std::string, std::string>>{{"note", "grüße \"x\""}, {"a", ""}}));
      EXPECT_EQ(loaded.info.segments.size(), size_t(n / 256));
      EXPECT_EQ(loaded.bytes_read, loaded.info.bytes);
      EXPECT_EQ(fs::file_size(root_ / (id + ".safetensors")) , size_t(loaded.info.tail_bytes));
    }
  }
}

TEST_F(StoreTest, MixedDtypesOfQuantizedKvRoundTrip) {
  KvLayout layout;
  layout.tensors = {{"layer_0_keys", KvDtype::kU32, 2, 8, 0},
                    {"layer_0_keys_scales", KvDtype::kF16, 2, 1, 0},
                    {"layer_0_keys_biases", KvDtype::kBF16, 2, 1, 0},
                    {"layer_0_values", KvDtype::kU32, 2, 8, 1024}};
  const auto snapshot = make_snapshot(300, layout);
  store_.save_agent_cache("q", snapshot, "m");
  EXPECT_TRUE(same(store_.load_agent_cache("q").snapshot, snapshot));
}

TEST_F(StoreTest, AnEmptyAgentWithoutLayoutIsAnOrdinaryAgent) {
  store_.save_agent_cache("empty", KvSnapshot{}, "");
  EXPECT_TRUE(store_.load_agent_cache("empty").snapshot.tokens.empty());
  EXPECT_EQ(store_.list_cached_agents().size(), 1u);
}

}  // namespace
}  // namespace torpor::testing
