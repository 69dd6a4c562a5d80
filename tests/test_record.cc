/// Torpor's own metadata of an agent beside the caller's, in files of this version and of earlier ones.

#include "agents/record.h"
#include "base/hash.h"
#include "store/torpor_file.h"
#include "store_fixture.h"
#include "torpor/agents.h"

namespace torpor {
namespace {

using testing::code_of;

class Record : public ::testing::Test {
 protected:
  void save(const std::string& id, const UserMetadata& user, const AgentNotes& notes = {}) {
    const auto lock = store_.lock_agent(id);
    store_.save_agent_cache(id, testing::make_snapshot(30), "model", user, Durability::kNone, notes);
  }
  /// As format version 1 kept it.
  void write_old(const std::string& id, const UserMetadata& user) {
    const KvSnapshot snapshot = testing::make_snapshot(30);
    Metadata metadata = {{"agent_id", id}, {"model", "model"}, {"cache_size", "30"}, {"created_at", "then"}, {"updated_at", "then"},
                         {"segments", ""}};
    for (const auto& [name, value] : snapshot.identity.fields()) metadata.emplace_back("identity." + name, value);
    metadata.emplace_back("identity.tokenizer", "t0");
    metadata.emplace_back("identity.chat_template", "m0");
    for (const auto& [key, value] : user) metadata.emplace_back("user." + key, value);
    std::vector<std::string> checksums = run_checksums(snapshot.layout, 30, {&snapshot.tail.bytes, 1});
    checksums.push_back(hash_hex(token_bytes(snapshot.tokens)));
    std::string file = encode_torpor_header({.kind = "agent", .version = 1, .metadata = metadata, .rows = 30, .n_tokens = 30,
                                             .checksums = checksums}, snapshot.layout);
    for (const auto bytes : {snapshot.tail.bytes, token_bytes(snapshot.tokens)}) {
      file.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    }
    testing::write_all(directory_.path() / (id + ".safetensors"), file);
  }
  AgentRecord record_of(const std::string& id) {
    return decode_record({store_.agent_messages(id), info(id).record}, 30);
  }
  AgentInfo info(const std::string& id) { return store_.agent_info(id); }

  testing::TemporaryDirectory directory_;
  Store store_{directory_.path()};
};

const UserMetadata kOld = {{"messages", R"([{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}])"},
                           {"message_ends", "10,20"},
                           {"history_tokens", "25"},
                           {"pinned", "true"},
                           {"note", "mine"}};

TEST_F(Record, ComesBackAsItWasBesideTheCallersKeysOfTheSameNames) {
  AgentRecord record;
  record.messages = {{{"user", "Hi"}, 10}, {{"assistant", "Hello"}, 20}};
  record.history = 25;
  record.shortest_cut = 7;
  record.pinned = true;
  const UserMetadata user = {{"messages", "hi"}, {"pinned", "no"}};
  save("a", user, encode_record(record, 30));
  for (const AgentInfo& found : {info("a"), store_.list_cached_agents().at(0)}) {
    EXPECT_EQ(found.user, user);
    const AgentRecord again = decode_record({store_.agent_messages("a"), found.record}, 30);
    ASSERT_EQ(again.messages.size(), 2u);
    EXPECT_EQ(again.messages[1].content, "Hello");
    EXPECT_EQ(again.messages[1].end, 20);
    EXPECT_EQ(again.history, 25u);
    EXPECT_EQ(again.shortest_cut, 7u);
    EXPECT_TRUE(again.pinned && is_pinned(found));
  }
}

TEST_F(Record, HasWhatMessagesHaveAndWhatTheyWereRenderedWith) {
  AgentRecord record;
  const Message call{"assistant", "", "", "Where?", {{"weather", R"({"place":"Skye","days":2})", "call_1"}}};
  const Message result{"tool", "rain", "weather", "", {}, "call_1"};
  record.messages = {{{"user", "Hi"}, 10}, {call, 20}, {result, 25}};
  record.variables = R"({"tools":[{"b":1,"a":2}],"enable_thinking":false})";
  record.history = 30;
  save("a", {}, encode_record(record, 30));
  AgentRecord again = record_of("a");
  ASSERT_EQ(again.messages.size(), 3u);
  EXPECT_EQ(Message(again.messages[1]), call);
  EXPECT_EQ(Message(again.messages[2]), result);
  EXPECT_EQ(again.variables, record.variables);
  again.cut(10);
  EXPECT_EQ(again.variables, record.variables);
  again.cut(9);
  EXPECT_EQ(again.variables, "");
}

TEST_F(Record, OfTheEnginesEarlierFilesIsReadAndKeptByWhatIsMadeOfThem) {
  write_old("old", kOld);
  fork_agent(store_, "old", "fork");
  store_.rename_agent_cache("old", "renamed");
  for (const std::string id : {"renamed", "fork"}) {
    EXPECT_EQ(info(id).user, (UserMetadata{{"note", "mine"}})) << id;
    const AgentRecord record = record_of(id);
    ASSERT_EQ(record.messages.size(), 2u) << id;
    EXPECT_EQ(record.messages[1].end, 20) << id;
    EXPECT_EQ(record.history, 25u) << id;
    EXPECT_EQ(record.pinned, id == "renamed");  // a fork is not pinned
  }
}

TEST_F(Record, IsNotTakenFromSomebodyElsesKeys) {
  UserMetadata described = kOld;
  described.emplace_back("mlx_lm.cache", "{}");
  const UserMetadata half = {{"messages", "hi"}, {"pinned", "true"}};
  write_old("python", described);
  write_old("half", half);
  EXPECT_EQ(info("half").user, half);
  EXPECT_EQ(info("python").user.size(), described.size());
  for (const std::string id : {"python", "half"}) {
    EXPECT_TRUE(info(id).record.empty()) << id;
    EXPECT_FALSE(is_pinned(info(id))) << id;
    EXPECT_TRUE(record_of(id).messages.empty()) << id;
  }
}

TEST_F(Record, CanNotBeWrittenByACaller) {
  for (const char* key : {"torpor.pinned", "torpor.", "torpor.anything"}) {
    EXPECT_EQ(code_of([&] { save("a", {{key, "true"}}); }), ErrorCode::kInvalidArgument) << key;
  }
  EXPECT_FALSE(store_.contains("a"));
  save("a", {{"torpor", "fine"}});
  EXPECT_EQ(code_of([&] { store_.copy_agent_cache("a", "b", {.user = UserMetadata{{"torpor.pinned", "true"}}}); }),
            ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace torpor
