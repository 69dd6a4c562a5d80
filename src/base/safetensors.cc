#include "base/safetensors.h"

#include <algorithm>
#include <optional>
#include <unordered_set>

#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "torpor/error.h"

namespace torpor {
namespace {

constexpr size_t kLengthBytes = 8;

[[noreturn]] void corrupt(const std::string& file_name, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "'" + file_name + "' is damaged: " + what + ".");
}

/// Builds the header while nlohmann's parser runs. A SAX handler, because the parser itself keeps no stack per level and
/// nothing deeper than a tensor's shape is let in: a header of a million brackets costs nothing.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderReader(SafetensorsHeader& header, const std::string& file_name) : header_(header), file_name_(file_name) {}

  bool start_object(std::size_t) override {
    switch (state_) {
      case State::kStart: state_ = State::kTop; return true;
      case State::kTop:
        if (key_ == "__metadata__") {
          state_ = State::kMetadata;
        } else {
          state_ = State::kTensor;
          tensor_ = {};
          tensor_.name = key_;
          seen_dtype_ = seen_shape_ = seen_offsets_ = false;
        }
        return true;
      default: return unexpected("an object");
    }
  }
  bool key(std::string& name) override {
    switch (state_) {
      case State::kTop:
        if (!names_.insert(name).second) fail("the tensor name '" + name + "' occurs twice");
        break;
      case State::kMetadata:
        if (!metadata_keys_.insert(name).second) fail("the metadata key '" + name + "' occurs twice");
        break;
      case State::kTensor: {
        bool* seen = name == "dtype" ? &seen_dtype_ : name == "shape" ? &seen_shape_
                     : name == "data_offsets" ? &seen_offsets_ : nullptr;
        if (seen == nullptr) fail("tensor '" + tensor_.name + "' has an unknown field '" + name + "'");
        if (*seen) fail("tensor '" + tensor_.name + "' has its field '" + name + "' twice");
        *seen = true;
        break;
      }
      default: break;
    }
    key_ = std::move(name);
    return true;
  }
  bool string(std::string& text) override {
    if (state_ == State::kMetadata) {
      header_.metadata.emplace_back(key_, std::move(text));
    } else if (state_ == State::kTensor && key_ == "dtype") {
      tensor_.dtype = std::move(text);
    } else {
      return unexpected("a text");
    }
    return true;
  }
  bool start_array(std::size_t) override {
    if (state_ == State::kTensor && key_ == "shape") {
      state_ = State::kShape;
    } else if (state_ == State::kTensor && key_ == "data_offsets") {
      state_ = State::kOffsets;
      offsets_.clear();
    } else {
      return unexpected("an array");
    }
    return true;
  }
  bool number_unsigned(uint64_t value) override {
    if (state_ == State::kShape) {
      tensor_.shape.push_back(value);
    } else if (state_ == State::kOffsets) {
      if (offsets_.size() == 2) fail("tensor '" + tensor_.name + "' does not have two data offsets");
      offsets_.push_back(value);
    } else {
      return unexpected("a number");
    }
    return true;
  }
  bool end_array() override {
    if (state_ == State::kOffsets) {
      if (offsets_.size() != 2) fail("tensor '" + tensor_.name + "' does not have two data offsets");
      tensor_.begin = offsets_[0];
      tensor_.end = offsets_[1];
    }
    state_ = State::kTensor;
    return true;
  }
  bool end_object() override {
    if (state_ == State::kTensor) {
      if (!seen_dtype_ || !seen_shape_ || !seen_offsets_) {
        fail("tensor '" + tensor_.name + "' lacks its dtype, shape or data offsets");
      }
      header_.tensors.push_back(std::move(tensor_));
      state_ = State::kTop;
    } else {
      state_ = state_ == State::kMetadata ? State::kTop : State::kEnd;
    }
    return true;
  }
  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(int64_t) override { return unexpected("a negative number"); }
  bool number_float(double, const std::string&) override { return unexpected("a fraction or a number beyond 64 bits"); }
  bool binary(nlohmann::json::binary_t&) override { return unexpected("binary data"); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    fail("its header is not valid JSON at byte " + std::to_string(position));
  }

 private:
  enum class State { kStart, kTop, kMetadata, kTensor, kShape, kOffsets, kEnd };

  [[noreturn]] void fail(const std::string& what) const { corrupt(file_name_, what); }
  bool unexpected(const std::string& what) const {
    switch (state_) {
      case State::kMetadata: fail("its metadata '" + key_ + "' is " + what + ", not a text");
      case State::kTensor: fail("tensor '" + tensor_.name + "' has " + what + " as its " + key_);
      case State::kShape: fail("the shape of tensor '" + tensor_.name + "' has " + what + " in it");
      case State::kOffsets: fail("the data offsets of tensor '" + tensor_.name + "' have " + what + " in them");
      default: fail("its header has " + what + " where a tensor should be described");
    }
  }

  SafetensorsHeader& header_;
  const std::string& file_name_;
  State state_ = State::kStart;
  std::string key_;
  SafetensorsTensor tensor_;
  std::vector<uint64_t> offsets_;
  bool seen_dtype_ = false, seen_shape_ = false, seen_offsets_ = false;
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
  HeaderReader reader(header, file_name);
  try {
    nlohmann::json::sax_parse(begin, end, &reader);
  } catch (const nlohmann::json::exception&) {
    corrupt(file_name, "its header is not valid JSON");
  }
  check_data_section(header, file_size, file_name);
  return header;
}

std::string json_quote(std::string_view text) {
  // Nearly all of what a header holds needs no escape, and no check of its UTF-8.
  const auto plain = [](char c) { return c >= ' ' && c < 0x7f && c != '"' && c != '\\'; };
  if (std::all_of(text.begin(), text.end(), plain)) return std::string(1, '"').append(text).append(1, '"');
  try {
    return nlohmann::json(text).dump();
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
      throw Error(ErrorCode::kInvalidArgument, "Tensor '" + tensor.name + "' can't be stored: its shape or dtype is out of range.");
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
