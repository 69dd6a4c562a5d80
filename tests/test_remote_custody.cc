/// What a worker decides about copies and owners.

#include <gtest/gtest.h>

#include "remote/custody.h"

namespace torpor::remote {
namespace {

const std::optional<std::string> kNone, kOld = "old", kNew = "new", kOwn = "own";

TEST(RemoteCustody, ACommitTakesThePlaceOfACopyThatWasOneOfTheBucket) {
  EXPECT_EQ(judge_copy(kNone, kNone, false, kNew), CopyStep::kInstall);
  EXPECT_EQ(judge_copy(kOld, kOld, false, kNew), CopyStep::kInstall);
  EXPECT_EQ(judge_copy(kNew, kOld, false, kNew), CopyStep::kKeep);
  EXPECT_EQ(judge_copy(kNone, kOld, false, kNone), CopyStep::kKeep);
}

TEST(RemoteCustody, WhatAKilledWorkerSavedAndNeverToldGivesWay) {
  EXPECT_EQ(judge_copy(kOwn, kOld, true, kOld), CopyStep::kInstall);
  EXPECT_EQ(judge_copy(kOwn, kNone, true, kNone), CopyStep::kRemove);
}

TEST(RemoteCustody, WhatWasSaidToACopyWithoutTheBucketIsNeverDropped) {
  EXPECT_EQ(judge_copy(kOwn, kOld, false, kOld), CopyStep::kRefuse);
  EXPECT_EQ(judge_copy(kOwn, kOld, false, kNone), CopyStep::kRefuse);
  EXPECT_EQ(judge_copy(kOwn, kNone, false, kOld), CopyStep::kRefuse);
}

TEST(RemoteCustody, AnAgentThatTheBucketNeverHadGoesThere) {
  EXPECT_EQ(judge_copy(kOwn, kNone, false, kNone), CopyStep::kAdopt);
  EXPECT_EQ(judge_copy(kOld, kOld, false, kNone), CopyStep::kRemove);  // it had it, and it was removed
}

LeaseWatch::Seen seen(int since, int asked) {
  LeaseWatch::Seen seen;
  seen.lease.ttl_ms = 10'000;
  seen.since = std::chrono::seconds(since);
  seen.asked = std::chrono::seconds(asked);
  return seen;
}

TEST(RemoteCustody, AnOwnerIsAliveOnceItsTagHasChangedLately) {
  const Instant first = std::chrono::seconds(100);
  EXPECT_EQ(judge_owner(std::nullopt, std::nullopt), OwnerStep::kLook);
  EXPECT_EQ(judge_owner(first, seen(100, 101)), OwnerStep::kLook);   // seen once: dead or alive
  EXPECT_EQ(judge_owner(first, seen(103, 104)), OwnerStep::kAlive);
  EXPECT_EQ(judge_owner(first, seen(103, 109)), OwnerStep::kLook);   // it has missed a renewal
  EXPECT_EQ(judge_owner(first, seen(103, 115)), OwnerStep::kLook);   // by its own clock it may have a little left
  EXPECT_EQ(judge_owner(first, seen(103, 116)), OwnerStep::kGone);
  EXPECT_EQ(judge_owner(first, seen(100, 113)), OwnerStep::kGone);
}

}  // namespace
}  // namespace torpor::remote
