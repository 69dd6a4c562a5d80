#include "base/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <set>

#include "base/checked.h"
#include "base/env.h"
#include "torpor/error.h"

namespace torpor {
namespace {

static_assert(std::endian::native == std::endian::little);  // numbers are read as they lie

constexpr std::string_view kMagic = "GGUF";
constexpr int kMostDims = 4, kDeepestList = 8;

constexpr GgmlTypeInfo kTypes[] = {
    {GgmlType::kF32, "F32", 1, 4},         {GgmlType::kF16, "F16", 1, 2},
    {GgmlType::kQ4_0, "Q4_0", 32, 18},     {GgmlType::kQ4_1, "Q4_1", 32, 20},
    {GgmlType::kQ5_0, "Q5_0", 32, 22},     {GgmlType::kQ5_1, "Q5_1", 32, 24},
    {GgmlType::kQ8_0, "Q8_0", 32, 34},     {GgmlType::kQ2_K, "Q2_K", 256, 84},
    {GgmlType::kQ3_K, "Q3_K", 256, 110},   {GgmlType::kQ4_K, "Q4_K", 256, 144},
    {GgmlType::kQ5_K, "Q5_K", 256, 176},   {GgmlType::kQ6_K, "Q6_K", 256, 210},
    {GgmlType::kIQ4_NL, "IQ4_NL", 32, 18}, {GgmlType::kIQ4_XS, "IQ4_XS", 256, 136},
    {GgmlType::kBF16, "BF16", 1, 2},       {GgmlType::kMXFP4, "MXFP4", 32, 17},
};

template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

/// For a sentence: a name may be anything.
std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 64)) out += c >= ' ' && c < 127 ? c : '?';
  return text.size() > 64 ? out + "..." : out;
}

}  // namespace

const GgmlTypeInfo* find_ggml_type(uint32_t number) {
  const auto it = std::ranges::find(kTypes, GgmlType(number), &GgmlTypeInfo::type);
  return it == std::end(kTypes) ? nullptr : it;
}

const GgmlTypeInfo* find_ggml_type(std::string_view name) {
  const auto it = std::ranges::find_if(kTypes, [&](const GgmlTypeInfo& info) { return name == info.name; });
  return it == std::end(kTypes) ? nullptr : it;
}

const GgmlTypeInfo& ggml_type_info(GgmlType type) { return *find_ggml_type(uint32_t(type)); }

/// Takes the parts of a file one after the other, and never reads past its end.
class GgufFile::Reader {
 public:
  Reader(std::span<const std::byte> bytes, GgufFile& file) : bytes_(bytes), file_(file) {}

  void parse() {
    if (bytes_.size() < kMagic.size() || std::memcmp(bytes_.data(), kMagic.data(), kMagic.size()) != 0) {
      fail("it does not begin with GGUF");
    }
    at_ = kMagic.size();
    const auto version = take<uint32_t>("its version");
    if (version != 2 && version != 3) {
      const bool swapped = (version & 0xffff) == 0;
      throw Error(ErrorCode::kInvalidArgument,
                  "'" + file_.file_name_ + "' is GGUF " +
                      (swapped ? std::string("for big-endian machines") : "version " + std::to_string(version)) +
                      ", and versions 2 and 3 for little-endian ones are read; fetch a newer file of the model.");
    }
    const auto n_tensors = take<uint64_t>("the number of its tensors");
    const auto n_values = take<uint64_t>("the size of its metadata");
    for (uint64_t i = 0; i < n_values; ++i) value();
    for (uint64_t i = 0; i < n_tensors; ++i) tensor();
    place();
    std::ranges::sort(file_.tensors_, {}, &GgufTensor::name);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorCode::kCorruption, "'" + file_.file_name_ + "' is damaged: " + what + ".");
  }

  [[noreturn]] void too_many(const std::string& named) const { fail(named + " has more elements than can be counted"); }

  const std::byte* skip(uint64_t size, const char* what) {
    if (size > bytes_.size() - at_) fail(std::string("it ends within ") + what);
    const std::byte* from = bytes_.data() + at_;
    at_ += size;
    return from;
  }
  template <typename T>
  T take(const char* what) {
    return load<T>(skip(sizeof(T), what));
  }
  std::string_view take_text(const char* what) {
    const auto size = take<uint64_t>(what);
    return {reinterpret_cast<const char*>(skip(size, what)), size_t(size)};
  }
  Kind take_kind() {
    const auto kind = take<uint32_t>("its metadata");
    if (kind > uint32_t(Kind::kF64)) fail("its metadata has a value of type " + std::to_string(kind));
    return Kind(kind);
  }
  static uint64_t size_of(Kind kind) {
    constexpr std::array<uint8_t, 13> kSizes = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return kSizes[size_t(kind)];
  }

  /// Past `count` values of a kind.
  void skip_values(Kind kind, uint64_t count, int depth) {
    if (const uint64_t size = size_of(kind); size != 0) {
      const std::optional<uint64_t> all = checked_mul(size, count);
      if (!all) fail("its metadata has a list of " + std::to_string(count) + " values");
      skip(*all, "its metadata");
      return;
    }
    if (kind == Kind::kList && depth == kDeepestList) fail("its metadata has lists within lists, too deep");
    for (uint64_t i = 0; i < count; ++i) {
      if (kind == Kind::kText) {
        take_text("its metadata");
      } else {
        const Kind inner = take_kind();
        skip_values(inner, take<uint64_t>("its metadata"), depth + 1);
      }
    }
  }

  void value() {
    const std::string_view key = take_text("its metadata");
    Value value{.kind = take_kind()};
    if (value.kind == Kind::kList) {
      value.list = true;
      value.kind = take_kind();
      value.count = take<uint64_t>("its metadata");
    }
    value.data = bytes_.data() + at_;
    skip_values(value.kind, value.count, 1);
    if (!file_.values_.emplace(key, value).second) fail("its metadata has '" + printable(key) + "' twice");
  }

  void tensor() {
    GgufTensor tensor{.name = std::string(take_text("the list of its tensors"))};
    const auto n_dims = take<uint32_t>("the list of its tensors");
    const std::string named = "the tensor " + printable(tensor.name);
    if (n_dims > uint32_t(kMostDims)) fail(named + " has " + std::to_string(n_dims) + " dimensions");
    uint64_t elements = 1;
    for (uint32_t i = 0; i < n_dims; ++i) {
      const auto dim = take<uint64_t>("the list of its tensors");
      const std::optional<uint64_t> product = checked_mul(elements, dim);
      if (!product || dim > uint64_t(std::numeric_limits<int64_t>::max())) too_many(named);
      elements = *product;
      tensor.shape.insert(tensor.shape.begin(), int64_t(dim));
    }
    const auto number = take<uint32_t>("the list of its tensors");
    tensor.type = find_ggml_type(number);
    if (tensor.type == nullptr) {
      std::string known;
      for (const GgmlTypeInfo& type : kTypes) known += (known.empty() ? "" : ", ") + std::string(type.name);
      throw Error(ErrorCode::kInvalidArgument, "'" + file_.file_name_ + "': " + named + " is of ggml's type " +
                                                   std::to_string(number) + ", supported: " + known +
                                                   "; fetch the model in one of these.");
    }
    if (tensor.shape.empty()) tensor.shape.push_back(1);
    if (tensor.shape.back() % tensor.type->columns != 0) {
      fail(named + " has rows of " + std::to_string(tensor.shape.back()) + " elements, which are not whole blocks of " +
           tensor.type->name);
    }
    const uint64_t blocks = elements / uint64_t(tensor.type->columns);
    const std::optional<uint64_t> size = checked_mul(blocks, uint64_t(tensor.type->bytes));
    if (!size) too_many(named);
    if (!names_.insert(tensor.name).second) fail(named + " is there twice");
    places_.push_back({take<uint64_t>("the list of its tensors"), *size});
    file_.tensors_.push_back(std::move(tensor));
  }

  /// Where the tensors' data are.
  void place() {
    if (file_.tensors_.empty()) return;
    const int64_t alignment = file_.integer("general.alignment").value_or(32);
    if (alignment < 1 || alignment > (1 << 20) || !std::has_single_bit(uint64_t(alignment))) {
      fail("its general.alignment is " + std::to_string(alignment));
    }
    const uint64_t start = (at_ + uint64_t(alignment) - 1) / uint64_t(alignment) * uint64_t(alignment);
    for (size_t i = 0; i < places_.size(); ++i) {
      GgufTensor& tensor = file_.tensors_[i];
      const auto [offset, size] = places_[i];
      const std::string named = "the tensor " + printable(tensor.name);
      if (offset % uint64_t(alignment) != 0) {
        fail(named + " begins at byte " + std::to_string(offset) + ", which is no multiple of its alignment");
      }
      const std::optional<uint64_t> begin = checked_add(start, offset);
      const std::optional<uint64_t> end = begin ? checked_add(*begin, size) : std::nullopt;
      if (!end || *end > bytes_.size()) fail(named + " ends past the end of the file");
      tensor.data = bytes_.subspan(size_t(*begin), size_t(size));
    }
  }

  struct Place {
    uint64_t offset, size;
  };

  const std::span<const std::byte> bytes_;
  GgufFile& file_;
  size_t at_ = 0;
  std::vector<Place> places_;  // of each tensor
  std::set<std::string> names_;
};

GgufFile GgufFile::parse(std::span<const std::byte> bytes, std::string file_name) {
  GgufFile file;
  file.file_name_ = std::move(file_name);
  Reader(bytes, file).parse();
  return file;
}

const GgufFile::Value* GgufFile::find(std::string_view key) const {
  const auto it = values_.find(key);
  return it == values_.end() ? nullptr : &it->second;
}

void GgufFile::wrong_type(std::string_view key, const char* expected) const {
  throw Error(ErrorCode::kInvalidArgument,
              "'" + file_name_ + "': " + std::string(key) + " of its metadata must be " + expected + ".");
}

double GgufFile::number_at(const Value& value, uint64_t i) {
  switch (value.kind) {
    case Kind::kU8: return load<uint8_t>(value.data + i);
    case Kind::kI8: return load<int8_t>(value.data + i);
    case Kind::kU16: return load<uint16_t>(value.data + 2 * i);
    case Kind::kI16: return load<int16_t>(value.data + 2 * i);
    case Kind::kU32: return load<uint32_t>(value.data + 4 * i);
    case Kind::kI32: return load<int32_t>(value.data + 4 * i);
    case Kind::kF32: return load<float>(value.data + 4 * i);
    case Kind::kFlag: return load<uint8_t>(value.data + i) != 0;
    case Kind::kU64: return double(load<uint64_t>(value.data + 8 * i));
    case Kind::kI64: return double(load<int64_t>(value.data + 8 * i));
    default: return load<double>(value.data + 8 * i);
  }
}

std::optional<std::string_view> GgufFile::text(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->list || value->kind != Kind::kText) wrong_type(key, "a text");
  return std::string_view(reinterpret_cast<const char*>(value->data + 8), size_t(load<uint64_t>(value->data)));
}

std::optional<int64_t> GgufFile::integer(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  const auto is = [&](Kind kind) { return value->kind == kind; };
  if (value->list || !is_number(value->kind) || is(Kind::kF32) || is(Kind::kF64) || is(Kind::kFlag)) {
    wrong_type(key, "an integer");
  }
  if (is(Kind::kI64)) return load<int64_t>(value->data);
  if (!is(Kind::kU64)) return int64_t(number_at(*value, 0));
  const auto number = load<uint64_t>(value->data);
  if (number > uint64_t(std::numeric_limits<int64_t>::max())) wrong_type(key, "an integer below 2^63");
  return int64_t(number);
}

std::optional<double> GgufFile::number(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->list || !is_number(value->kind)) wrong_type(key, "a number");
  return number_at(*value, 0);
}

std::optional<bool> GgufFile::flag(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->list || value->kind != Kind::kFlag) wrong_type(key, "true or false");
  return number_at(*value, 0) != 0;
}

std::vector<std::string_view> GgufFile::texts(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return {};
  if (!value->list || (value->kind != Kind::kText && value->count != 0)) wrong_type(key, "a list of texts");
  std::vector<std::string_view> all;
  const std::byte* at = value->data;
  for (uint64_t i = 0; i < value->count; ++i) {
    const auto size = load<uint64_t>(at);
    all.emplace_back(reinterpret_cast<const char*>(at + 8), size_t(size));
    at += 8 + size;
  }
  return all;
}

std::vector<double> GgufFile::numbers(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) return {};
  if (!is_number(value->kind)) wrong_type(key, "a list of numbers");
  std::vector<double> all;
  for (uint64_t i = 0; i < value->count; ++i) all.push_back(number_at(*value, i));
  return all;
}

GgufModel GgufModel::open(const std::filesystem::path& path) {
  GgufModel model;
  model.add(path);
  const int64_t count = model.metadata().integer("split.count").value_or(1);
  if (count <= 1) return model;
  const std::string of_pieces = " of a model's " + std::to_string(count) + " files";
  const auto refuse = [&](const std::string& what) {
    throw Error(ErrorCode::kInvalidArgument, "'" + path.string() + "' is" + what);
  };
  const std::string name = path.filename().string();
  char ending[32];
  const auto ending_of = [&](int64_t piece) {
    std::snprintf(ending, sizeof(ending), "-%05d-of-%05d.gguf", int(piece), int(count));
    return std::string(ending);
  };
  if (count > 99999) refuse(" one" + of_pieces + ", it says, which are too many; fetch the model again.");
  if (model.metadata().integer("split.no").value_or(0) != 0) {
    refuse(" a later one" + of_pieces + "; name the first, which ends in " + ending_of(1) + ".");
  }
  if (!name.ends_with(ending_of(1))) {
    refuse(" the first" + of_pieces + ", so its name must end in " + ending_of(1) + ".");
  }
  const std::string stem = name.substr(0, name.size() - ending_of(1).size());
  for (int64_t piece = 2; piece <= count; ++piece) {
    const std::filesystem::path next = path.parent_path() / (stem + ending_of(piece));
    if (!std::filesystem::exists(next)) {
      throw Error(ErrorCode::kNotFound,
                  "There is no " + next.string() + ", one" + of_pieces + "; fetch the model again.");
    }
    model.add(next);
  }
  std::set<std::string_view> names;
  for (const GgufFile& file : model.pieces_) {
    for (const GgufTensor& tensor : file.tensors()) {
      if (names.insert(tensor.name).second) continue;
      throw Error(ErrorCode::kCorruption, "'" + file.file_name() + "' is damaged: it has the tensor " +
                                              printable(tensor.name) + ", which is in another file too.");
    }
  }
  return model;
}

void GgufModel::add(const std::filesystem::path& path) {
  const File file = Env::posix().open(path, OpenMode::kRead);
  const uint64_t size = file.stat().size;
  std::shared_ptr<const std::byte> memory = size == 0 ? nullptr : file.map(size, MapFrom::kAnywhere);
  if (memory == nullptr && size != 0) {
    throw Error(ErrorCode::kIo, "Can't map " + path.string() +
                                    " into memory; free some address space, or copy the model to a local disk.");
  }
  pieces_.push_back(GgufFile::parse({memory.get(), size_t(size)}, path.string()));
  memory_.push_back(std::move(memory));
  paths_.push_back(path);
}

const GgufTensor* GgufModel::find(std::string_view name) const {
  for (const GgufFile& file : pieces_) {
    const auto it = std::ranges::lower_bound(file.tensors(), name, {}, &GgufTensor::name);
    if (it != file.tensors().end() && it->name == name) return &*it;
  }
  return nullptr;
}

bool is_gguf(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) return false;
  std::array<char, kMagic.size()> beginning = {};
  std::ifstream(path, std::ios::binary).read(beginning.data(), beginning.size());
  return std::string_view(beginning.data(), beginning.size()) == kMagic;
}

}  // namespace torpor
