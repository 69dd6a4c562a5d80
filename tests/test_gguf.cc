/// GGUF files: the container, and the blocks of its tensors against the package gguf (scripts/make-goldens-gguf).

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <string>

#include "base/gguf.h"
#include "base/gguf_ends.h"
#include "guarded_memory.h"
#include "kernels/compute.h"
#include "kernels/gguf_blocks.h"
#include "kernels/packed_linear.h"
#include "torpor/error.h"

namespace torpor::testing {
namespace {

namespace fs = std::filesystem;

const fs::path kBlocks = TORPOR_SOURCE_DIR "/tests/goldens/gguf/blocks.gguf";

/// Parsed from memory that ends where the file does, so that a sanitizer sees a read past it.
std::string error_of(const std::string& bytes) {
  const std::vector<std::byte> exact(reinterpret_cast<const std::byte*>(bytes.data()),
                                     reinterpret_cast<const std::byte*>(bytes.data()) + bytes.size());
  try {
    GgufFile::parse(exact, "f.gguf");
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

/// A file put together by hand.
class Writer {
 public:
  template <typename T>
  Writer& put(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Writer& text(const std::string& text) {
    put(uint64_t(text.size()));
    bytes_ += text;
    return *this;
  }
  Writer& head(uint64_t tensors, uint64_t values, uint32_t version = 3) {
    bytes_ = "GGUF";
    return put(version).put(tensors).put(values);
  }
  Writer& tensor(const std::string& name, std::vector<uint64_t> dims, uint32_t type, uint64_t offset) {
    text(name).put(uint32_t(dims.size()));
    for (const uint64_t dim : dims) put(dim);
    return put(type).put(offset);
  }
  std::string padded(size_t data) const {
    std::string file = bytes_;
    file.resize((file.size() + 31) / 32 * 32 + data);
    return file;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

TEST(Gguf, MetadataAreReadAsTheyWereWritten) {
  const GgufModel model = GgufModel::open(kBlocks);
  const GgufFile& file = model.metadata();
  EXPECT_EQ(file.text("general.architecture"), "llama");
  EXPECT_EQ(file.text("text"), "ein Wörtchen");
  EXPECT_EQ(file.integer("numbers.u16"), 65535);
  EXPECT_EQ(file.integer("numbers.i8"), -3);
  EXPECT_EQ(file.number("numbers.f64"), 0.1);
  EXPECT_EQ(file.number("numbers.u64"), 0x1p63);
  EXPECT_EQ(file.flag("flag"), true);
  EXPECT_EQ(file.texts("texts"), (std::vector<std::string_view>{"a", "", "ü"}));
  EXPECT_EQ(file.numbers("numbers"), (std::vector<double>{1, -2, 3}));
  EXPECT_EQ(file.numbers("numbers.i8"), (std::vector<double>{-3}));
  EXPECT_TRUE(file.has("nested"));
  EXPECT_EQ(file.text("absent"), std::nullopt);
  EXPECT_TRUE(file.texts("absent").empty());
  EXPECT_THROW(file.integer("numbers.u64"), Error);  // past 2^63
  EXPECT_THROW(file.integer("numbers.f64"), Error);
  EXPECT_THROW(file.text("flag"), Error);
  EXPECT_THROW(file.flag("text"), Error);
  EXPECT_THROW(file.number("numbers"), Error);
  EXPECT_THROW(file.numbers("nested"), Error);
  EXPECT_THROW(file.texts("numbers"), Error);
}

TEST(Gguf, BlocksOfEveryTypeStandForWhatThePackageGgufSays) {
  const GgufModel model = GgufModel::open(kBlocks);
  int seen = 0;
  for (const GgufTensor& tensor : model.metadata().tensors()) {
    const GgufTensor* expected = model.find(tensor.name + ".values");
    if (expected == nullptr) continue;
    ++seen;
    ASSERT_EQ(tensor.shape, (std::vector<int64_t>{2, 512}));
    std::vector<float> values(1024), want(1024);
    std::memcpy(want.data(), expected->data.data(), expected->data.size());
    kernels::dequantize_blocks(tensor.type->type, tensor.data.data(), 1024, values.data());
    for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], want[i]) << tensor.name << " " << i;
  }
  EXPECT_EQ(seen, 26);
}

TEST(Gguf, TensorsAreFoundByNameInWhateverOrderTheyAre) {
  Writer writer;
  writer.head(3, 0).tensor("b", {8}, 0, 0).tensor("c", {4}, 0, 64).tensor("a", {2}, 0, 32);
  const std::string bytes = writer.padded(96);
  const auto file = GgufFile::parse(std::as_bytes(std::span(bytes)), "f.gguf");
  std::string names;
  for (const GgufTensor& tensor : file.tensors()) {
    names += tensor.name;
    EXPECT_EQ(tensor.data.size(), tensor.name == "a" ? 8u : tensor.name == "b" ? 32u : 16u);
  }
  EXPECT_EQ(names, "abc");
}

TEST(Gguf, AFileCutAnywhereIsDamaged) {
  Writer writer;
  writer.head(2, 3).text("a").put(uint32_t(4)).put(uint32_t(7));
  writer.text("b").put(uint32_t(9)).put(uint32_t(8)).put(uint64_t(2)).text("x").text("yz");
  writer.text("c").put(uint32_t(9)).put(uint32_t(9)).put(uint64_t(1)).put(uint32_t(0)).put(uint64_t(3));
  writer.put('1').put('2').put('3');
  writer.tensor("t", {32, 2}, 8, 0).tensor("u", {8}, 0, 96);
  const std::string file = writer.padded(128);
  ASSERT_EQ(error_of(file), "");
  for (size_t size = 0; size < file.size(); ++size) {
    const std::string error = error_of(file.substr(0, size));
    EXPECT_TRUE(error.starts_with("'f.gguf' is damaged: ")) << size << ": " << error;
  }
}

TEST(Gguf, EachLieHasASentence) {
  const uint64_t huge = uint64_t(1) << 62;
  const auto value = [&](uint32_t kind) { return Writer().head(0, 1).text("k").put(kind); };
  const std::vector<std::pair<const char*, std::string>> cases = {
      {"it does not begin with GGUF", "GGML" + std::string(20, '\0')},
      {"version 1", Writer().head(0, 0, 1).bytes()},
      {"version 4", Writer().head(0, 0, 4).bytes()},
      {"big-endian", Writer().head(0, 0, 0x03000000).bytes()},
      {"it ends within its metadata", Writer().head(0, huge).bytes()},
      {"it ends within the list of its tensors", Writer().head(huge, 0).bytes()},
      {"it ends within its metadata", Writer().head(0, 1).put(huge).bytes()},
      {"it ends within its metadata", value(8).put(~uint64_t(0)).bytes()},
      {"a value of type 13", value(13).bytes()},
      {"a list of 18446744073709551615 values", value(9).put(uint32_t(4)).put(~uint64_t(0)).bytes()},
      {"it ends within its metadata", value(9).put(uint32_t(8)).put(huge).bytes()},
      {"it ends within its metadata", value(9).put(uint32_t(0)).put(huge).bytes()},
      {"'k' twice", Writer().head(0, 2).text("k").put(7u).put('x').text("k").put(7u).put('x').bytes()},
      {"has 5 dimensions", Writer().head(1, 0).tensor("t", {1, 1, 1, 1, 1}, 0, 0).padded(64)},
      {"more elements than can be counted", Writer().head(1, 0).tensor("t", {huge, huge}, 0, 0).padded(64)},
      {"more elements than can be counted", Writer().head(1, 0).tensor("t", {huge * 3}, 0, 0).padded(64)},
      {"ggml's type 16", Writer().head(1, 0).tensor("t", {256}, 16, 0).padded(256)},
      {"not whole blocks of Q4_K", Writer().head(1, 0).tensor("t", {32}, 12, 0).padded(256)},
      {"ends past the end of the file", Writer().head(1, 0).tensor("t", {17}, 0, 0).padded(64)},
      {"ends past the end of the file", Writer().head(1, 0).tensor("t", {1}, 0, ~uint64_t(31)).padded(64)},
      {"begins at byte 4,", Writer().head(1, 0).tensor("t", {1}, 0, 4).padded(64)},
      {"t is there twice", Writer().head(2, 0).tensor("t", {1}, 0, 0).tensor("t", {1}, 0, 32).padded(64)},
      {"general.alignment is 3", Writer().head(1, 1).text("general.alignment").put(uint32_t(4)).put(uint32_t(3))
                                     .tensor("t", {1}, 0, 0).padded(64)},
  };
  for (const auto& [says, file] : cases) {
    EXPECT_NE(error_of(file).find(says), std::string::npos) << says << ": " << error_of(file);
  }
  std::string deep = value(9).bytes();
  for (int i = 0; i < 9; ++i) {
    const uint32_t list = 9;
    const uint64_t one = 1;
    deep.append(reinterpret_cast<const char*>(&list), 4).append(reinterpret_cast<const char*>(&one), 8);
  }
  EXPECT_NE(error_of(deep).find("too deep"), std::string::npos) << error_of(deep);
}

/// Of a file that has these tokens and types, and the id of one key.
std::vector<std::string> ends_of(const std::vector<std::pair<std::string, int32_t>>& tokens,
                                 const std::string& key = "eos", uint32_t id = 0) {
  Writer writer;
  writer.head(0, 3).text("tokenizer.ggml." + key + "_token_id").put(uint32_t(4)).put(id);
  writer.text("tokenizer.ggml.tokens").put(uint32_t(9)).put(uint32_t(8)).put(uint64_t(tokens.size()));
  for (const auto& [text, type] : tokens) writer.text(text);
  writer.text("tokenizer.ggml.token_type").put(uint32_t(9)).put(uint32_t(5)).put(uint64_t(tokens.size()));
  for (const auto& [text, type] : tokens) writer.put(type);
  const std::string bytes = writer.padded(0);
  const auto file = GgufFile::parse(std::as_bytes(std::span(bytes)), "f.gguf");
  std::vector<std::string> texts;
  for (const int32_t end : gguf_ends(file).ids) texts.push_back(tokens.at(size_t(end)).first);
  return texts;
}

TEST(Gguf, TurnsEndWhereLlamaCppEndsThem) {
  constexpr int32_t kNormal = 1, kControl = 3, kUserDefined = 4;
  using Texts = std::vector<std::string>;
  // Gemma 4, with the types of its file.
  EXPECT_EQ(ends_of({{"<pad>", kControl}, {"<eos>", kControl}, {"<|tool_response>", kUserDefined},
                     {"<turn|>", kControl}, {"</s>", kNormal}, {"<|turn>", kControl}}, "eos", 1),
            (Texts{"<eos>", "<|tool_response>", "<turn|>"}));
  EXPECT_EQ(ends_of({{"a", kNormal}, {"<|tool_response>", kUserDefined}, {"</s>", kControl}}, "bos"),
            (Texts{"<|tool_response>"}));
  // A type says nothing but of </s>, which HTML has too.
  EXPECT_EQ(ends_of({{"a", kNormal}, {"<end_of_turn>", kNormal}, {"</s>", kNormal}}),
            (Texts{"a", "<end_of_turn>"}));
  EXPECT_EQ(ends_of({{"a", kNormal}, {"</s>", kControl}}), (Texts{"a", "</s>"}));
  // Harmony's messages end with <|end|>.
  EXPECT_EQ(ends_of({{"<|end|>", kControl}, {"<|return|>", kControl}, {"<|call|>", kControl}}, "eot"),
            (Texts{"<|return|>", "<|call|>"}));
  EXPECT_EQ(ends_of({{"<|end|>", kControl}, {"<|return|>", kControl}}), (Texts{"<|end|>", "<|return|>"}));
  // Between files: by text unless the metadata name one.
  EXPECT_EQ(ends_of({{"a", kNormal}, {"<|repo_name|>", kControl}, {"<|file_sep|>", kControl}}, "bos"),
            (Texts{"<|repo_name|>", "<|file_sep|>"}));
  EXPECT_EQ(ends_of({{"a", kNormal}, {"<|fim_pad|>", kControl}}, "fim_pad"), (Texts{"a"}));
}

using kernels::PackedLinear;
using kernels::WeightSource;

/// Blocks of the golden file in random order, [n, k], and the same weight as plain bytes with scales of f32.
struct BlockWeight {
  BlockWeight(const GgufTensor& tensor, int n, int k, std::mt19937& rng) {
    const GgmlTypeInfo& info = *tensor.type;
    const kernels::BlockShape& shape = kernels::block_shape(info.type);
    const size_t n_blocks = tensor.data.size() / size_t(info.bytes);
    for (int i = 0; i < n * k / info.columns; ++i) {
      const std::byte* block = tensor.data.data() + rng() % n_blocks * size_t(info.bytes);
      blocks.insert(blocks.end(), block, block + info.bytes);
      for (int g = 0; g < info.columns / shape.group; ++g) {
        uint8_t codes[32];
        kernels::read_block_codes(info.type, block, g, codes);
        const kernels::GroupAffine of = kernels::read_block_affine(info.type, block, g);
        scales.push_back(of.scale);
        biases.push_back(of.bias);
        for (int c = 0; c < shape.group; ++c) {
          const bool plain = shape.codebook == kernels::Codebook::kNone;
          bytes.push_back(plain ? codes[c] : kernels::codebook_levels(shape.codebook)[codes[c]]);
        }
      }
    }
    values.resize(size_t(n) * k);
    kernels::dequantize_blocks(info.type, blocks.data(), n * k, values.data());
    source = {.n = n, .k = k, .weight = blocks.data(), .blocks = info.type};
    plain = {.type = WeightSource::Type::kAffine, .n = n, .k = k, .weight = bytes.data(), .bits = 8,
             .group = shape.group, .scale_type = WeightSource::Type::kF32, .scales = scales.data(),
             .biases = biases.data()};
  }
  std::vector<std::byte> blocks;
  std::vector<uint8_t> bytes;
  std::vector<float> scales, biases, values;
  WeightSource source, plain;
};

std::vector<float> product(const PackedLinear& w, int m, const std::vector<float>& x) {
  std::vector<float> y(size_t(m) * w.n());
  kernels::linear(x.data(), m, w, nullptr, y.data());
  return y;
}

TEST(Gguf, BlocksArePackedExactlyAndMultiplyAsTheSameWeightInBytes) {
  const GgufModel model = GgufModel::open(kBlocks);
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  constexpr int kN = 37, kK = 512, kRows = 21;
  std::vector<float> x(kRows * kK);
  for (float& value : x) value = normal(rng);
  for (const GgufTensor& tensor : model.metadata().tensors()) {
    if (tensor.type->columns == 1) continue;
    SCOPED_TRACE(tensor.name);
    const BlockWeight w(tensor, kN, kK, rng);
    for (const Activations activations : {Activations::kF32, Activations::kInt16}) {
      const auto packed = PackedLinear::pack({w.source}, activations);
      const auto plain = PackedLinear::pack({w.plain}, activations);
      std::vector<float> row(kK);
      for (int i = 0; i < kN; ++i) {
        packed->dequantize_row(i, row.data());
        for (int c = 0; c < kK; ++c) ASSERT_EQ(row[size_t(c)], w.values[size_t(i * kK + c)]) << i << " " << c;
      }
      if (tensor.name.ends_with(".wide")) continue;  // sums that are no numbers
      for (const int m : {1, 2, 3, 4, 8, kRows}) {
        ASSERT_EQ(product(*packed, m, x), product(*plain, m, x)) << m << " rows";
      }
    }
  }
}

TEST(Gguf, BlocksAtTheEndOfAMappedFileAreReadNoFurther) {
  const GgufModel model = GgufModel::open(kBlocks);
  std::mt19937 rng(8);
  constexpr int kN = 3, kK = 512;
  GuardedWeights memory;
  for (const GgufTensor& tensor : model.metadata().tensors()) {
    if (tensor.type->columns == 1) continue;
    SCOPED_TRACE(tensor.name);
    const BlockWeight w(tensor, kN, kK, rng);
    Guarded<std::byte> blocks(w.blocks);
    WeightSource source = w.source;
    source.weight = blocks.data();
    std::vector<float> row(kK);
    for (const Activations activations : {Activations::kF32, Activations::kInt16}) {
      const auto packed = PackedLinear::pack({source}, activations, memory);
      packed->dequantize_row(kN - 1, row.data());
      for (int c = 0; c < kK; ++c) ASSERT_EQ(row[size_t(c)], w.values[size_t((kN - 1) * kK + c)]) << c;
      for (const int m : {1, 4, 8, 9}) product(*packed, m, std::vector<float>(size_t(m * kK), 1.0f));
    }
  }
}

TEST(Gguf, PackedBlocksTakeTheRoomOfTheFile) {
  const GgufModel model = GgufModel::open(kBlocks);
  std::mt19937 rng(6);
  const auto bits = [&](const char* type) {
    const BlockWeight w(*model.find(type), 32, 1024, rng);
    return double(PackedLinear::pack({w.source})->nbytes()) * 8 / (32 * 1024);
  };
  EXPECT_EQ(bits("Q4_K"), 4.5);
  EXPECT_EQ(bits("Q5_K"), 5.5);
  EXPECT_EQ(bits("Q6_K"), 6.625);
  EXPECT_EQ(bits("Q2_K"), 2.625);
  EXPECT_EQ(bits("Q3_K"), 4.5);  // a line of single bits would be half empty
  EXPECT_EQ(bits("IQ4_XS"), 4.375);
  EXPECT_EQ(bits("MXFP4"), 4.25);
  // What lies around a zero needs no bias beside the scale.
  EXPECT_EQ(bits("Q4_0"), 4.5);
  EXPECT_EQ(bits("IQ4_NL"), 4.5);
  EXPECT_EQ(bits("Q5_0"), 5.5);
  EXPECT_EQ(bits("Q8_0"), 8.5);
  EXPECT_EQ(bits("Q4_1"), 5);
  EXPECT_EQ(bits("Q5_1"), 6);
}

TEST(Gguf, RowsThatRotateWithTheirNeighboursArePackedAsHalvesDo) {
  const GgufModel model = GgufModel::open(kBlocks);
  std::mt19937 rng(7);
  constexpr int kN = 24, kK = 256, kHeads = 3, kDim = kN / kHeads;
  const BlockWeight w(*model.find("Q4_K"), kN, kK, rng);
  std::vector<float> bias(kN), x(kK, 0.0f), row(kK);
  for (int i = 0; i < kN; ++i) bias[size_t(i)] = float(i);
  WeightSource source = w.source;
  source.neighbour_heads = kHeads;
  source.bias = bias.data();
  const auto packed = PackedLinear::pack({source});
  const std::vector<float> biases = product(*packed, 1, x);
  for (int i = 0; i < kN; ++i) {
    const int head = i / kDim, at = i % kDim;
    const int from = head * kDim + (at < kDim / 2 ? 2 * at : 2 * (at - kDim / 2) + 1);
    EXPECT_EQ(biases[size_t(i)], float(from));
    packed->dequantize_row(i, row.data());
    for (int c = 0; c < kK; ++c) ASSERT_EQ(row[size_t(c)], w.values[size_t(from * kK + c)]);
  }
}

class Pieces : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::temp_directory_path() / ("torpor-gguf-" + std::to_string(getpid()));
    fs::create_directory(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  void write(const std::string& name, uint16_t piece, uint16_t count, const std::string& tensor) {
    Writer writer;
    writer.head(1, 2).text("split.no").put(uint32_t(2)).put(piece).text("split.count").put(uint32_t(2)).put(count);
    const std::string bytes = writer.tensor(tensor, {8}, 0, 0).padded(32);
    std::ofstream(dir_ / name, std::ios::binary) << bytes;
  }
  std::string error(const std::string& name) {
    try {
      GgufModel::open(dir_ / name);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }
  fs::path dir_;
};

TEST_F(Pieces, OfASplitModelAreOne) {
  write("m-00001-of-00002.gguf", 0, 2, "a");
  write("m-00002-of-00002.gguf", 1, 2, "b");
  const GgufModel model = GgufModel::open(dir_ / "m-00001-of-00002.gguf");
  EXPECT_NE(model.find("a"), nullptr);
  EXPECT_NE(model.find("b"), nullptr);
  EXPECT_EQ(model.find("c"), nullptr);
  const std::string first = "name the first, which ends in -00001-of-00002.gguf";
  EXPECT_NE(error("m-00002-of-00002.gguf").find(first), std::string::npos);
  write("m-00002-of-00002.gguf", 1, 2, "a");
  EXPECT_NE(error("m-00001-of-00002.gguf").find("which is in another file too"), std::string::npos);
  fs::remove(dir_ / "m-00002-of-00002.gguf");
  EXPECT_NE(error("m-00001-of-00002.gguf").find("There is no "), std::string::npos);
  write("other.gguf", 0, 2, "a");
  EXPECT_NE(error("other.gguf").find("its name must end in -00001-of-00002.gguf"), std::string::npos);
}

TEST(Gguf, IsKnownByItsBeginning) {
  EXPECT_TRUE(is_gguf(kBlocks));
  EXPECT_FALSE(is_gguf(kBlocks.parent_path()));
  EXPECT_FALSE(is_gguf(__FILE__));
  EXPECT_NE(error_of("").find("does not begin with GGUF"), std::string::npos);
}

}  // namespace
}  // namespace torpor::testing
