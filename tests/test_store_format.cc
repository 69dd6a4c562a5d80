/// The bytes on disk are those of docs/format.md: a change to them is a change of the format.

#include "fault_env.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

class FixedClock final : public FaultEnv {
 public:
  using FaultEnv::FaultEnv;
  std::chrono::system_clock::time_point now() override {
    return std::chrono::system_clock::time_point(std::chrono::seconds(1795498200));
  }
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

TEST(StoreFormat, ThePagesExampleIsWhatIsWritten) {
  TemporaryDirectory directory;
  FixedClock env(directory.path() / "store", directory.path() / "attic");
  Store store(directory.path() / "store", &env);
  store.save_agent_cache("tiny", make_snapshot(3), "demo/tiny", {{"note", "hello"}});
  store.save_agent_cache("longer", make_snapshot(256), "demo/tiny");
  const std::string page = read_all(fs::path(TORPOR_SOURCE_DIR) / "docs/format.md");
  auto expect_on_page = [&](const std::string& text) {
    EXPECT_NE(page.find("\n" + text + "\n"), std::string::npos) << "not in docs/format.md:\n" << text;
  };
  const std::string agent = read_all(directory.path() / "store/tiny.safetensors");
  expect_on_page(hex(agent.substr(0, 8)));
  expect_on_page(json_of(agent));
  expect_on_page(hex(agent.substr(8 + length_of(agent))));
  // The segment's name too: equal in every process and on every machine.
  const auto info = store.agent_info("longer");
  ASSERT_EQ(info.segments.size(), 1u);
  const std::string name = info.segments[0];
  expect_on_page("segments/" + name.substr(0, 2) + "/" + name + ".safetensors");
  expect_on_page(json_of(read_all(directory.path() / "store/segments" / name.substr(0, 2) / (name + ".safetensors"))));
}

}  // namespace
}  // namespace torpor::testing
