#include "base/safetensors.h"

#include <set>

#include "base/json.h"
#include "store_fixture.h"

namespace torpor::testing {
namespace {

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

std::string with_length(const std::string& json) {
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) file[i] = char(uint64_t(json.size()) >> (8 * i));
  return file + json;
}

SafetensorsHeader parse(const std::string& json, uint64_t data_bytes) {
  const std::string file = with_length(json);
  return parse_safetensors_header(bytes_of(file), file.size() + data_bytes, "f.safetensors");
}

TEST(Safetensors, RoundTrip) {
  std::vector<SafetensorsTensor> tensors = {{"a", "F16", {2, 3}, 0, 0}, {"empty", "I64", {0, 7}, 0, 0}, {"b\"ü", "F32", {}, 0, 0}};
  const std::vector<std::pair<std::string, std::string>> metadata = {{"z", "1"}, {"a", "quote \" and \n line"}, {"u", "ü"}};
  const std::string encoded = encode_safetensors_header(tensors, metadata);
  EXPECT_EQ(encoded.size() % 64, 0u);
  EXPECT_EQ(encoded[8], '{');
  const auto header = parse_safetensors_header(bytes_of(encoded), encoded.size() + 16, "f");
  EXPECT_EQ(header.data_start, encoded.size());
  EXPECT_EQ(header.metadata, metadata);
  ASSERT_EQ(header.tensors.size(), 3u);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[0].shape, (std::vector<uint64_t>{2, 3}));
  EXPECT_EQ(header.tensors[2].begin, 12u);
  EXPECT_EQ(header.tensors[2].end, 16u);
  EXPECT_EQ(header.find("empty")->size(), 0u);
  EXPECT_EQ(header.find("none"), nullptr);
  EXPECT_EQ(*header.metadata_value("u"), "ü");
}

TEST(Safetensors, ReadsWhatOthersWrite) {
  // Any order of keys, JSON white space, no metadata.
  const auto header = parse(R"({ "b":{"shape":[2],"data_offsets":[4,8],"dtype":"BF16"},
                              "a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]} }   )", 8);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[1].name, "b");
  EXPECT_TRUE(parse("{}", 0).tensors.empty());
}

TEST(Safetensors, EveryViolationIsCorruptionWithASentenceOfItsOwn) {
  const std::string t = R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  struct Case {
    const char* says;
    std::string json;
    uint64_t data;
  };
  const std::vector<Case> cases = {
      {"does not begin with '{'", " {}", 0},
      {"does not begin with '{'", "", 0},
      {"not valid JSON", "{\"a\":", 0},
      {"not valid JSON", t + "}x", 4},
      {"not valid JSON", t + "}\xff", 4},
      {"not valid JSON", "{\"\xff\":1}", 4},
      {"the tensor name 'a' occurs twice", t + R"(,"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})", 8},
      {"the tensor name '__metadata__' occurs twice", R"({"__metadata__":{},"__metadata__":{}})", 0},
      {"the metadata key 'k' occurs twice", R"({"__metadata__":{"k":"1","k":"2"}})", 0},
      {"its metadata 'k' is a number, not a text", R"({"__metadata__":{"k":1}})", 0},
      {"its metadata 'k' is an object, not a text", R"({"__metadata__":{"k":{}}})", 0},
      {"its header has null where", R"({"__metadata__":null})", 0},
      {"its header has an array where", R"({"a":[]})", 0},
      {"its header has a text where", R"({"a":"b"})", 0},
      {"has its field 'dtype' twice", R"({"a":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4},
      {"has an unknown field 'strides'", R"({"a":{"dtype":"U8","strides":1,"shape":[4],"data_offsets":[0,4]}})", 4},
      {"lacks its dtype, shape or data offsets", R"({"a":{"dtype":"U8","shape":[4]}})", 4},
      {"has a number as its dtype", R"({"a":{"dtype":8,"shape":[4],"data_offsets":[0,4]}})", 4},
      {"has a text as its shape", R"({"a":{"dtype":"U8","shape":"4","data_offsets":[0,4]}})", 4},
      {"the shape of tensor 'a' has a negative number in it", R"({"a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}})", 4},
      {"the shape of tensor 'a' has a fraction", R"({"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}})", 4},
      {"the shape of tensor 'a' has a fraction or a number beyond 64 bits",
       R"({"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,4]}})", 4},
      {"the shape of tensor 'a' has an array in it", R"({"a":{"dtype":"U8","shape":[[4]],"data_offsets":[0,4]}})", 4},
      {"does not have two data offsets", R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0]}})", 4},
      {"does not have two data offsets", R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4,4]}})", 4},
      {"the data offsets of tensor 'a' have a boolean in them", R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[true,4]}})", 4},
      {"has the unknown dtype 'Q4'", R"({"a":{"dtype":"Q4","shape":[4],"data_offsets":[0,4]}})", 4},
      {"ends before it begins", R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}})", 4},
      {"is too large to exist", R"({"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0},
      {"has 4 bytes of data, its shape needs 5", R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}})", 4},
      {"there is a hole in the data before tensor 'a'", R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}})", 5},
      {"overlaps that of another", t + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", 6},
      {"overlaps that of another", t + R"(,"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 4},
      {"it was cut short: 1 bytes of data are missing", t + "}", 3},
      {"1 bytes follow the last tensor", t + "}", 5},
  };
  for (const auto& c : cases) {
    std::string message;
    EXPECT_EQ(code_of([&] { parse(c.json, c.data); }, &message), ErrorCode::kCorruption) << c.json;
    EXPECT_NE(message.find(c.says), std::string::npos) << c.json << "\n" << message;
    EXPECT_NE(message.find("'f.safetensors'"), std::string::npos) << message;
  }
}

TEST(Safetensors, TheLengthIsCheckedBeforeItIsBelieved) {
  std::string message;
  auto parse_raw = [&](std::string file, uint64_t size) {
    return code_of([&] { parse_safetensors_header(bytes_of(file), size, "f"); }, &message);
  };
  EXPECT_EQ(parse_raw("1234567", 7), ErrorCode::kCorruption);
  EXPECT_NE(message.find("too short to hold the length"), std::string::npos);
  EXPECT_EQ(parse_raw(std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8), ~0ull), ErrorCode::kCorruption);
  EXPECT_NE(message.find("more than the format allows"), std::string::npos);
  EXPECT_EQ(parse_raw(std::string("\x09\0\0\0\0\0\0\0{}", 10), 10), ErrorCode::kCorruption);
  EXPECT_NE(message.find("longer than the file"), std::string::npos);
  EXPECT_EQ(parse_raw(std::string("\x02\0\0\0\0\0\0\0", 8), 10), ErrorCode::kCorruption);
  EXPECT_NE(message.find("could not be read whole"), std::string::npos);
}

TEST(Safetensors, ItsJsonIsThatOfAnotherParser) {
  const std::string good = R"({"__metadata__": {"k\u00e9\n": "\ud83d\ude00 \u00fc", "":"/"},)" "\r\n\t"
                           R"( "a" :{"dtype":"U8","shape":[2,10],"data_offsets":[0,20]},"b":{"dtype":"F16","shape":[],"data_offsets":[20,22]}} )";
  int taken = 0, refused = 0;
  for (size_t i = 0; i <= good.size(); ++i) {
    for (int byte = -2; byte < 256; ++byte) {
      std::string json = good;
      if (byte == -2) json.erase(i);
      if (byte == -1) json.erase(i, 1);
      if (byte >= 0) json.insert(i, 1, char(byte));
      if (!json.starts_with('{')) continue;
      // The other parser ends at a NUL as at the end.
      const bool valid = nlohmann::json::accept(json) && json.find('\0') == std::string::npos;
      try {
        const SafetensorsHeader header = parse(json, 22);
        ++taken;
        ASSERT_TRUE(valid) << json;
        const nlohmann::json other = parse_json<nlohmann::json>(json);
        ASSERT_EQ(header.metadata.size(), other.contains("__metadata__") ? other["__metadata__"].size() : 0) << json;
        for (const auto& [key, value] : header.metadata) ASSERT_EQ(other["__metadata__"].at(key), value) << json;
        for (const auto& tensor : header.tensors) {
          ASSERT_EQ(other.at(tensor.name).at("shape"), tensor.shape) << json;
          ASSERT_EQ(other.at(tensor.name).at("dtype"), tensor.dtype) << json;
        }
      } catch (const Error& error) {
        ++refused;
        ASSERT_EQ(error.code(), ErrorCode::kCorruption);
        ASSERT_FALSE(valid && std::string(error.what()).find("is not valid JSON") != std::string::npos) << json;
      }
    }
  }
  EXPECT_GT(taken, 500);
  EXPECT_GT(refused, 10000);
}

TEST(Safetensors, DeepNestingCostsNothing) {
  for (const std::string& open : {std::string("["), std::string("{\"a\":")}) {
    std::string json = "{\"a\":";
    for (int i = 0; i < 1'000'000; ++i) json += open;
    EXPECT_EQ(code_of([&] { parse(json, 0); }), ErrorCode::kCorruption);
  }
}

TEST(Safetensors, RefusesToWriteWhatNobodyCouldRead) {
  std::vector<SafetensorsTensor> none;
  EXPECT_EQ(code_of([&] { encode_safetensors_header(none, {{"k", "\xff"}}); }), ErrorCode::kInvalidArgument);
  std::vector<SafetensorsTensor> huge = {{"a", "F64", {1ull << 62}, 0, 0}};
  EXPECT_EQ(code_of([&] { encode_safetensors_header(huge, {}); }), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code_of([&] { encode_safetensors_header(none, {{"k", std::string(100'000'001, 'x')}}); }),
            ErrorCode::kResourceExhausted);
}

}  // namespace
}  // namespace torpor::testing
