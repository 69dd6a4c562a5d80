/// What stands behind the header of a store file: ids, messages, rows and state, read with their checksums.

#include <algorithm>
#include <cstring>

#include "base/hash.h"
#include "store/torpor_file.h"
#include "torpor/error.h"

namespace torpor {
namespace {

// Read and hashed in pieces that stay in the second-level cache between the two.
constexpr size_t kChunk = 512 * 1024;

[[noreturn]] void corrupt_tensor(const std::string& file_name, const SafetensorsTensor& tensor) {
  corrupt(file_name, "the data of tensor '" + tensor.name + "' does not match its checksum");
}

/// Reads the layer tensors [first, last) chunk by chunk; `buffer_for(position, size)` says where the bytes go.
template <typename BufferFor>
void read_and_check_rows(const File& file, const TorporFile& parsed, size_t first, size_t last, BufferFor buffer_for) {
  const std::string file_name = file.path().string();
  const auto& tensors = parsed.header.tensors;
  Hasher hasher;
  size_t current = first;
  auto finish_tensor = [&] {
    if (hasher.hex() != parsed.checksums[current]) corrupt_tensor(file_name, tensors[current]);
    hasher = Hasher();
    ++current;
  };
  const uint64_t end = tensors[last - 1].end;
  for (uint64_t position = tensors[first].begin; position < end;) {
    const size_t size = size_t(std::min<uint64_t>(kChunk, end - position));
    const std::span<std::byte> chunk = buffer_for(position, size);
    file.read_at(chunk, parsed.header.data_start + position);
    for (size_t done = 0; done < size;) {
      const size_t piece = size_t(std::min<uint64_t>(size - done, tensors[current].end - position - done));
      hasher.update(chunk.subspan(done, piece));
      done += piece;
      if (position + done == tensors[current].end) finish_tensor();
    }
    position += size;
  }
}

}  // namespace

std::vector<std::byte> read_header_bytes(const File& file, uint64_t file_size) {
  constexpr uint64_t kFirstRead = 32 * 1024;
  std::vector<std::byte> bytes(size_t(std::min(kFirstRead, file_size)));
  file.read_at(bytes, 0);
  const uint64_t data_start = safetensors_data_start(bytes, file_size, file.path().string());
  const size_t have = bytes.size();
  if (data_start > have) {
    bytes.resize(size_t(data_start));
    file.read_at(std::span(bytes).subspan(have), have);
  }
  return bytes;
}

std::vector<int32_t> read_tokens(const File& file, const TorporFile& parsed) {
  const auto& tensor = parsed.tokens_tensor();
  std::vector<int32_t> tokens(size_t(parsed.n_tokens));
  const auto bytes = std::as_writable_bytes(std::span(tokens));
  file.read_at(bytes, parsed.header.data_start + tensor.begin);
  if (hash_hex(bytes) != parsed.checksums.back()) {
    corrupt(file.path().string(), "its token list does not match its checksum; restore the file from a copy");
  }
  return tokens;
}

std::string read_messages(const File& file, const TorporFile& parsed) {
  if (!parsed.has_messages) return {};
  const auto& tensor = parsed.header.tensors[parsed.messages_index()];
  std::string text(size_t(tensor.size()), '\0');
  const auto bytes = std::as_writable_bytes(std::span(text.data(), text.size()));
  file.read_at(bytes, parsed.header.data_start + tensor.begin);
  if (hash_hex(bytes) != parsed.checksums[parsed.messages_index()]) corrupt_tensor(file.path().string(), tensor);
  return text;
}

namespace {

/// fn(first, last) for each stretch of `wanted` tensors among `count`.
template <typename Fn>
void for_each_stretch(const TensorMask& wanted, size_t count, Fn fn) {
  for (size_t first = 0; first < count;) {
    size_t last = first;
    while (last < count && (wanted.empty() || wanted[last])) ++last;
    if (last > first) fn(first, last);
    first = last + 1;
  }
}

}  // namespace

void read_rows(const File& file, const TorporFile& parsed, const TensorMask& wanted, std::span<std::byte> out) {
  for_each_stretch(wanted, parsed.row_tensors, [&](size_t first, size_t last) {
    read_and_check_rows(file, parsed, first, last,
                        [&](uint64_t position, size_t size) { return out.subspan(size_t(position), size); });
  });
}

void read_tensor(const File& file, const TorporFile& parsed, size_t i, std::byte* out, size_t stride) {
  const SafetensorsTensor& tensor = parsed.header.tensors[i];
  const size_t heads = size_t(parsed.layout.tensors[i].n_kv_heads), size = size_t(tensor.end - tensor.begin) / heads;
  const size_t at_once = std::max<size_t>(1, kChunk / size);
  Hasher hasher;
  for (size_t head = 0; head < heads; head += at_once) {
    std::vector<std::span<std::byte>> pieces;
    for (size_t h = head; h < std::min(heads, head + at_once); ++h) pieces.emplace_back(out + h * stride, size);
    file.read_pieces_at(pieces, parsed.header.data_start + tensor.begin + head * size);
    for (const auto& piece : pieces) hasher.update(piece);
  }
  if (hasher.hex() != parsed.checksums[i]) corrupt_tensor(file.path().string(), tensor);
}

void check_mapped_rows(std::span<const std::byte> rows, const TorporFile& parsed, const TensorMask& wanted,
                       const std::string& file_name) {
  for (size_t i = 0; i < parsed.row_tensors; ++i) {
    if (!wanted[i]) continue;
    const SafetensorsTensor& tensor = parsed.header.tensors[i];
    const auto bytes = rows.subspan(size_t(tensor.begin), size_t(tensor.end - tensor.begin));
    if (hash_hex(bytes) != parsed.checksums[i]) corrupt_tensor(file_name, tensor);
  }
}

void check_rows(const File& file, const TorporFile& parsed, const TensorMask& wanted) {
  if (parsed.rows == 0) return;
  std::vector<std::byte> buffer(size_t(std::min<uint64_t>(kChunk, parsed.rows_bytes())));
  for_each_stretch(wanted, parsed.row_tensors, [&](size_t first, size_t last) {
    read_and_check_rows(file, parsed, first, last,
                        [&](uint64_t, size_t size) { return std::span(buffer).first(size); });
  });
}

std::vector<KvState> read_state(const File& file, const TorporFile& parsed, const BufferAllocator& allocate) {
  std::vector<KvState> state;
  for (const SafetensorsTensor& tensor : parsed.state()) {
    const std::shared_ptr<std::byte> buffer = allocate(size_t(tensor.size()));
    const std::span<std::byte> bytes(buffer.get(), size_t(tensor.size()));
    file.read_at(bytes, parsed.header.data_start + tensor.begin);
    const size_t i = parsed.row_tensors + state.size();
    if (hash_hex(bytes) != parsed.checksums[i]) corrupt_tensor(file.path().string(), tensor);
    state.push_back({tensor.name, tensor.dtype, tensor.shape, bytes, buffer});
  }
  return state;
}

void read_state_bytes(const File& file, const TorporFile& parsed, std::span<std::byte> out) {
  if (parsed.state_tensors == 0) return;
  const uint64_t begin = parsed.state().front().begin;
  read_and_check_rows(file, parsed, parsed.row_tensors, parsed.row_tensors + parsed.state_tensors,
                      [&](uint64_t position, size_t size) { return out.subspan(size_t(position - begin), size); });
}

void copy_rows(const KvLayout& layout, const RowsIn<const std::byte>& from, const RowsIn<std::byte>& to, int n) {
  const std::byte* source = from.bytes;
  std::byte* target = to.bytes;
  for (const KvTensorSpec& tensor : layout.tensors) {
    const size_t row = size_t(tensor.dim) * kv_dtype_size(tensor.dtype);
    for (int head = 0; head < tensor.n_kv_heads; ++head) {
      std::memcpy(target + row * size_t(to.first), source + row * size_t(from.first), row * size_t(n));
      source += row * size_t(from.n_tokens);
      target += row * size_t(to.n_tokens);
    }
  }
}

void for_each_row_piece(const KvLayout& layout, const RowsIn<const std::byte>& rows, int n,
                        const std::function<void(std::span<const std::byte>)>& piece) {
  const std::byte* at = rows.bytes;
  if (n == rows.n_tokens) return piece({at, layout.offset(layout.tensors.size(), n)});
  for (const KvTensorSpec& tensor : layout.tensors) {
    const size_t row = size_t(tensor.dim) * kv_dtype_size(tensor.dtype);
    for (int head = 0; head < tensor.n_kv_heads; ++head, at += row * size_t(rows.n_tokens)) {
      piece({at + row * size_t(rows.first), row * size_t(n)});
    }
  }
}

void read_rows_to(const File& file, const TorporFile& parsed, const KvLayout& layout, const RowsIn<std::byte>& to) {
  std::vector<std::span<std::byte>> pieces;
  std::byte* at = to.bytes;
  for (const KvTensorSpec& tensor : layout.tensors) {
    const size_t row = size_t(tensor.dim) * kv_dtype_size(tensor.dtype);
    for (int head = 0; head < tensor.n_kv_heads; ++head, at += row * size_t(to.n_tokens)) {
      pieces.emplace_back(at + row * size_t(to.first), row * parsed.rows);
    }
  }
  Hasher hasher;
  uint64_t position = parsed.header.data_start + parsed.header.tensors.front().begin;
  for (size_t first = 0, end = 0; first < pieces.size(); first = end) {
    size_t size = 0;
    while (end < pieces.size() && (end == first || size + pieces[end].size() <= kChunk)) size += pieces[end++].size();
    file.read_pieces_at({pieces.begin() + ptrdiff_t(first), pieces.begin() + ptrdiff_t(end)}, position);
    for (size_t i = first; i < end; ++i) hasher.update(pieces[i]);
    position += size;
  }
  if (hasher.hex() != parsed.checksums.front()) corrupt_tensor(file.path().string(), parsed.header.tensors.front());
}

std::string rows_checksum(const KvLayout& layout, const RowsIn<const std::byte>& rows, int n) {
  Hasher hasher;
  for_each_row_piece(layout, rows, n, [&](std::span<const std::byte> piece) { hasher.update(piece); });
  return hasher.hex();
}

std::vector<std::string> run_checksums(const KvLayout& layout, int n_tokens, Pieces pieces, size_t first) {
  std::vector<std::string> checksums;
  size_t skip = layout.offset(first, n_tokens);
  /// At most `size` bytes of what comes next.
  const auto next = [&](size_t size) {
    while (skip >= pieces.front().size()) {
      skip -= pieces.front().size();
      pieces = pieces.subspan(1);
    }
    const auto part = pieces.front().subspan(skip, std::min(size, pieces.front().size() - skip));
    skip += part.size();
    return part;
  };
  for (size_t i = first; i < layout.tensors.size(); ++i) {
    size_t size = layout.tensors[i].bytes_per_token() * size_t(n_tokens);
    auto part = next(size);
    if (part.size() == size) {
      checksums.push_back(hash_hex(part));
      continue;
    }
    Hasher hasher;
    for (; size > 0; part = next(size)) {
      hasher.update(part);
      size -= part.size();
      if (size == 0) break;
    }
    checksums.push_back(hasher.hex());
  }
  return checksums;
}

}  // namespace torpor
