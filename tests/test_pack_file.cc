/// Packed weights on disk: what one process packs, the next one finds; anything else is packed again.

#include "model/pack_file.h"

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <thread>

#include <gtest/gtest.h>

#include "base/environment.h"
#include "model/known_digests.h"
#include "torpor/model_info.h"

namespace torpor::model {
namespace {

namespace fs = std::filesystem;

const std::string kKey(32, 'a');

class PackFileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "torpor-pack-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
    ::setenv("TORPOR_CACHE", (dir_ / "cache").c_str(), 1);
    model_ = dir_ / "model.safetensors";
    std::ofstream(model_) << "weights";
  }
  void TearDown() override { fs::remove_all(dir_); }

  fs::path file() const { return dir_ / "cache" / "packed" / (kKey + ".weights"); }
  std::unique_ptr<PackFile> open(uint64_t bytes = 1 << 20) { return PackFile::open(kKey, {model_}, bytes); }

  static std::byte value(size_t piece, size_t i) { return std::byte((i * 7 + piece * 31 + i / 251) & 255); }
  static size_t size(size_t piece) { return piece == 2 ? (size_t(4) << 20) + 77 : 1000 * piece + 64; }

  /// What a model does with a file: takes each piece, and packs what is not filled. Which were filled.
  std::vector<bool> load(std::unique_ptr<PackFile> file, size_t pieces = 4, const std::string& fingerprint = "piece") {
    PackFile& pack = *file;
    std::vector<bool> filled;
    for (size_t p = 0; p < pieces; ++p) {
      kernels::WeightMemory& memory = p % 2 == 0 ? pack.resident() : pack.mapped();
      const auto place = memory.take(size(p), fingerprint + std::to_string(p));
      EXPECT_EQ(uintptr_t(place.data.get()) % 64, 0u);
      filled.push_back(place.filled);
      if (!place.filled) {
        for (size_t i = 0; i < size(p); ++i) place.data.get()[i] = value(p, i);
        memory.filled(place, size(p));
      }
      kept_.push_back(place);
    }
    PackFile::finish(std::move(file));
    wait();
    return filled;
  }
  /// Until what is being written is in place.
  void wait() const {
    const auto writing = [&] {
      if (!fs::is_directory(dir_ / "cache" / "packed")) return false;
      return std::ranges::any_of(fs::directory_iterator(dir_ / "cache" / "packed"), [](const auto& entry) {
        return entry.path().filename().string().starts_with(".torpor-tmp-" + std::to_string(::getpid()));
      });
    };
    while (writing()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  /// Loads once more, and compares every byte.
  std::vector<bool> load_again() {
    kept_.clear();
    std::vector<bool> filled = load(open());
    for (size_t p = 0; p < kept_.size(); ++p) {
      bool equal = true;
      for (size_t i = 0; i < size(p); ++i) equal &= kept_[p].data.get()[i] == value(p, i);
      EXPECT_TRUE(equal) << "piece " << p;
    }
    return filled;
  }
  void write() { load(open()); }
  std::string bytes() const {
    std::ifstream in(file(), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void replace(const std::string& bytes) { std::ofstream(file(), std::ios::binary | std::ios::trunc) << bytes; }

  fs::path dir_, model_;
  std::vector<kernels::WeightMemory::Place> kept_;
  const std::vector<bool> all_ = std::vector<bool>(4, true), none_ = std::vector<bool>(4, false);
};

TEST_F(PackFileTest, WhatOneProcessPacksTheNextOneFinds) {
  EXPECT_EQ(load(open()), none_);
  ASSERT_TRUE(fs::exists(file()));
  struct stat stat;
  ASSERT_EQ(::stat(file().c_str(), &stat), 0);
  EXPECT_EQ(stat.st_mode & 0777, 0600u);
  EXPECT_EQ(load_again(), all_);
}

TEST_F(PackFileTest, APlaceOutlivesItsFile) {
  write();
  EXPECT_EQ(load_again(), all_);
  const auto held = std::move(kept_);
  fs::remove(file());
  EXPECT_EQ(held[3].data.get()[100], value(3, 100));
}

TEST_F(PackFileTest, ALoadThatFailsLeavesNoFile) {
  {
    const auto pack = open();
    const auto place = pack->resident().take(64, "piece0");
    pack->resident().filled(place, 64);
  }
  EXPECT_TRUE(fs::is_empty(dir_ / "cache" / "packed"));
}

TEST_F(PackFileTest, WeightsOfAnotherModelAreNotTaken) {
  write();
  EXPECT_EQ(load(open(), 4, "other"), none_);
  EXPECT_FALSE(fs::exists(file())) << "it is made anew the next time";
  write();
  EXPECT_EQ(load(open(), 5), (std::vector<bool>{true, true, true, true, false}));
}

TEST_F(PackFileTest, AFlippedByteIsFoundWhereverItIs) {
  write();
  const std::string whole = bytes();
  // Of each piece some, of the index and the end many.
  std::vector<size_t> places;
  for (size_t at = 0; at < whole.size(); at += at < whole.size() - 900 ? 300'007 : 13) places.push_back(at);
  for (const size_t at : places) {
    std::string damaged = whole;
    damaged[at] = char(damaged[at] ^ 4);
    replace(damaged);
    load_again();
    if (HasFailure()) FAIL() << "byte " << at << " of " << whole.size();
  }
}

TEST_F(PackFileTest, AFileThatWasCutShortIsPackedAnew) {
  write();
  const std::string whole = bytes();
  for (const size_t left : {size_t(0), size_t(1), size_t(79), size_t(80), size_t(5000), whole.size() - 1}) {
    replace(whole.substr(0, left));
    EXPECT_EQ(load_again(), none_) << left;
    EXPECT_EQ(load_again(), all_) << left;
  }
}

TEST_F(PackFileTest, ModelsThatNeedMoreThanHalfOfTheDiskHaveNone) { EXPECT_EQ(open(uint64_t(1) << 60), nullptr); }

TEST_F(PackFileTest, WithoutADirectoryThereIsNone) {
  std::ofstream(dir_ / "cache") << "no directory";
  EXPECT_EQ(open(), nullptr);
}

TEST_F(PackFileTest, WhatBelongsToNoModelAnyMoreIsStale) {
  write();
  ModelCacheUsage usage = clean_model_cache();
  EXPECT_EQ(usage.files, 1);
  EXPECT_EQ(usage.bytes, int64_t(fs::file_size(file())));
  EXPECT_EQ(usage.stale_files, 0);
  const fs::path left = dir_ / "cache" / "packed" / (".torpor-tmp-" + std::to_string(::getpid()) + "-0123");
  std::ofstream(left) << "being written";
  EXPECT_EQ(clean_model_cache().stale_files, 0);
  fs::remove(model_);
  EXPECT_EQ(clean_model_cache().stale_files, 1);
  EXPECT_TRUE(fs::exists(file()));
  EXPECT_EQ(clean_model_cache(/*remove=*/true).stale_bytes, usage.bytes);
  EXPECT_FALSE(fs::exists(file()));
  EXPECT_TRUE(fs::exists(left));
}

TEST_F(PackFileTest, WhatAKilledProcessHasLeftIsRemovedByTheNext) {
  write();
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  const fs::path left = dir_ / "cache" / "packed" / (".torpor-tmp-" + std::to_string(child) + "-0123");
  std::ofstream(left) << "half";
  EXPECT_EQ(clean_model_cache().stale_files, 1);
  fs::remove(file());
  write();
  EXPECT_FALSE(fs::exists(left));
}

TEST_F(PackFileTest, AModelHasOneFileWhateverItsKeyBecomes) {
  write();
  const fs::path other = dir_ / "cache" / "packed" / (std::string(32, 'b') + ".weights");
  load(PackFile::open(std::string(32, 'b'), {model_}, 1 << 20));
  while (fs::exists(file())) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(fs::exists(other));
}

TEST_F(PackFileTest, AModelThatWasWrittenAnewMakesItsFileStale) {
  write();
  std::ofstream(model_) << "other weights";
  EXPECT_EQ(clean_model_cache().stale_files, 1);
}

TEST_F(PackFileTest, ADigestIsAskedForAgainOnlyWhenTheFileHasChanged) {
  int asked = 0;
  const auto digest = [&] {
    return digest_of_files({&model_, 1}, [&] {
      ++asked;
      return std::to_string(asked);
    });
  };
  EXPECT_EQ(digest(), "1");
  EXPECT_EQ(digest(), "2") << "it is too young to be remembered";
  // Files that have been there for long.
  const fs::path old = fs::path(TORPOR_SOURCE_DIR) / "LICENSE";
  const auto digest_of_old = [&](const std::string& says) { return digest_of_files({&old, 1}, [&] { return says; }); };
  EXPECT_EQ(digest_of_old("first"), "first");
  EXPECT_EQ(digest_of_old("second"), "first");
}

}  // namespace
}  // namespace torpor::model
