#include "base/env.h"

#include <fstream>
#include <thread>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/checked.h"
#include "fault_env.h"
#include "forked_child.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

TEST(Checked, ReportsOverflow) {
  EXPECT_EQ(checked_add<uint64_t>(2, 3), 5u);
  EXPECT_EQ(checked_add<uint64_t>(~0ull, 1), std::nullopt);
  EXPECT_EQ(checked_mul<uint64_t>(1ull << 32, 1ull << 31), 1ull << 63);
  EXPECT_EQ(checked_mul<uint64_t>(1ull << 32, 1ull << 32), std::nullopt);
  EXPECT_EQ(checked_mul<int>(1 << 20, 1 << 20), std::nullopt);
}

TEST(Env, FilesArePrivate) {
  TemporaryDirectory directory;
  Env& env = Env::posix();
  ASSERT_TRUE(env.make_directory(directory.path() / "d"));
  EXPECT_FALSE(env.make_directory(directory.path() / "d"));
  { File file = env.open(directory.path() / "d/f", OpenMode::kCreateNew); }
  struct stat stat;
  ::stat((directory.path() / "d").c_str(), &stat);
  EXPECT_EQ(stat.st_mode & 0777, 0700u);
  ::stat((directory.path() / "d/f").c_str(), &stat);
  EXPECT_EQ(stat.st_mode & 0777, 0600u);
}

TEST(Env, FinishesShortAndInterruptedTransfers) {
  TemporaryDirectory directory;
  FaultEnv env(directory.path(), directory.path() / "attic");
  env.stutter(true);
  std::string text;
  for (int i = 0; i < 5000; ++i) text += char('a' + i % 26);
  {
    File file = env.open(directory.path() / "f", OpenMode::kCreateNew);
    file.write_all({bytes_of(text)});
    file.sync();
    file.close();
  }
  EXPECT_EQ(env.read_file(directory.path() / "f", 10000), text);
  std::string middle(1000, '\0');
  env.open(directory.path() / "f", OpenMode::kRead).read_at(std::as_writable_bytes(std::span(middle)), 77);
  EXPECT_EQ(middle, text.substr(77, 1000));
}

TEST(Env, MemoryThatLiesApartIsWrittenAndReadInOrder) {
  TemporaryDirectory directory;
  FaultEnv stuttering(directory.path(), directory.path() / "attic");
  stuttering.stutter(true);
  std::string text;
  for (int i = 0; i < 5000; ++i) text += char('a' + i % 23);
  int k = 0;
  for (Env* env : {&Env::posix(), static_cast<Env*>(&stuttering)}) {
    const auto path = directory.path() / std::to_string(k++);
    // 2,500 pieces, more than one system call takes; every fifth is empty.
    std::vector<std::span<const std::byte>> pieces;
    for (size_t at = 0; at < text.size(); at += 2) {
      pieces.push_back(bytes_of(text).subspan(at, 2));
      if (at % 5 == 0) pieces.emplace_back();
    }
    {
      File file = env->open(path, OpenMode::kCreateNew);
      file.write_all(pieces);
      file.close();
    }
    EXPECT_EQ(env->read_file(path, 10000), text);
    std::string apart(3 * 1500, '.');
    std::vector<std::span<std::byte>> places;
    for (size_t i = 0; i < 1500; ++i) {
      places.push_back(std::as_writable_bytes(std::span(apart)).subspan(3 * i, i % 7 == 0 ? 0 : 2));
    }
    const File file = env->open(path, OpenMode::kRead);
    file.read_pieces_at(places, 100);
    size_t at = 100;
    for (size_t i = 0; i < 1500; ++i) {
      const size_t n = i % 7 == 0 ? 0 : 2;
      EXPECT_EQ(apart.substr(3 * i, 3), text.substr(at, n) + std::string(3 - n, '.')) << i;
      at += n;
    }
    std::string message;
    EXPECT_EQ(code_of([&] { file.read_pieces_at(places, 4000); }, &message), ErrorCode::kCorruption);
    EXPECT_NE(message.find("ends at byte 5000, 1570 bytes early"), std::string::npos) << message;
  }
}

TEST(Env, SaysWhatFailedOnWhatAndWhatToDo) {
  TemporaryDirectory directory;
  FaultEnv env(directory.path(), directory.path() / "attic");
  std::string message;
  const auto path = directory.path() / "f";
  File file = env.open(path, OpenMode::kCreateNew);
  env.fail_at(1, ENOSPC);
  EXPECT_EQ(code_of([&] { file.write_all({bytes_of("abc")}); }, &message), ErrorCode::kIo);
  EXPECT_NE(message.find(path.string()), std::string::npos) << message;
  EXPECT_NE(message.find("disk is full; free some space"), std::string::npos) << message;
  env.fail_at(1, EROFS);
  EXPECT_EQ(code_of([&] { env.make_directory(directory.path() / "d"); }, &message), ErrorCode::kIo);
  EXPECT_NE(message.find("read-only"), std::string::npos) << message;
}

TEST(Env, AMissingFileIsNotFoundAndAShortOneCorruption) {
  TemporaryDirectory directory;
  Env& env = Env::posix();
  EXPECT_EQ(code_of([&] { env.open(directory.path() / "none", OpenMode::kRead); }), ErrorCode::kNotFound);
  EXPECT_FALSE(env.stat(directory.path() / "none").has_value());
  EXPECT_FALSE(env.remove(directory.path() / "none"));
  EXPECT_TRUE(env.list(directory.path() / "none").empty());
  write_all(directory.path() / "f", "12345");
  std::string six(6, '\0');
  EXPECT_EQ(code_of([&] {
              env.open(directory.path() / "f", OpenMode::kRead).read_at(std::as_writable_bytes(std::span(six)), 0);
            }),
            ErrorCode::kCorruption);
  EXPECT_EQ(code_of([&] { env.read_file(directory.path() / "f", 4); }), ErrorCode::kResourceExhausted);
}

TEST(Env, NoMoreFilesAreMappedThanAProcessMayHold) {
  TemporaryDirectory directory;
  std::ofstream(directory.path() / "f") << "rows";
  const File file = Env::posix().open(directory.path() / "f", OpenMode::kRead);
  std::vector<std::shared_ptr<const std::byte>> mappings;
  for (int i = 0; i < kMaxMappings; ++i) {
    mappings.push_back(file.map(4));
    ASSERT_NE(mappings.back(), nullptr) << i;
  }
  EXPECT_EQ(file.map(4), nullptr);
  mappings.pop_back();
  EXPECT_NE(file.map(4), nullptr);
}

TEST(Env, TellsWhetherAMappingIsInMemory) {
  TemporaryDirectory directory;
  const auto path = directory.path() / "f";
  std::ofstream(path) << std::string(1 << 20, 'r');
  const File file = Env::posix().open(path, OpenMode::kRead);
  file.sync();
  const auto mapping = file.map(1 << 20);
  ASSERT_NE(mapping, nullptr);
  // From within one page into another.
  const std::span<const std::byte> all(mapping.get(), 1 << 20), part = all.subspan(5000, 300'000);
  EXPECT_EQ(std::count(all.begin(), all.end(), std::byte('r')), 1 << 20);
  EXPECT_TRUE(Env::posix().raw_in_memory(part));
#ifdef __linux__
  ::madvise(const_cast<std::byte*>(mapping.get()), 1 << 20, MADV_DONTNEED);
  if (::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED) != 0) GTEST_SKIP() << "this file system keeps its pages";
  if (Env::posix().raw_in_memory(all)) GTEST_SKIP() << "this file system keeps its pages";
  EXPECT_FALSE(Env::posix().raw_in_memory(part));
  EXPECT_EQ(part[0], std::byte('r'));
  EXPECT_TRUE(Env::posix().raw_in_memory(part.first(1)));
#endif
}

TEST(Env, LocksExcludeEachOtherInOneProcessToo) {
  TemporaryDirectory directory;
  Env& env = Env::posix();
  const auto path = directory.path() / "lock";
  using std::chrono::milliseconds;
  {
    const auto shared = env.lock(path, LockMode::kShared, milliseconds(0));
    ASSERT_TRUE(shared);
    EXPECT_TRUE(env.lock(path, LockMode::kShared, milliseconds(0)));
    EXPECT_FALSE(env.lock(path, LockMode::kExclusive, milliseconds(0)));
    EXPECT_FALSE(env.lock(path, LockMode::kExclusive, milliseconds(15)));
  }
  const auto exclusive = env.lock(path, LockMode::kExclusive, milliseconds(0));
  ASSERT_TRUE(exclusive);
  EXPECT_FALSE(env.lock(path, LockMode::kShared, milliseconds(0)));
  // Removed by its holder: the next one locks a new file, not the ghost of the old one.
  env.remove(path);
  const auto next = env.lock(path, LockMode::kExclusive, milliseconds(0));
  ASSERT_TRUE(next);
  EXPECT_TRUE(env.exists(path));
}

TEST(Env, ANewNameIsGivenOnce) {
  TemporaryDirectory directory;
  FaultEnv with_links(directory.path(), directory.path() / "attic"), without(directory.path(), directory.path() / "attic2");
  without.no_links();
  int k = 0;
  for (Env* env : {&Env::posix(), static_cast<Env*>(&with_links), static_cast<Env*>(&without)}) {
    const auto first = directory.path() / ("first" + std::to_string(k)), second = directory.path() / ("second" + std::to_string(k));
    const auto name = directory.path() / ("name" + std::to_string(k++));
    write_all(first, "1");
    write_all(second, "2");
    EXPECT_TRUE(env->put_new(first, name));
    EXPECT_FALSE(env->put_new(second, name));
    EXPECT_EQ(read_all(name), "1");
    EXPECT_FALSE(fs::exists(first));
    EXPECT_EQ(read_all(second), "2");
    EXPECT_EQ(env->raw_rename_new(second.c_str(), name.c_str()), -EEXIST);
    EXPECT_EQ(env->raw_rename_new(second.c_str(), first.c_str()), 0);
    EXPECT_EQ(read_all(first), "2");
  }
}

TEST(Env, ALinkThatWasMadeThoughItSeemedToFailCounts) {
  class Forgetful : public FaultEnv {
   public:
    using FaultEnv::FaultEnv;
    int answer = 0;
    int raw_link(const char* from, const char* to) override { return FaultEnv::raw_link(from, to), answer; }
  };
  TemporaryDirectory directory;
  Forgetful env(directory.path(), directory.path() / "attic");
  for (const int answer : {-EINTR, -EEXIST}) {
    env.answer = answer;
    const auto from = directory.path() / "from", to = directory.path() / ("to" + std::to_string(answer));
    write_all(from, "1");
    EXPECT_TRUE(env.put_new(from, to));
    EXPECT_FALSE(fs::exists(from));
    EXPECT_EQ(read_all(to), "1");
  }
}

TEST(Env, ALockIsFreeWhenItsHolderLetsGoThoughAForkedChildLives) {
  TemporaryDirectory directory;
  Env& env = Env::posix();
  const auto path = directory.path() / "lock";
  const auto is_free = [&] { return env.lock(path, LockMode::kExclusive, std::chrono::milliseconds(0)).has_value(); };
  auto held = env.lock(path, LockMode::kExclusive, std::chrono::milliseconds(0));
  ASSERT_TRUE(held);
  ForkedChild child([&] { held.reset(); });
  EXPECT_EQ(child.first_part(), 0);
  EXPECT_FALSE(is_free()) << "the child's copy is not the child's to release";
  held.reset();
  EXPECT_TRUE(is_free());
  EXPECT_EQ(child.end(), 0);
}

TEST(Env, ALockIsNeverTakenThroughASymbolicLink) {
  TemporaryDirectory directory;
  write_all(directory.path() / "victim", "text");
  fs::create_symlink(directory.path() / "victim", directory.path() / "lock");
  std::string message;
  EXPECT_EQ(code_of([&] { Env::posix().lock(directory.path() / "lock", LockMode::kExclusive, {}); }, &message), ErrorCode::kIo);
  EXPECT_NE(message.find("symbolic link"), std::string::npos) << message;
}

TEST(Env, ALockWhoseFileHasAnotherInodeEachTimeIsAnError) {
  class Restless : public FaultEnv {
   public:
    using FaultEnv::FaultEnv;
    int raw_stat(const char* path, FileStat& out) override {
      const int result = FaultEnv::raw_stat(path, out);
      out.inode = ++next_;
      return result;
    }
    uint64_t next_ = uint64_t(1) << 60;
  };
  TemporaryDirectory directory;
  Restless env(directory.path(), directory.path() / "attic");
  EXPECT_EQ(code_of([&] { env.lock(directory.path() / "lock", LockMode::kExclusive, std::chrono::milliseconds(20)); }), ErrorCode::kIo);
}

TEST(Env, WaitsForALockUntilItIsFree) {
  TemporaryDirectory directory;
  Env& env = Env::posix();
  const auto path = directory.path() / "lock";
  auto held = env.lock(path, LockMode::kExclusive, std::chrono::milliseconds(0));
  std::jthread releaser([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    held.reset();
  });
  EXPECT_TRUE(env.lock(path, LockMode::kExclusive, std::chrono::seconds(30)));
}

}  // namespace
}  // namespace torpor::testing
