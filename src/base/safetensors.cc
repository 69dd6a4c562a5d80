#include "base/safetensors.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <unordered_set>

#include "base/checked.h"
#include "base/json.h"
#include "torpor/error.h"

namespace torpor {
namespace {

constexpr size_t kLengthBytes = 8;

[[noreturn]] void corrupt(const std::string& file_name, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "'" + file_name + "' is damaged: " + what + ".");
}

/// Reads the JSON of a header, of which a wake reads dozens: a general parser would take a quarter of its time. Nothing deeper
/// than a tensor's shape is let in, so a header of a million brackets costs nothing.
class HeaderParser {
 public:
  HeaderParser(std::string_view json, SafetensorsHeader& header, const std::string& file_name)
      : json_(json), header_(header), file_name_(file_name) {}

  void parse() {
    if (!take('{')) invalid();
    object([&](std::string name) {
      if (!names_.insert(name).second) fail("the tensor name '" + name + "' occurs twice");
      if (begin_value() != Kind::kObject) fail("its header has " + found_ + " where a tensor should be described");
      if (name == "__metadata__") {
        metadata();
      } else {
        tensor(std::move(name));
      }
    });
    skip_space();
    if (at_ != json_.size()) invalid();
  }

 private:
  enum class Kind { kObject, kArray, kText, kUnsigned, kOther };

  [[noreturn]] void fail(const std::string& what) const { corrupt(file_name_, what); }
  [[noreturn]] void invalid() const { fail("its header is not valid JSON at byte " + std::to_string(at_ + 1)); }

  void metadata() {
    object([&](std::string key) {
      if (!metadata_keys_.insert(key).second) fail("the metadata key '" + key + "' occurs twice");
      if (begin_value() != Kind::kText) fail("its metadata '" + key + "' is " + found_ + ", not a text");
      header_.metadata.emplace_back(std::move(key), std::move(text_));
    });
  }

  void tensor(std::string name) {
    SafetensorsTensor tensor{.name = std::move(name)};
    std::vector<uint64_t> offsets;
    bool seen_dtype = false, seen_shape = false, seen_offsets = false;
    object([&](const std::string& field) {
      bool* seen = field == "dtype"          ? &seen_dtype
                   : field == "shape"        ? &seen_shape
                   : field == "data_offsets" ? &seen_offsets
                                             : nullptr;
      if (seen == nullptr) fail("tensor '" + tensor.name + "' has an unknown field '" + field + "'");
      if (*seen) fail("tensor '" + tensor.name + "' has its field '" + field + "' twice");
      *seen = true;
      if (begin_value() != (seen == &seen_dtype ? Kind::kText : Kind::kArray))
        fail("tensor '" + tensor.name + "' has " + found_ + " as its " + field);
      if (seen == &seen_dtype) {
        tensor.dtype = std::move(text_);
      } else if (seen == &seen_shape) {
        numbers(tensor.shape, [&] { return "the shape of tensor '" + tensor.name + "' has " + found_ + " in it"; });
      } else {
        numbers(offsets,
                [&] { return "the data offsets of tensor '" + tensor.name + "' have " + found_ + " in them"; });
        if (offsets.size() != 2) fail("tensor '" + tensor.name + "' does not have two data offsets");
      }
    });
    if (!seen_dtype || !seen_shape || !seen_offsets)
      fail("tensor '" + tensor.name + "' lacks its dtype, shape or data offsets");
    tensor.begin = offsets[0];
    tensor.end = offsets[1];
    header_.tensors.push_back(std::move(tensor));
  }

  /// Behind its '{': member(key) for each, with what follows the colon still to be read.
  template <typename Member>
  void object(Member member) {
    if (take('}')) return;
    do {
      skip_space();
      std::string key = string();
      if (!take(':')) invalid();
      member(std::move(key));
    } while (take(','));
    if (!take('}')) invalid();
  }

  /// Behind its '['.
  template <typename Complaint>
  void numbers(std::vector<uint64_t>& numbers, Complaint complaint) {
    if (take(']')) return;
    do {
      if (begin_value() != Kind::kUnsigned) fail(complaint());
      numbers.push_back(number_);
    } while (take(','));
    if (!take(']')) invalid();
  }

  /// Reads a value, of an object or array only its bracket. `found_` then says what it is, with an article.
  Kind begin_value() {
    skip_space();
    const char c = at_ < json_.size() ? json_[at_] : '\0';
    if (c == '{' || c == '[') {
      ++at_;
      return is(c == '{' ? Kind::kObject : Kind::kArray, c == '{' ? "an object" : "an array");
    }
    if (c == '"') {
      text_ = string();
      return is(Kind::kText, "a text");
    }
    for (const auto& [word, name] :
         {std::pair<std::string_view, const char*>{"null", "null"}, {"true", "a boolean"}, {"false", "a boolean"}}) {
      if (!json_.substr(at_).starts_with(word)) continue;
      at_ += word.size();
      return is(Kind::kOther, name);
    }
    return number();
  }

  Kind number() {
    const size_t begin = at_;
    const auto digits = [&] {
      const size_t first = at_;
      while (at_ < json_.size() && json_[at_] >= '0' && json_[at_] <= '9') ++at_;
      if (at_ == first) invalid();
    };
    const bool negative = at_ < json_.size() && json_[at_] == '-';
    at_ += negative;
    const size_t first = at_;
    digits();
    if (json_[first] == '0' && at_ > first + 1) invalid();
    const size_t end = at_;
    if (at_ < json_.size() && json_[at_] == '.') ++at_, digits();
    if (at_ < json_.size() && (json_[at_] == 'e' || json_[at_] == 'E')) {
      ++at_;
      if (at_ < json_.size() && (json_[at_] == '+' || json_[at_] == '-')) ++at_;
      digits();
    }
    int64_t below_zero = 0;
    const char* const from = json_.data() + begin;
    const auto fits = [&](auto& value) {
      return at_ == end && std::from_chars(from, json_.data() + end, value).ec == std::errc();
    };
    if (!negative && fits(number_)) return is(Kind::kUnsigned, "a number");
    return is(Kind::kOther,
              negative && fits(below_zero) ? "a negative number" : "a fraction or a number beyond 64 bits");
  }

  std::string string() {
    if (at_ >= json_.size() || json_[at_] != '"') invalid();
    const size_t begin = at_++;
    bool plain = true;
    while (at_ < json_.size() && json_[at_] != '"') {
      const auto c = static_cast<unsigned char>(json_[at_]);
      plain = plain && c != '\\' && c >= ' ' && c < 0x7f;
      at_ += c == '\\' ? 2 : 1;
    }
    if (at_ >= json_.size()) invalid();
    ++at_;
    if (plain) return std::string(json_.substr(begin + 1, at_ - begin - 2));
    try {
      return parse_json<nlohmann::json>(json_.substr(begin, at_ - begin)).get<std::string>();
    } catch (const nlohmann::json::exception&) {
      invalid();
    }
  }

  Kind is(Kind kind, const char* name) {
    found_ = name;
    return kind;
  }
  void skip_space() {
    while (at_ < json_.size() && (json_[at_] == ' ' || json_[at_] == '\n' || json_[at_] == '\t' || json_[at_] == '\r'))
      ++at_;
  }
  bool take(char c) {
    skip_space();
    if (at_ >= json_.size() || json_[at_] != c) return false;
    ++at_;
    return true;
  }

  const std::string_view json_;
  SafetensorsHeader& header_;
  const std::string& file_name_;
  size_t at_ = 0;
  std::string text_, found_;  // the text, and what the value read last is
  uint64_t number_ = 0;
  std::unordered_set<std::string> names_, metadata_keys_;
};

std::optional<uint64_t> bytes_of(const SafetensorsTensor& tensor) {
  uint64_t bytes = safetensors_dtype_size(tensor.dtype);
  for (uint64_t dimension : tensor.shape) {
    const auto product = checked_mul(bytes, dimension);
    if (!product) return std::nullopt;
    bytes = *product;
  }
  return bytes;
}

/// Sizes agree with shapes, and the tensors cover the data section: no hole, no overlap, nothing after the last.
void check_data_section(SafetensorsHeader& header, uint64_t file_size, const std::string& file_name) {
  for (const auto& tensor : header.tensors) {
    if (safetensors_dtype_size(tensor.dtype) == 0) {
      corrupt(file_name, "tensor '" + tensor.name + "' has the unknown dtype '" + tensor.dtype + "'");
    }
    if (tensor.begin > tensor.end) corrupt(file_name, "the data of tensor '" + tensor.name + "' ends before it begins");
    const auto bytes = bytes_of(tensor);
    if (!bytes) corrupt(file_name, "the shape of tensor '" + tensor.name + "' is too large to exist");
    if (*bytes != tensor.size()) {
      corrupt(file_name, "tensor '" + tensor.name + "' has " + std::to_string(tensor.size()) +
                             " bytes of data, its shape needs " + std::to_string(*bytes));
    }
  }
  // Stable, and empty tensors before the one that begins where they stand.
  std::stable_sort(header.tensors.begin(), header.tensors.end(), [](const auto& a, const auto& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t position = 0;
  for (const auto& tensor : header.tensors) {
    if (tensor.begin > position) corrupt(file_name, "there is a hole in the data before tensor '" + tensor.name + "'");
    if (tensor.begin < position) {
      corrupt(file_name, "the data of tensor '" + tensor.name + "' overlaps that of another");
    }
    position = tensor.end;
  }
  const uint64_t available = file_size - header.data_start;
  if (position > available) {
    corrupt(file_name, "it was cut short: " + std::to_string(position - available) + " bytes of data are missing");
  }
  if (position < available) {
    corrupt(file_name, std::to_string(available - position) + " bytes follow the last tensor");
  }
}

}  // namespace

const SafetensorsTensor* SafetensorsHeader::find(std::string_view name) const {
  for (const auto& tensor : tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

const std::string* SafetensorsHeader::metadata_value(std::string_view key) const {
  for (const auto& [name, value] : metadata) {
    if (name == key) return &value;
  }
  return nullptr;
}

uint64_t safetensors_dtype_size(std::string_view dtype) noexcept {
  static constexpr std::pair<std::string_view, uint64_t> kSizes[] = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},   {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}, {"I16", 2}, {"U16", 2},
      {"F16", 2},  {"BF16", 2}, {"I32", 4}, {"U32", 4},     {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8},
      {"C64", 8}};
  for (const auto& [name, size] : kSizes) {
    if (name == dtype) return size;
  }
  return 0;
}

uint64_t safetensors_data_start(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name) {
  if (file_size < kLengthBytes || prefix.size() < kLengthBytes) {
    corrupt(file_name, "it is too short to hold the length of its header");
  }
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= uint64_t(prefix[i]) << (8 * i);
  if (length > kMaxSafetensorsHeader) {
    corrupt(file_name, "its header claims " + std::to_string(length) + " bytes, more than the format allows");
  }
  if (length > file_size - kLengthBytes) corrupt(file_name, "its header claims to be longer than the file");
  return kLengthBytes + length;
}

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> prefix, uint64_t file_size,
                                           const std::string& file_name) {
  SafetensorsHeader header;
  header.data_start = safetensors_data_start(prefix, file_size, file_name);
  if (prefix.size() < header.data_start) corrupt(file_name, "its header could not be read whole");
  const auto* begin = reinterpret_cast<const char*>(prefix.data()) + kLengthBytes;
  const auto* end = reinterpret_cast<const char*>(prefix.data()) + header.data_start;
  if (begin == end || *begin != '{') corrupt(file_name, "its header does not begin with '{'");
  HeaderParser({begin, size_t(end - begin)}, header, file_name).parse();
  check_data_section(header, file_size, file_name);
  return header;
}

std::string json_quote(std::string_view text) {
  // Nearly all of what a header holds needs no escape, and no check of its UTF-8.
  const auto plain = [](char c) { return c >= ' ' && c < 0x7f && c != '"' && c != '\\'; };
  if (std::all_of(text.begin(), text.end(), plain)) return std::string(1, '"').append(text).append(1, '"');
  try {
    return dump_json(nlohmann::json(text));
  } catch (const nlohmann::json::exception&) {
    throw Error(ErrorCode::kInvalidArgument, "A text to be stored is not valid UTF-8.");
  }
}

std::string encode_safetensors_header(std::vector<SafetensorsTensor>& tensors,
                                      const std::vector<std::pair<std::string, std::string>>& metadata) {
  std::string json = "{";
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    for (size_t i = 0; i < metadata.size(); ++i) {
      if (i > 0) json += ',';
      json += json_quote(metadata[i].first) + ":" + json_quote(metadata[i].second);
    }
    json += '}';
  }
  uint64_t position = 0;
  for (auto& tensor : tensors) {
    const auto bytes = bytes_of(tensor);
    const auto end = bytes ? checked_add(position, *bytes) : std::nullopt;
    if (!end || safetensors_dtype_size(tensor.dtype) == 0) {
      throw Error(ErrorCode::kInvalidArgument,
                  "Tensor '" + tensor.name + "' can't be stored: its shape or dtype is out of range.");
    }
    tensor.begin = position;
    tensor.end = position = *end;
    if (json.size() > 1) json += ',';
    json += json_quote(tensor.name) + ":{\"dtype\":" + json_quote(tensor.dtype) + ",\"shape\":[";
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      if (i > 0) json += ',';
      json += std::to_string(tensor.shape[i]);
    }
    json += "],\"data_offsets\":[" + std::to_string(tensor.begin) + "," + std::to_string(tensor.end) + "]}";
  }
  json += '}';
  const size_t unpadded = kLengthBytes + json.size();
  json.append((kSafetensorsAlignment - unpadded % kSafetensorsAlignment) % kSafetensorsAlignment, ' ');
  if (json.size() > kMaxSafetensorsHeader) {
    throw Error(ErrorCode::kResourceExhausted, "The header of a store file would have " + std::to_string(json.size()) +
                                                   " bytes, more than the format allows; store less metadata.");
  }
  std::string encoded(kLengthBytes, '\0');
  for (size_t i = 0; i < kLengthBytes; ++i) encoded[i] = char(uint64_t(json.size()) >> (8 * i) & 0xff);
  return encoded + json;
}

}  // namespace torpor
