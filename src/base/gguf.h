#pragma once
/// The GGUF container, versions 2 and 3: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A parsed file is a
/// view of its bytes: nothing is copied but names and shapes, and no count of the file is believed before the bytes
/// that it stands for have been walked.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace torpor {

/// The types of tensors that are read, by ggml's numbers.
enum class GgmlType : uint32_t {
  kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ2_K = 10, kQ3_K = 11, kQ4_K = 12,
  kQ5_K = 13, kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kBF16 = 30, kMXFP4 = 39,
};
struct GgmlTypeInfo {
  GgmlType type;
  const char* name;  ///< "Q4_K"
  int columns;       ///< of a block: consecutive elements of a row
  int bytes;         ///< of a block
};
/// nullptr for a number, or a name, that is none of these.
const GgmlTypeInfo* find_ggml_type(uint32_t number);
const GgmlTypeInfo* find_ggml_type(std::string_view name);
const GgmlTypeInfo& ggml_type_info(GgmlType type);

struct GgufTensor {
  std::string name;
  const GgmlTypeInfo* type = nullptr;
  std::vector<int64_t> shape;  ///< the last dim's elements lie side by side, in whole blocks
  std::span<const std::byte> data;
};

/// Metadata are asked for by key. What is absent is nullopt or empty; kInvalidArgument, with a sentence, for another
/// type of value than is asked for.
class GgufFile {
 public:
  /// `bytes`, the whole file, must outlive it. kCorruption for a file that breaks the format, kInvalidArgument for one
  /// of another version or with types of tensors that are not read. `file_name` is for these sentences.
  static GgufFile parse(std::span<const std::byte> bytes, std::string file_name);

  const std::vector<GgufTensor>& tensors() const { return tensors_; }  ///< in the order of their names
  const std::string& file_name() const { return file_name_; }
  bool has(std::string_view key) const { return values_.contains(key); }
  /// As the file has it, UTF-8 or not.
  std::optional<std::string_view> text(std::string_view key) const;
  std::optional<int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;
  std::optional<bool> flag(std::string_view key) const;
  std::vector<std::string_view> texts(std::string_view key) const;
  /// Of numbers or flags; one alone is a list of one.
  std::vector<double> numbers(std::string_view key) const;

 private:
  enum class Kind : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kFlag, kText, kList, kU64, kI64, kF64 };
  struct Value {
    Kind kind = Kind::kU8;
    bool list = false;                ///< then `kind` is that of its `count` elements
    uint64_t count = 1;
    const std::byte* data = nullptr;  ///< of the first element, aligned to nothing
  };
  class Reader;

  const Value* find(std::string_view key) const;
  [[noreturn]] void wrong_type(std::string_view key, const char* expected) const;
  static double number_at(const Value& value, uint64_t i);
  static bool is_number(Kind kind) { return kind != Kind::kText && kind != Kind::kList; }

  std::string file_name_;
  std::map<std::string_view, Value, std::less<>> values_;
  std::vector<GgufTensor> tensors_;
};

/// A model's file, or all pieces of one that was split ("-00001-of-00003.gguf"), mapped.
class GgufModel {
 public:
  /// `path` names the file, or the first piece. kNotFound for a missing piece, kIo; else as GgufFile::parse.
  static GgufModel open(const std::filesystem::path& path);

  /// The first piece has the model's metadata.
  const GgufFile& metadata() const { return pieces_.front(); }
  const std::vector<GgufFile>& pieces() const { return pieces_; }
  const std::vector<std::filesystem::path>& paths() const { return paths_; }
  /// What the pieces' views point into.
  const std::vector<std::shared_ptr<const std::byte>>& memory() const { return memory_; }
  /// The tensor of that name; nullptr when there is none.
  const GgufTensor* find(std::string_view name) const;

 private:
  void add(const std::filesystem::path& path);

  std::vector<std::filesystem::path> paths_;
  std::vector<std::shared_ptr<const std::byte>> memory_;
  std::vector<GgufFile> pieces_;
};

/// A file that begins as GGUF does, whatever it is called.
bool is_gguf(const std::filesystem::path& path);

}  // namespace torpor
