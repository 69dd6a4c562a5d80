/// The records of a bucket: what is written is read, and nothing else is.

#include <filesystem>
#include <fstream>
#include <iterator>

#include <gtest/gtest.h>

#include "base/json.h"
#include "remote/ownership.h"
#include "remote/records.h"
#include "torpor/error.h"

namespace torpor::remote {
namespace {

const std::string kId(32, 'a');

Head some_head() {
  Head head;
  head.epoch = 3;
  head.sequence = 12;
  head.save_id = kId;
  head.owner = "w1-77";
  head.file = save_name({3, 12, kId});
  head.turn = Turn{"turn-é\"", std::string(32, '1'), "tokens 5-9"};
  head.past = {turn_mark("a"), turn_mark("b")};
  return head;
}

/// Every byte but a record's own, in every place, and every shorter text.
template <typename Decode>
void expect_damage_is_found(const std::string& text, Decode decode) {
  const auto is_refused = [&](const std::string& other) {
    try {
      decode(other);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kCorruption;
    }
    return false;
  };
  for (size_t i = 0; i < text.size(); ++i) {
    std::string flipped = text;
    flipped[i] = char(flipped[i] ^ (1 << (i % 8)));
    EXPECT_TRUE(is_refused(flipped)) << i;
    EXPECT_TRUE(is_refused(text.substr(0, i))) << i;
  }
  EXPECT_TRUE(is_refused(text + " "));
  EXPECT_TRUE(is_refused(std::string(1 << 20, '[')));
}

TEST(RemoteRecords, AHeadIsReadAsItWasWritten) {
  const Head head = some_head();
  EXPECT_EQ(decode_head(encode(head), "k"), head);
  expect_damage_is_found(encode(head), [](const std::string& text) { decode_head(text, "k"); });
}

TEST(RemoteRecords, ALeaseIsReadAsItWasWritten) {
  Lease lease;
  lease.session = "w1-77";
  lease.address = "10.0.0.1:8080";
  lease.room = int64_t(1) << 40;
  lease.generation = 5;
  const std::string key = lease_key(lease.session);
  EXPECT_EQ(decode_lease(encode(lease), key), lease);
  EXPECT_THROW(decode_lease(encode(lease), lease_key("w2-1")), Error);
  expect_damage_is_found(encode(lease), [&](const std::string& text) { decode_lease(text, key); });
}

TEST(RemoteRecords, ASweepRecordIsReadAsItWasWritten) {
  const SweepRecord record{7, "w1-77", kId};
  EXPECT_EQ(decode_sweep(encode(record), kSweepKey), record);
  expect_damage_is_found(encode(record), [](const std::string& text) { decode_sweep(text, kSweepKey); });
}

TEST(RemoteRecords, ASealIsReadAsItWasWritten) {
  const SealRecord record{kId};
  EXPECT_EQ(decode_seal(encode(record), kSealKey), record);
  expect_damage_is_found(encode(record), [](const std::string& text) { decode_seal(text, kSealKey); });
}

TEST(RemoteRecords, AManifestIsReadBeforeTheAgentFileThatFollowsIt) {
  const std::vector<std::string> keys{pool_key({"segments/3f/3fa9", 4}), pool_key({"parts/0b-77", 0})};
  const std::string text = encode_manifest(keys);
  EXPECT_EQ(decode_manifest(text + "the agent file", "k"), keys);
  EXPECT_EQ(manifest_bytes(text, text.size() + 14, "k"), text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    std::string flipped = text;
    flipped[i] = char(flipped[i] ^ (1 << (i % 8)));
    EXPECT_THROW(decode_manifest(flipped, "k"), Error) << i;
    EXPECT_THROW(decode_manifest(text.substr(0, i), "k"), Error) << i;
  }
}

TEST(RemoteRecords, AManifestOfAnyLengthTakesNoMemoryThatTheObjectDoesNotHave) {
  EXPECT_THROW(manifest_bytes(std::string(8, '\xff'), 1000, "k"), Error);
  EXPECT_THROW(manifest_bytes(std::string("\xff\0\0\0\0\0\0\0", 8), 100, "k"), Error);
}

TEST(RemoteRecords, NamesThatMeanSomethingElseAreNone) {
  EXPECT_FALSE(parse_pool_key("segments/3f/3fa9.safetensors"));
  EXPECT_FALSE(parse_pool_key("segments/3f/3fa9.04.safetensors"));
  EXPECT_FALSE(parse_pool_key("agents/ada/head"));
  EXPECT_FALSE(parse_pool_key("segments/../head.1.safetensors"));
  EXPECT_EQ(parse_pool_key("states/3f/3fa9.4.safetensors")->path, "states/3f/3fa9");
  EXPECT_FALSE(parse_save_name("1-2-" + std::string(31, 'a')));
  EXPECT_FALSE(parse_save_name("1-02-" + kId));
  EXPECT_EQ(parse_save_name("1-2-" + kId)->sequence, 2);
}

TEST(RemoteRecords, ASegmentsChecksumStandsWhereASaveReadsIt) {
  const std::filesystem::path store = std::string(TORPOR_SOURCE_DIR) + "/tests/goldens/store-v3/store/segments";
  int seen = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(store)) {
    if (!entry.is_regular_file()) continue;
    std::ifstream in(entry.path(), std::ios::binary);
    const std::string file(std::istreambuf_iterator<char>(in), {});
    const size_t length = size_t(uint8_t(file[0])) | size_t(uint8_t(file[1])) << 8;
    const auto whole = parse_json<nlohmann::json>(file.substr(8, length));
    EXPECT_EQ(file.substr(kChecksumAt, 32), whole["__metadata__"]["checksum"]);
    ++seen;
  }
  EXPECT_GT(seen, 0);
}

TEST(RemoteRecords, ANameThatIsNoUtf8OrTooLongIsRefusedBeforeItIsWritten) {
  Head head = some_head();
  head.turn->id = "\xff";
  EXPECT_THROW(encode(head), Error);
  head.turn->id = std::string(257, 'a');
  EXPECT_THROW(encode(head), Error);
}

Answer answer_of(Answer::Status status) {
  Answer answer;
  answer.status = status;
  answer.error = std::make_exception_ptr(Error(ErrorCode::kIo, "The credentials are refused."));
  return answer;
}

/// What a swap comes to whose requests are answered so, one after the other.
Swap::Outcome outcome_of(const std::vector<Answer::Status>& answers) {
  Exchange exchange;
  Operation<Swap> operation = swap(exchange, "agents/ada/head", Condition::of_tag("1"), "text");
  operation.start();
  for (const Answer::Status status : answers) exchange.answer({answer_of(status)});
  EXPECT_TRUE(operation.done());
  return operation.result().outcome;
}

TEST(RemoteRecords, ASwapThatMayHaveBeenAppliedIsNotToldAsRefused) {
  using enum Answer::Status;
  EXPECT_EQ(outcome_of({kLost, kRefused}), Swap::Outcome::kUnknown);
  EXPECT_EQ(outcome_of({kLost, kLost, kRefused}), Swap::Outcome::kUnknown);
  EXPECT_EQ(outcome_of({kPrecondition, kRefused}), Swap::Outcome::kUnknown);
  EXPECT_THROW(outcome_of({kRefused}), Error);
}

TEST(RemoteRecords, ATurnThatWasCommittedIsNotRunAgain) {
  const Head head = some_head();
  EXPECT_EQ(check_turn(head, head.turn->id, head.turn->digest), TurnCheck::kAnswered);
  EXPECT_EQ(check_turn(head, head.turn->id, std::string(32, '2')), TurnCheck::kOther);
  EXPECT_EQ(check_turn(head, "b", std::string(32, '1')), TurnCheck::kPast);
  EXPECT_EQ(check_turn(head, "c", std::string(32, '1')), TurnCheck::kRun);
}

}  // namespace
}  // namespace torpor::remote
