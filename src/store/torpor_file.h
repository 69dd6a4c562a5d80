#pragma once
/// What agent files, parts, segments and exports have in common. Each is a safetensors file. Its metadata begins with a
/// checksum over its own header, says its kind, and holds a checksum of every tensor.

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
#include "torpor/version.h"

namespace torpor {

using Metadata = std::vector<std::pair<std::string, std::string>>;

/// What is written. Versions 1 and 2, which differ in state alone, are read, and segments under old names are of
/// version 1.
inline constexpr int kFormatVersion = kNewestFormat;
inline constexpr int kOldVersion = kOldestFormatRead;

/// Throws kCorruption with the file's name as its path: "'FILE' is damaged: WHAT."
[[noreturn]] void corrupt(const std::string& file_name, const std::string& what);

/// A layout's text, so that files which have the same need not have it parsed again.
struct KnownLayout {
  std::string text;
  size_t bytes_per_token = 0;
};

struct TorporFile {
  SafetensorsHeader header;
  int version = 0;                     ///< 1 to 3
  std::string kind;                    ///< "agent", "part", "segment", "state", "export"
  std::string checksum;                ///< over the header
  KvLayout layout;                     ///< empty where it is a KnownLayout
  std::vector<std::string> checksums;  ///< one per tensor, in the order of header.tensors
  /// Tokens that have rows here; 0 when none have.
  uint64_t rows = 0;
  uint64_t n_tokens = 0;               ///< length of the tensor `tokens`
  /// Tensors that hold the rows, which come first: the layout's, or in agents and parts of version 3 one for all of
  /// these.
  size_t row_tensors = 0;
  size_t state_tensors = 0;            ///< behind the rows (KvSnapshot::state)
  bool has_messages = false;           ///< behind the state

  std::span<const SafetensorsTensor> state() const { return std::span(header.tensors).subspan(row_tensors, state_tensors); }
  /// Bytes of the rows, in the layout's order.
  uint64_t rows_bytes() const;
  /// Bytes of the `wanted` layer tensors alone.
  uint64_t rows_bytes(const TensorMask& wanted) const;
  const SafetensorsTensor& tokens_tensor() const { return header.tensors.back(); }
  /// Where the tensor `messages` is in header.tensors, when there is one.
  size_t messages_index() const { return row_tensors + state_tensors; }
  /// kCorruption naming the file when absent.
  const std::string& required(std::string_view key, const std::string& file_name) const;
};

/// Compares a header (length, JSON, padding) with the checksum that it begins with, and gives that. kCorruption.
std::string check_header_checksum(std::span<const std::byte> header, const std::string& file_name);

/// Every rule that holds for all kinds. kCorruption, also where the layout is another than `known`. kIncompatible for a
/// newer format version, or for something in a layout that this one does not know.
TorporFile parse_torpor_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name,
                             const KnownLayout* known = nullptr);

/// What a file holds, as far as its header says.
struct FileContents {
  std::string_view kind;
  int version = kFormatVersion;
  Metadata metadata;
  uint64_t rows = 0;                ///< tokens that have rows
  std::span<const KvState> state;
  uint64_t message_bytes = 0;       ///< 0: no tensor `messages`
  uint64_t n_tokens = 0;
  std::vector<std::string> checksums;  ///< of the tensors, in order
};
/// The header of such a file; `checksum` receives the one that it begins with.
std::string encode_torpor_header(const FileContents& contents, const KvLayout& layout, std::string* checksum = nullptr);

/// Reads as much of an open file's beginning as its header needs.
std::vector<std::byte> read_header_bytes(const File& file, uint64_t file_size);

/// Reads the tensor `tokens` and checks its checksum.
std::vector<int32_t> read_tokens(const File& file, const TorporFile& parsed);
/// Reads the tensor `messages` and checks its checksum; empty when there is none.
std::string read_messages(const File& file, const TorporFile& parsed);

/// Reads the `wanted` tensors of the rows (none named: all) into their places in `out`, which has rows_bytes(). Each
/// checksum is checked while its bytes are in the CPU's cache.
void read_rows(const File& file, const TorporFile& parsed, const TensorMask& wanted, std::span<std::byte> out);
/// Reads layer tensor `i`, `[1, heads, rows, dim]`, its heads each to `stride` bytes after the one before, and checks
/// it.
void read_tensor(const File& file, const TorporFile& parsed, size_t i, std::byte* out, size_t stride);
/// Checks the checksums of the `wanted` layer tensors, all of them in memory.
void check_mapped_rows(std::span<const std::byte> rows, const TorporFile& parsed, const TensorMask& wanted,
                       const std::string& file_name);
/// Reads the `wanted` layer tensors and checks them without keeping the bytes.
void check_rows(const File& file, const TorporFile& parsed, const TensorMask& wanted = {});
/// Reads what is in the file beside the rows, and checks it.
std::vector<KvState> read_state(const File& file, const TorporFile& parsed, const BufferAllocator& allocate = allocate_heap_buffer);
/// Reads the state's tensors, one after the other, to `out`, and checks them. It has as many bytes as they have.
void read_state_bytes(const File& file, const TorporFile& parsed, std::span<std::byte> out);

/// Bytes in order, in one piece or several.
using Pieces = std::span<const std::span<const std::byte>>;
/// Checksums of the layer tensors of a run of `n_tokens` tokens, from the `first` on.
std::vector<std::string> run_checksums(const KvLayout& layout, int n_tokens, Pieces pieces, size_t first = 0);
/// Rows from the `first` on of a run of `n_tokens` tokens. They lie apart, head by head.
template <typename Byte>
struct RowsIn {
  Byte* bytes = nullptr;
  int n_tokens = 0, first = 0;
};
/// piece(bytes) for each stretch of the rows of `n` tokens, in the layout's order.
void for_each_row_piece(const KvLayout& layout, const RowsIn<const std::byte>& rows, int n,
                        const std::function<void(std::span<const std::byte>)>& piece);
/// Copies the rows of `n` tokens.
void copy_rows(const KvLayout& layout, const RowsIn<const std::byte>& from, const RowsIn<std::byte>& to, int n);
/// Reads all rows of a file that has them in one tensor to where they are wanted, and checks them there: no memory
/// between.
void read_rows_to(const File& file, const TorporFile& parsed, const KvLayout& layout, const RowsIn<std::byte>& to);
/// The checksum of the tensor `rows` of a file that holds them.
std::string rows_checksum(const KvLayout& layout, const RowsIn<const std::byte>& rows, int n);

/// kInvalidArgument when they can't be stored (names, counts, sizes out of range).
void check_layout(const KvLayout& layout, std::span<const KvState> state = {});
/// As text, of format version `version`: before 3 it did not say the order of a tensor's elements.
std::string encode_layout(const KvLayout& layout, int version);
/// The digest of that text.
std::string layout_digest(const KvLayout& layout, int version);

bool is_hex_digest(std::string_view text);
std::string join(const std::vector<std::string>& parts);
std::vector<std::string> split(std::string_view text);

/// Token ids as the little-endian bytes of the file.
std::span<const std::byte> token_bytes(std::span<const int32_t> tokens);
inline std::span<const std::byte> as_bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

}  // namespace torpor
