#pragma once
/// What agent files, segments and exports have in common: a safetensors file whose metadata begins with a checksum over
/// its own header, says its kind, and holds a checksum of every tensor.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/env.h"
#include "base/safetensors.h"
#include "torpor/kv_snapshot.h"

namespace torpor {

using Metadata = std::vector<std::pair<std::string, std::string>>;

/// A file says the first version that has what it holds: with state, which version 1 does not know, the second.
inline constexpr const char* kFormatVersion = "1";
inline constexpr const char* kFormatVersionWithState = "2";


struct TorporFile {
  SafetensorsHeader header;
  std::string kind;                    ///< "agent", "segment", "export"
  std::string checksum;                ///< over the header
  KvLayout layout;
  std::vector<std::string> checksums;  ///< one per tensor, in the order of header.tensors
  /// Tokens' rows in the layer tensors, 0 when there are none.
  uint64_t rows = 0;
  uint64_t n_tokens = 0;               ///< length of the tensor `tokens`

  /// The layout's, or 0 when there are no rows.
  size_t layer_tensors() const { return rows > 0 ? layout.tensors.size() : 0; }
  /// What stands between the layer tensors and the tokens (KvSnapshot::state).
  std::span<const SafetensorsTensor> state() const {
    return std::span(header.tensors).subspan(layer_tensors(), header.tensors.size() - 1 - layer_tensors());
  }
  /// Where the layer tensors' bytes are; they come first, in the layout's order.
  uint64_t rows_bytes() const;
  /// Bytes of the `wanted` ones alone.
  uint64_t rows_bytes(const TensorMask& wanted) const;
  const SafetensorsTensor& tokens_tensor() const { return header.tensors.back(); }
  /// kCorruption naming the file when absent.
  const std::string& required(std::string_view key, const std::string& file_name) const;
};

/// Compares a header (length, JSON, padding) with the checksum that it begins with, and gives that. kCorruption.
std::string check_header_checksum(std::span<const std::byte> header, const std::string& file_name);

/// Every rule that holds for all kinds. kCorruption; kIncompatible for a newer format version.
TorporFile parse_torpor_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);

/// The header of a file of `kind` with `rows` rows in each layer tensor (none: no layer tensors) and `n_tokens` ids.
/// `checksums`: the layer tensors', those of `state`, then that of `tokens`. `checksum` receives the header's own.
std::string encode_torpor_header(std::string_view kind, const Metadata& metadata, const KvLayout& layout,
                                 uint64_t rows, std::span<const KvState> state, uint64_t n_tokens,
                                 const std::vector<std::string>& checksums, std::string* checksum = nullptr);

/// Reads as much of an open file's beginning as its header needs.
std::vector<std::byte> read_header_bytes(const File& file, uint64_t file_size);

/// Reads the tensor `tokens` and checks its checksum.
std::vector<int32_t> read_tokens(const File& file, const TorporFile& parsed);

/// Reads the `wanted` layer tensors into their places in `out` (rows_bytes() long), checking each checksum while its bytes
/// are in cache.
void read_rows(const File& file, const TorporFile& parsed, const TensorMask& wanted, std::span<std::byte> out);
/// Reads layer tensor `i`, `[1, heads, rows, dim]`, its heads each to `stride` bytes after the one before, and checks it.
void read_tensor(const File& file, const TorporFile& parsed, size_t i, std::byte* out, size_t stride);
/// Checks the checksums of the `wanted` layer tensors, all of them in memory.
void check_mapped_rows(std::span<const std::byte> rows, const TorporFile& parsed, const TensorMask& wanted,
                       const std::string& file_name);
/// Reads the `wanted` layer tensors and checks them without keeping the bytes.
void check_rows(const File& file, const TorporFile& parsed, const TensorMask& wanted = {});
/// Reads what is in the file beside the rows, and checks it.
std::vector<KvState> read_state(const File& file, const TorporFile& parsed, const BufferAllocator& allocate = allocate_heap_buffer);

/// Bytes in order, in one piece or several.
using Pieces = std::span<const std::span<const std::byte>>;
/// Checksums of the layer tensors of a run of `n_tokens` tokens, from the `first` on.
std::vector<std::string> run_checksums(const KvLayout& layout, int n_tokens, Pieces pieces, size_t first = 0);
/// Copies the first `n` tokens' rows out of a run: they lie apart, head by head.
void cut_rows(const KvLayout& layout, std::span<const std::byte> run, int run_tokens, int n, std::byte* out);

/// kInvalidArgument when they can't be stored (names, counts, sizes out of range).
void check_layout(const KvLayout& layout, std::span<const KvState> state = {});
std::string layout_digest(const KvLayout& layout);

bool is_hex_digest(std::string_view text);
std::string join(const std::vector<std::string>& parts);
std::vector<std::string> split(std::string_view text);

/// Token ids as the little-endian bytes of the file.
std::span<const std::byte> token_bytes(std::span<const int32_t> tokens);

}  // namespace torpor
