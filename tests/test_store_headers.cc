/// Headers of segments that are read one after another are taken for exactly what each would be parsed to alone.

#include <sstream>

#include "sign_header.h"
#include "store/segment_headers.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

/// Everything that a parse gives, or the error.
std::string described(const std::function<SegmentFile()>& parse) {
  try {
    const SegmentFile segment = parse();
    const TorporFile& file = segment.file;
    std::string text = segment.parent + "|" + segment.lineage + "|" + segment.variant + "|" + file.kind + "|" + file.checksum +
                       "|" + join(file.checksums) + "|" + layout_digest(file.layout, file.version) + "|" + std::to_string(file.rows) + "|" +
                       std::to_string(file.n_tokens) + "|" + std::to_string(file.header.data_start);
    std::ostringstream rest;
    for (const auto& [key, value] : file.header.metadata) rest << "|" << key << "=" << value;
    for (const auto& tensor : file.header.tensors) {
      rest << "|" << tensor.name << tensor.dtype << tensor.begin << "-" << tensor.end;
      for (const uint64_t n : tensor.shape) rest << "," << n;
    }
    return text + rest.str();
  } catch (const Error& error) {
    return std::to_string(int(error.code())) + ": " + error.what();
  }
}

class StoreHeaders : public ::testing::Test {
 protected:
  StoreHeaders() {
    const auto result = Store(root_).save_agent_cache("a", make_snapshot(4 * 256), "m");
    for (const auto& name : result.segments) {
      const std::string text = read_all(root_ / "segments" / name.substr(0, 2) / (name + ".safetensors"));
      const auto bytes = std::as_bytes(std::span(text));
      files_.emplace_back(bytes.begin(), bytes.end());
    }
  }
  static std::string alone(const std::vector<std::byte>& file, uint64_t size) {
    return described([&] { return parse_segment_file(file, size, "f"); });
  }
  static std::string alone(const std::vector<std::byte>& file) { return alone(file, file.size()); }
  static std::string after(SegmentHeaders& headers, const std::vector<std::byte>& file, uint64_t size) {
    return described([&] { return headers.parse(file, size, "f"); });
  }
  static std::string after(SegmentHeaders& headers, const std::vector<std::byte>& file) { return after(headers, file, file.size()); }

  TemporaryDirectory directory_;
  fs::path root_ = directory_.path() / "store";
  std::vector<std::vector<std::byte>> files_;
};

TEST_F(StoreHeaders, OneAfterAnother) {
  SegmentHeaders headers;
  for (const auto& file : files_) EXPECT_EQ(after(headers, file), alone(file));
  for (const auto& file : files_) EXPECT_EQ(after(headers, file), alone(file));
}

TEST_F(StoreHeaders, EveryChangeOfAByteMeansTheSame) {
  SegmentHeaders headers;
  after(headers, files_[1]);
  const size_t header_size = size_t(safetensors_data_start(files_[2], files_[2].size(), "f"));
  for (const bool with_checksum : {false, true}) {
    size_t sound = 0;
    for (size_t at = 0; at < header_size; ++at) {
      for (const int mask : {1, 2, 4, 8, 16, 32, 64}) {
        auto file = files_[2];
        file[at] ^= std::byte(mask);
        if (with_checksum) sign(file);
        const std::string expected = alone(file);
        ASSERT_EQ(after(headers, file), expected) << at << " " << mask;
        sound += expected.find("damaged") == std::string::npos;
      }
    }
    // With the right checksum some changes are good headers: another parent, for one.
    EXPECT_EQ(sound > 0, with_checksum);
  }
}

TEST_F(StoreHeaders, ASizeOrLengthOfItsOwn) {
  SegmentHeaders headers;
  after(headers, files_[1]);
  for (const int64_t more : {-5, -1, 1, 64}) {
    EXPECT_EQ(after(headers, files_[2], uint64_t(int64_t(files_[2].size()) + more)), alone(files_[2], uint64_t(int64_t(files_[2].size()) + more)));
  }
  auto cut = files_[2];
  for (const size_t size : {0, 7, 8, 100, 300}) {
    cut.resize(size);
    EXPECT_EQ(after(headers, cut), alone(cut));
  }
}

TEST_F(StoreHeaders, OtherLayoutsAndVariants) {
  SegmentHeaders headers;
  after(headers, files_[1]);
  // Other rows of the same tokens are kept as a variant; another layout has another header.
  auto other = make_snapshot(4 * 256);
  for (auto& run : other.sealed) const_cast<std::byte&>(run->bytes()[0]) ^= std::byte{1};
  const fs::path wide = directory_.path() / "wide";
  const std::pair<fs::path, SaveResult> saves[] = {
      {root_, Store(root_).save_agent_cache("b", other, "m")},
      {wide, Store(wide).save_agent_cache("a", make_snapshot(4 * 256, small_layout(KvDtype::kF32, 3, 1, 4)), "m")}};
  for (const auto& [root, saved] : saves) {
    for (const auto& name : saved.segments) {
      const std::string text = read_all(root / "segments" / name.substr(0, 2) / (name + ".safetensors"));
      const auto bytes = std::as_bytes(std::span(text));
      const std::vector<std::byte> file(bytes.begin(), bytes.end());
      EXPECT_EQ(after(headers, file), alone(file));
      SegmentHeaders fresh;
      after(fresh, file);
      for (const auto& next : files_) EXPECT_EQ(after(fresh, next), alone(next));
    }
  }
}

}  // namespace
}  // namespace torpor::testing
