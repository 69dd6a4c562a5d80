/// The bytes on disk are those of docs/format.md: a change to them is a change of the format.

#include "fault_env.h"
#include "sign_header.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

class FixedClock final : public FaultEnv {
 public:
  using FaultEnv::FaultEnv;
  std::chrono::system_clock::time_point now() override {
    return std::chrono::system_clock::time_point(std::chrono::seconds(1795498200));
  }
  std::string random_id() override { return "000102030405060708090a0b0c0d0e0f"; }
};

std::string hex(const std::string& bytes) {
  std::string text;
  char byte[8];
  for (size_t i = 0; i < bytes.size(); ++i) {
    std::snprintf(byte, sizeof byte, i == 0 ? "%02x" : " %02x", unsigned(static_cast<unsigned char>(bytes[i])));
    text += byte;
  }
  return text;
}

uint64_t length_of(const std::string& file) {
  uint64_t length = 0;
  for (int i = 0; i < 8; ++i) length |= uint64_t(static_cast<unsigned char>(file[i])) << (8 * i);
  return length;
}

/// JSON as the page shows it: without the padding.
std::string json_of(const std::string& file) {
  const std::string json = file.substr(8, length_of(file));
  return json.substr(0, json.find_last_not_of(' ') + 1);
}

class StoreFormat : public ::testing::Test {
 protected:
  void expect_on_page(const std::string& text) {
    EXPECT_NE(page_.find("\n" + text + "\n"), std::string::npos) << "not in docs/format.md:\n" << text;
  }
  void expect_file_on_page(const std::string& file) {
    expect_on_page(hex(file.substr(0, 8)));
    expect_on_page(json_of(file));
    expect_on_page(hex(file.substr(8 + length_of(file))));
  }
  /// The text of the page's code block number `i` behind `heading`.
  std::string block(const std::string& heading, int i) const {
    size_t at = page_.find("\n" + heading + "\n");
    for (int fence = 0; fence <= 2 * i; ++fence) at = page_.find("\n```\n", at + 1);
    return page_.substr(at + 5, page_.find("\n```\n", at + 1) - at - 5);
  }

  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  const std::string page_ = read_all(fs::path(TORPOR_SOURCE_DIR) / "docs/format.md");
};

TEST_F(StoreFormat, ThePagesExampleIsWhatIsWritten) {
  FixedClock env(root_, directory_.path() / "attic");
  Store store(root_, &env);
  AgentNotes notes{{{R"({"role":"user","content":"hi"})", 0, 3}}, {{"pinned", "true"}}};
  store.save_agent_cache("tiny", make_snapshot(3), "demo/tiny", {{"note", "hello"}}, Durability::kFull, notes);
  expect_file_on_page(read_all(root_ / "tiny.safetensors"));
  // One token more leaves these three where they are.
  notes.messages.push_back({R"({"role":"assistant","content":"ho"})", 3, 4});
  store.save_agent_cache("tiny", make_snapshot(4), "demo/tiny", {{"note", "hello"}}, Durability::kFull, notes);
  expect_file_on_page(read_all(root_ / "tiny.safetensors"));
  for (const auto& entry : fs::directory_iterator(root_ / "parts")) expect_on_page("parts/" + entry.path().filename().string());
  // The segment's name too: equal in every process and on every machine.
  store.save_agent_cache("longer", make_snapshot(256), "demo/tiny");
  const auto info = store.agent_info("longer");
  ASSERT_EQ(info.segments.size(), 1u);
  const std::string name = info.segments[0];
  expect_on_page("segments/" + name.substr(0, 2) + "/" + name + ".safetensors");
  expect_on_page(json_of(read_all(root_ / "segments" / name.substr(0, 2) / (name + ".safetensors"))));
}

TEST_F(StoreFormat, ThePagesExampleOfVersion1IsRead) {
  const auto bytes_of = [](const std::string& text) {
    std::string bytes;
    for (size_t at = 0; at < text.size(); at += 3) bytes += char(std::stoi(text.substr(at, 2), nullptr, 16));
    return bytes;
  };
  const std::string heading = "### Example of version 1";
  std::string file = bytes_of(block(heading, 0)) + block(heading, 1);
  file.resize(8 + length_of(file), ' ');
  file += bytes_of(block(heading, 2));
  fs::create_directories(root_);
  write_all(root_ / "tiny.safetensors", file);
  const auto loaded = Store(root_).load_agent_cache("tiny");
  EXPECT_TRUE(same(loaded.snapshot, make_snapshot(3)));
  EXPECT_EQ(loaded.info.user, (UserMetadata{{"note", "hello"}}));
  EXPECT_EQ(loaded.info.lineage.old_names, (ConversationIdentity{"t0", "m0"}));
  // An agent of that kind names its segments as that version did.
  KvSnapshot old = make_snapshot(256);
  old.lineage = loaded.info.lineage;
  Store(root_).save_agent_cache("longer", old, "demo/tiny");
  const std::string name = Store(root_).agent_info("longer").segments.at(0);
  expect_on_page("segments/" + name.substr(0, 2) + "/" + name + ".safetensors");
  expect_on_page(json_of(read_all(root_ / "segments" / name.substr(0, 2) / (name + ".safetensors"))));
}

/// The rule of versions 1 and 2 for a file of another version was that it is kIncompatible, in one sentence.
TEST_F(StoreFormat, AVersionToComeIsRefusedInOneSentence) {
  Store(root_).save_agent_cache("tiny", make_snapshot(3), "demo/tiny");
  std::string file = read_all(root_ / "tiny.safetensors");
  const std::string version = "\"format_version\":\"3\"";
  ASSERT_NE(file.find(version), std::string::npos);
  file.replace(file.find(version), version.size(), "\"format_version\":\"4\"");
  sign(std::as_writable_bytes(std::span(file)));
  write_all(root_ / "tiny.safetensors", file);
  std::string message;
  EXPECT_EQ(code_of([&] { Store(root_).load_agent_cache("tiny"); }, &message), ErrorCode::kIncompatible);
  EXPECT_NE(message.find("has format version 4, this Torpor reads 3 and older; use a newer one."), std::string::npos) << message;
  // An order of elements that is reserved is refused likewise.
  const std::string order = ":rows,layer";
  file = read_all(root_ / "tiny.safetensors");
  file.replace(file.find("\"format_version\":\"4\""), version.size(), version);
  file.replace(file.find(order), order.size(), ":r0ws,layer");
  sign(std::as_writable_bytes(std::span(file)));
  write_all(root_ / "tiny.safetensors", file);
  EXPECT_EQ(code_of([&] { Store(root_).load_agent_cache("tiny"); }, &message), ErrorCode::kIncompatible);
  EXPECT_NE(message.find("'r0ws'"), std::string::npos) << message;
}

}  // namespace
}  // namespace torpor::testing
