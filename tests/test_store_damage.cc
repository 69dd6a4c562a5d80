/// Every byte of a store flipped, every file cut at every length: found, named, and never decoded from.

#include <fstream>

#include <fcntl.h>
#include <unistd.h>

#include "store_fixture.h"

namespace torpor::testing {
namespace {

const KvSnapshot kWhole = with_state(make_snapshot(2 * 256 + 5));

class StoreDamage : public ::testing::Test {
 protected:
  StoreDamage() {
    Store(root_).save_agent_cache("a", kWhole, "m", {{"k", "v"}});
    for (const auto& [name, bytes] : tree(root_)) {
      if (name.ends_with(".safetensors")) files_[name] = bytes;
    }
  }

  /// The damage in `name` is an error that names the file, a prefix with salvage, and a problem for verify.
  void expect_found(const std::string& name, const std::string& where) {
    const Store store(root_);
    std::string message;
    ASSERT_EQ(code_of([&] { store.load_agent_cache("a"); }, &message), ErrorCode::kCorruption) << where;
    ASSERT_EQ(code_of([&] { store.load_agent_cache("a", {.map_rows = true}); }), ErrorCode::kCorruption) << where;
    ASSERT_NE(message.find(name), std::string::npos) << where << ": " << message;
    size_t salvaged = 0;
    const auto code = code_of([&] {
      const auto loaded = store.load_agent_cache("a", {.salvage = true, .map_rows = true});
      ASSERT_TRUE(loaded.damage.has_value()) << where;
      ASSERT_TRUE(is_prefix(loaded.snapshot, kWhole)) << where;
      salvaged = loaded.snapshot.tokens.size();
    });
    ASSERT_TRUE(!code || *code == ErrorCode::kCorruption) << where;
    if (name.starts_with("segments/")) {
      ASSERT_FALSE(code) << where;
    }
    const auto reports = store.verify("a");
    ASSERT_EQ(reports.size(), 1u);
    ASSERT_EQ(reports[0].problems.size(), 1u) << where;
    ASSERT_EQ(reports[0].intact_tokens, int64_t(salvaged)) << where;
  }

  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  std::map<std::string, std::string> files_;
};

TEST_F(StoreDamage, EveryFlippedByteIsFound) {
  ASSERT_EQ(files_.size(), 3u);
  for (const auto& [name, bytes] : files_) {
    const int fd = ::open((root_ / name).c_str(), O_RDWR);
    for (size_t at = 0; at < bytes.size(); at += every()) {
      // Every bit has its turn; 0x20 turns hex digits and spaces into look-alikes.
      for (const int mask : {1 << (at % 8), 0x20}) {
        const char damaged = char(bytes[at] ^ mask);
        ASSERT_EQ(::pwrite(fd, &damaged, 1, off_t(at)), 1);
        expect_found(name, name + " byte " + std::to_string(at) + " mask " + std::to_string(mask));
        ASSERT_EQ(::pwrite(fd, &bytes[at], 1, off_t(at)), 1);
        if (HasFatalFailure()) break;
      }
      if (HasFatalFailure()) break;
    }
    ::close(fd);
    ASSERT_FALSE(HasFatalFailure());
  }
  EXPECT_TRUE(same(Store(root_).load_agent_cache("a").snapshot, kWhole));
}

TEST_F(StoreDamage, EveryTruncationIsFound) {
  for (const auto& [name, bytes] : files_) {
    write_all(root_ / name, bytes);
    for (size_t left = 1; left <= bytes.size(); left += every()) {
      fs::resize_file(root_ / name, bytes.size() - left);
      expect_found(name, name + " cut to " + std::to_string(bytes.size() - left));
      ASSERT_FALSE(HasFatalFailure());
    }
    write_all(root_ / name, bytes + "x");
    expect_found(name, name + " with a byte more");
    write_all(root_ / name, bytes);
  }
}

TEST_F(StoreDamage, SalvageKeepsWhatPrecedesTheDamage) {
  const Store store(root_);
  const auto info = store.agent_info("a");
  ASSERT_EQ(info.segments.size(), 2u);
  auto path_of = [&](int i) { return root_ / "segments" / info.segments[i].substr(0, 2) / (info.segments[i] + ".safetensors"); };
  fs::rename(path_of(1), directory_.path() / "away");
  std::string message;
  EXPECT_EQ(code_of([&] { store.load_agent_cache("a"); }, &message), ErrorCode::kCorruption);
  EXPECT_NE(message.find(info.segments[1]), std::string::npos) << message;
  auto loaded = store.load_agent_cache("a", {.salvage = true});
  EXPECT_EQ(loaded.snapshot.tokens.size(), 256u);
  EXPECT_TRUE(is_prefix(loaded.snapshot, kWhole));
  EXPECT_NO_THROW(loaded.snapshot.validate());
  EXPECT_EQ(store.verify()[0].intact_tokens, 256);

  // Swapped segments are intact files in the wrong place.
  fs::rename(path_of(0), path_of(1));
  fs::rename(directory_.path() / "away", path_of(0));
  EXPECT_EQ(code_of([&] { store.load_agent_cache("a"); }), ErrorCode::kCorruption);
  EXPECT_TRUE(store.load_agent_cache("a", {.salvage = true}).snapshot.tokens.empty());
}

TEST_F(StoreDamage, ADamagedSegmentIsWrittenAgainByTheNextSave) {
  for (const bool same_process : {true, false}) {
    Store first(root_);
    first.load_agent_cache("a");
    const auto segment = std::prev(files_.end())->first;
    std::string bytes = files_[segment];
    bytes[bytes.size() / 2] ^= 1;
    write_all(root_ / segment, bytes);
    Store second(root_);
    const auto result = (same_process ? first : second).save_agent_cache("a", kWhole, "m");
    EXPECT_EQ(result.segments_written, 1);
    EXPECT_EQ(result.segments_shared, 1);
    EXPECT_TRUE(same(second.load_agent_cache("a").snapshot, kWhole));
  }
}

TEST_F(StoreDamage, AMappedSegmentSpoiltInPlaceIsNotSavedAsIfItWereGood) {
  Store store(root_);
  const auto loaded = store.load_agent_cache("a", {.map_rows = true});
  const auto path = root_ / std::prev(files_.end())->first;
  const std::string& bytes = std::prev(files_.end())->second;
  // Of the same length, so that the mapping stays whole; the middle is a row.
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(std::streamoff(bytes.size() / 2));
  file.put(char(bytes[bytes.size() / 2] ^ 1));
  file.close();
  ASSERT_FALSE(same(loaded.snapshot, kWhole));
  EXPECT_EQ(code_of([&] { store.save_agent_cache("a", loaded.snapshot, "m"); }), ErrorCode::kCorruption);
}

TEST_F(StoreDamage, GcRefusesToGuess) {
  Store store(root_);
  write_all(root_ / "a.safetensors", files_["a.safetensors"].substr(0, 100));
  const auto before = tree(root_);
  std::string message;
  EXPECT_EQ(code_of([&] { store.gc(); }, &message), ErrorCode::kCorruption);
  EXPECT_NE(message.find("a.safetensors"), std::string::npos);
  EXPECT_EQ(tree(root_), before);
  const auto agents = store.list_cached_agents();
  ASSERT_EQ(agents.size(), 1u);
  EXPECT_EQ(agents[0].hash, "");
  EXPECT_EQ(store.get_cache_disk_usage().orphan_segments, 0);
  // It can be deleted all the same, and then gc sweeps.
  store.delete_agent_cache("a");
  store.gc();
  EXPECT_TRUE(tree(root_).empty());
}

TEST_F(StoreDamage, NothingIsAllocatedForRowsThatCanNotBeThere) {
  write_all(root_ / "a.safetensors", files_["a.safetensors"].substr(0, files_["a.safetensors"].size() - 1));
  LoadOptions options;
  options.allocate = [](size_t) -> std::shared_ptr<std::byte> { ADD_FAILURE() << "allocated"; return nullptr; };
  EXPECT_EQ(code_of([&] { Store(root_).load_agent_cache("a", options); }), ErrorCode::kCorruption);
}

TEST_F(StoreDamage, AnAgentUnderAnotherNameIsNotThatAgent) {
  fs::copy(root_ / "a.safetensors", root_ / "b.safetensors");
  std::string message;
  EXPECT_EQ(code_of([&] { Store(root_).load_agent_cache("b"); }, &message), ErrorCode::kCorruption);
  EXPECT_NE(message.find("renamed"), std::string::npos) << message;
}

}  // namespace
}  // namespace torpor::testing
