#pragma once
/// The safetensors container: https://huggingface.co/docs/safetensors. Every rule of the format is enforced, with
/// checked arithmetic. Each rule has a sentence of its own for kCorruption; docs/format.md lists them.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace torpor {

struct SafetensorsTensor {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  uint64_t begin = 0;  ///< offsets into the data section
  uint64_t end = 0;
  uint64_t size() const { return end - begin; }
};

struct SafetensorsHeader {
  uint64_t data_start = 0;                 ///< offset of the data section in the file
  std::vector<SafetensorsTensor> tensors;  ///< in the order of their data
  std::vector<std::pair<std::string, std::string>> metadata;  ///< in the order of the file

  const SafetensorsTensor* find(std::string_view name) const;
  /// nullptr when absent.
  const std::string* metadata_value(std::string_view key) const;
};

/// The format's own limit on the JSON text.
inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;
/// Data of files that are written here begins at a multiple. The format asks for 8; 64 suits cache lines and Metal.
inline constexpr size_t kSafetensorsAlignment = 64;
inline constexpr std::string_view kSafetensorsExtension = ".safetensors";

/// Bytes of one element, 0 when `dtype` is unknown.
uint64_t safetensors_dtype_size(std::string_view dtype) noexcept;

/// Offset of the data section, from the file's first 8 bytes: how much must be read to parse the header.
uint64_t safetensors_data_start(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);

/// `prefix` holds the file's beginning up to the data section at least; more is ignored.
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> prefix, uint64_t file_size,
                                           const std::string& file_name);

/// Length, JSON and padding: what stands before the data, a multiple of 64 bytes. `begin` and `end` of the tensors are
/// computed here, in the order given. kInvalidArgument when a text is not UTF-8.
std::string encode_safetensors_header(std::vector<SafetensorsTensor>& tensors,
                                      const std::vector<std::pair<std::string, std::string>>& metadata);

/// `text` as a JSON string, quotes included. kInvalidArgument when it is not UTF-8.
std::string json_quote(std::string_view text);

}  // namespace torpor
