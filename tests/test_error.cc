/// Errors with their data, the faces' table of codes, the log handler, and the version.

#include <atomic>
#include <cerrno>
#include <memory>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "base/foreign_error.h"
#include "faces/error_table.h"
#include "store/torpor_file.h"
#include "torpor/error.h"
#include "torpor/log.h"
#include "torpor/version.h"

namespace torpor {
namespace {

TEST(Error, CarriesWhatItsSentenceIsAbout) {
  try {
    throw Error(ErrorCode::kIncompatible, "No.").with_agent("ada").with_path("/a").with_field("kv", "f16", "f32");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIncompatible);
    EXPECT_STREQ(error.what(), "No.");
    EXPECT_EQ(error.agent() + "|" + error.path() + "|" + error.field() + "|" + error.expected() + "|" + error.found(),
              "ada|/a|kv|f16|f32");
  }
}

TEST(Error, SaysNothingWhereNothingApplies) {
  const Error error(ErrorCode::kIo, "No.");
  EXPECT_EQ(error.agent() + error.path() + error.field() + error.expected() + error.found(), "");
}

TEST(Error, AChangedCopyLeavesTheOtherAsItWas) {
  Error first(ErrorCode::kIo, "No.");
  first.with_agent("ada").with_field("kv");
  Error second = first;
  second.with_agent("eve");
  EXPECT_EQ(first.agent(), "ada");
  EXPECT_EQ(second.agent(), "eve");
  EXPECT_EQ(second.field(), "kv");
  static_assert(std::is_nothrow_copy_constructible_v<Error>);
}

TEST(Error, IsMadeOfWhatOthersThrow) {
  const auto made_of = [](auto exception) { return to_error(std::make_exception_ptr(exception), "The work"); };
  const auto refusal = [](int code) { return std::system_error(code, std::generic_category(), "thread"); };
  EXPECT_EQ(made_of(Error(ErrorCode::kBusy, "No.")).code(), ErrorCode::kBusy);
  EXPECT_STREQ(made_of(std::bad_alloc()).what(), "The work failed: out of memory; free some and try again.");
  EXPECT_EQ(made_of(std::bad_alloc()).code(), ErrorCode::kResourceExhausted);
  for (const int code : {EAGAIN, ENOMEM, EMFILE}) EXPECT_EQ(made_of(refusal(code)).code(), ErrorCode::kResourceExhausted) << code;
  for (const int code : {EACCES, EROFS, EIO}) EXPECT_EQ(made_of(refusal(code)).code(), ErrorCode::kIo) << code;
  EXPECT_EQ(made_of(std::logic_error("oops")).code(), ErrorCode::kInternal);
  EXPECT_EQ(made_of(42).code(), ErrorCode::kInternal);
}

TEST(ErrorTable, EachCodeHasItsOwnExitCodeAndPythonClass) {
  std::set<int> exit_codes;
  std::set<std::string> classes;
  for (int code = 0; code <= int(ErrorCode::kInternal); ++code) {
    const faces::ErrorMapping& row = faces::error_mapping(ErrorCode(code));
    EXPECT_EQ(row.code, ErrorCode(code));
    EXPECT_GT(row.exit_code, 2);
    EXPECT_GE(row.http_status, 400);
    exit_codes.insert(row.exit_code);
    classes.insert(row.python_name);
  }
  EXPECT_EQ(exit_codes.size(), std::size(faces::kErrorTable));
  EXPECT_EQ(classes.size(), std::size(faces::kErrorTable));
}

class LogTest : public testing::Test {
 protected:
  void TearDown() override { set_log_handler(nullptr); }
};

TEST_F(LogTest, NobodyListensAtTheStart) {
  EXPECT_FALSE(log_wanted());
  log(LogLevel::kWarning, "Nobody hears this.");
}

TEST_F(LogTest, AHandlerGetsLevelAndSentenceUntilItIsTakenAway) {
  std::vector<std::string> said;
  set_log_handler([&](LogLevel level, std::string_view sentence) {
    said.push_back(std::string(log_level_name(level)) + ": " + std::string(sentence));
  });
  EXPECT_TRUE(log_wanted());
  log(LogLevel::kWarning, "A sidecar.");
  set_log_handler(nullptr);
  log(LogLevel::kInfo, "Nobody hears this.");
  EXPECT_EQ(said, std::vector<std::string>{"warning: A sidecar."});
}

TEST_F(LogTest, WhatAHandlerThrowsOrSaysIsDropped) {
  int calls = 0;
  set_log_handler([&](LogLevel, std::string_view) {
    ++calls;
    log(LogLevel::kInfo, "From within.");
    throw std::runtime_error("no");
  });
  log(LogLevel::kInfo, "One.");
  log(LogLevel::kInfo, "Two.");
  EXPECT_EQ(calls, 2);
}

TEST_F(LogTest, AHandlerCanNotReplaceItself) {
  ErrorCode code{};
  set_log_handler([&](LogLevel, std::string_view) {
    try {
      set_log_handler(nullptr);
    } catch (const Error& error) {
      code = error.code();
    }
  });
  log(LogLevel::kInfo, "One.");
  EXPECT_EQ(code, ErrorCode::kInvalidArgument);
}

TEST_F(LogTest, AHandlerThatWasReplacedIsNotCalledAnyMore) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> speakers;
  for (int i = 0; i < 3; ++i) {
    speakers.emplace_back([&] {
      while (!stop.load()) log(LogLevel::kDebug, "Again.");
    });
  }
  for (int round = 0; round < 20; ++round) {
    const auto heard = std::make_unique<std::atomic<int>>(0);  // gone when the round ends
    set_log_handler([count = heard.get()](LogLevel, std::string_view) { ++*count; });
    while (heard->load() == 0) std::this_thread::yield();
    set_log_handler(nullptr);
    const int last = heard->load();
    std::this_thread::yield();
    EXPECT_EQ(heard->load(), last);
  }
  stop.store(true);
  for (std::thread& speaker : speakers) speaker.join();
}

TEST(Version, IsThatOfTheStoresFiles) {
  EXPECT_EQ(kNewestFormat, kFormatVersion);
  EXPECT_EQ(kOldestFormatRead, kOldVersion);
  EXPECT_EQ(TORPOR_VERSION, std::to_string(TORPOR_VERSION_MAJOR) + "." + std::to_string(TORPOR_VERSION_MINOR) + "." +
                                std::to_string(TORPOR_VERSION_PATCH));
}

}  // namespace
}  // namespace torpor
