/// Who else can write to a store's directory gets nothing followed, waited for or written over that is not the store's.

#include <functional>

#include <sys/stat.h>
#include <unistd.h>

#include "base/env.h"
#include "store_fixture.h"
#include "torpor/log.h"

namespace torpor::testing {
namespace {

class StoreTrust : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(victim_);
    write_all(victim_ / "file", "somebody's");
  }

  /// Puts a symbolic link to the victim's directory where the store's own was, whose files go to the victim.
  void divert(const std::string& name) {
    const fs::path own = root_ / name;
    if (fs::exists(own)) {
      fs::remove_all(victim_);
      fs::rename(own, victim_);
      write_all(victim_ / "file", "somebody's");
    }
    fs::create_directories(own.parent_path());
    fs::create_directory_symlink(victim_, own);
    before_ = tree(victim_);
  }
  std::string some_segment() {
    for (const auto& [name, bytes] : tree(root_)) {
      if (name.starts_with("segments/")) return name;
    }
    return "";
  }
  ErrorCode refused(const std::function<void()>& call, const std::string& word) {
    std::string message;
    const auto code = code_of(call, &message);
    EXPECT_NE(message.find(word), std::string::npos) << message;
    return code.value_or(ErrorCode::kInternal);
  }
  std::vector<std::string> warnings_of_opening() {
    std::vector<std::string> warnings;
    set_log_handler([&](LogLevel level, std::string_view sentence) {
      if (level == LogLevel::kWarning) warnings.emplace_back(sentence);
    });
    Store again(root_);
    set_log_handler({});
    return warnings;
  }

  TemporaryDirectory directory_;
  const fs::path root_ = directory_.path() / "store", victim_ = directory_.path() / "victim";
  std::map<std::string, std::string> before_;
  Store store_{root_};
};

TEST_F(StoreTrust, GarbageCollectionFollowsNoSymbolicLinkToSegmentsOrParts) {
  store_.save_agent_cache("a", make_snapshot(300), "m");
  const std::string segment = some_segment();
  store_.delete_agent_cache("a");
  ASSERT_TRUE(some_segment().empty());
  store_.save_prefix(make_snapshot(300));
  for (const std::string& name : {segment.substr(0, segment.rfind('/')), std::string("segments"), std::string("parts")}) {
    divert(name);
    write_all(victim_ / ".torpor-tmp-1-1", "somebody's");
    write_all(victim_ / (std::string(32, 'a') + "-" + std::string(32, 'b') + ".safetensors"), "somebody's");
    before_ = tree(victim_);
    store_.gc();
    EXPECT_EQ(tree(victim_), before_) << name;
    fs::remove(root_ / name);
  }
}

TEST_F(StoreTrust, RemovingAnAgentRemovesNothingThroughASymbolicLink) {
  store_.save_agent_cache("a", make_snapshot(300), "m");
  const std::string segment = some_segment();
  divert(segment.substr(0, segment.rfind('/')));
  store_.delete_agent_cache("a");
  EXPECT_EQ(tree(victim_), before_);
  EXPECT_FALSE(store_.contains("a"));
}

TEST_F(StoreTrust, ASaveWritesNothingThroughASymbolicLinkAndSaysSo) {
  for (const char* name : {"segments", "parts", ".locks"}) {
    Store(root_).save_agent_cache("a", make_snapshot(40), "m");
    Store(root_).save_agent_cache("a", make_snapshot(45), "m");  // has a part now
    divert(name);
    const std::string agent = read_all(root_ / "a.safetensors");
    EXPECT_EQ(refused([&] { Store(root_).save_agent_cache("a", make_snapshot(300), "m"); }, "symbolic link"), ErrorCode::kIo) << name;
    EXPECT_EQ(tree(victim_), before_) << name;
    EXPECT_EQ(read_all(root_ / "a.safetensors"), agent) << name;
    fs::remove_all(root_);
  }
}

TEST_F(StoreTrust, ASegmentIsNotWrittenThroughASymbolicLink) {
  store_.save_agent_cache("a", make_snapshot(300), "m");
  const std::string segment = some_segment();
  const std::string bucket = segment.substr(0, segment.rfind('/'));
  store_.delete_agent_cache("a");
  fs::remove(root_ / bucket);
  divert(bucket);
  EXPECT_EQ(refused([&] { store_.save_agent_cache("a", make_snapshot(300), "m"); }, "symbolic link"), ErrorCode::kIo);
  EXPECT_EQ(tree(victim_), before_);
}

TEST_F(StoreTrust, TheCounterIsNeverWrittenThroughASymbolicLink) {
  store_.save_agent_cache("a", make_snapshot(3), "m");
  fs::remove(root_ / ".locks/.bytes_written");
  fs::create_symlink(victim_ / "file", root_ / ".locks/.bytes_written");
  store_.save_agent_cache("a", make_snapshot(4), "m");
  EXPECT_EQ(read_all(victim_ / "file"), "somebody's");
}

TEST_F(StoreTrust, NobodyWaitsForAPipe) {
  store_.save_agent_cache("a", make_snapshot(300), "m");
  for (const char* name : {"a.json", "b.safetensors", "b.json", ".locks/a.lock"}) {
    const fs::path path = root_ / name;
    fs::remove(path);
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    const auto agents = store_.list_cached_agents();
    ASSERT_EQ(agents.size(), 1u) << name;
    EXPECT_EQ(agents[0].agent_id, "a");
    EXPECT_EQ(agents[0].cache_size, 300);
    EXPECT_EQ(store_.verify().size(), 1u) << name;
    store_.gc();
    if (fs::is_fifo(path)) fs::remove(path);
  }
  const std::string pipe = (root_ / ".locks/a.lock").string();
  fs::remove(pipe);
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_EQ(refused([&] { (void)store_.lock_agent("a"); }, "a.lock"), ErrorCode::kIo);
}

TEST_F(StoreTrust, AStoreThatOthersMayWriteToIsToldOf) {
  EXPECT_EQ(fs::status(root_).permissions(), fs::perms::owner_all);
  EXPECT_TRUE(warnings_of_opening().empty());
  fs::permissions(root_, fs::perms::all);
  ASSERT_EQ(warnings_of_opening().size(), 1u);
  EXPECT_NE(warnings_of_opening()[0].find("Other users may write"), std::string::npos);
  fs::permissions(root_, fs::perms::all | fs::perms::sticky_bit);
  EXPECT_TRUE(warnings_of_opening().empty());
}

TEST_F(StoreTrust, AStoreOfAnotherUserIsToldOf) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a directory away";
  ASSERT_EQ(::chown(root_.c_str(), 12345, gid_t(-1)), 0);
  ASSERT_EQ(warnings_of_opening().size(), 1u);
  EXPECT_NE(warnings_of_opening()[0].find("12345"), std::string::npos);
}

}  // namespace
}  // namespace torpor::testing
