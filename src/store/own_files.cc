#include "store/own_files.h"

#include <algorithm>
#include <iterator>

#include "base/hash.h"
#include "store/messages.h"
#include "torpor/error.h"

namespace torpor {
namespace {

void set_digests(OwnContents& contents, const KvLayout& layout) {
  OwnFile& file = contents.file;
  file.ids = hash_hex(token_bytes(contents.ids));
  file.messages = hash_hex(encode_messages(contents.messages));
  file.rows = file.ref.rows == 0 ? "" : rows_checksum(layout, {contents.rows.data(), contents.file_rows, 0}, int(file.ref.rows));
}

}  // namespace

std::span<std::byte> RowBuffer::of_size(size_t size) {
  if (size > size_) bytes_ = allocate_heap_buffer(size);
  size_ = std::max(size, size_);
  return {bytes_.get(), size};
}

OwnContents read_own_file(const OpenedFile& opened, const KvLayout& layout, RowBuffer* rows, bool map) {
  OwnContents contents;
  const TorporFile& file = *opened.file;
  const size_t n = size_t(opened.ref.tokens);
  contents.file = {.ref = opened.ref, .path = opened.path, .stat = opened.stat, .has_state = !file.state().empty()};
  contents.ids = read_tokens(*opened.handle, file);
  contents.first_row = int(file.n_tokens - file.rows);
  contents.file_rows = int(file.rows);
  try {
    contents.messages = decode_messages(read_messages(*opened.handle, file), opened.path.string());
    const bool wanted = rows != nullptr && file.rows > 0;
    if (wanted && map) contents.mapping = opened.handle->map(opened.stat.size);
    if (contents.mapping != nullptr) {
      const std::span rows_there(contents.mapping.get() + file.header.data_start, size_t(file.rows_bytes()));
      check_mapped_rows(rows_there, file, TensorMask(file.row_tensors, true), opened.path.string());
      contents.rows = rows_there;
    } else if (wanted) {
      const std::span<std::byte> bytes = rows->of_size(size_t(file.rows_bytes()));
      read_rows(*opened.handle, file, {}, bytes);
      contents.rows = bytes;
    }
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    contents.problem = error.what();
  }
  const size_t all_messages = contents.messages.size();
  const bool whole = n == contents.ids.size();
  contents.ids.resize(n);
  std::erase_if(contents.messages, [&](const StoredMessage& message) { return !whole && message.end > opened.ref.end(); });
  contents.file.n_messages = contents.messages.size();
  if (rows == nullptr || !contents.problem.empty()) return contents;
  if (whole && contents.messages.size() == all_messages && opened.ref.rows == int64_t(file.rows) && file.row_tensors <= 1) {
    contents.file.ids = file.checksums.back();
    contents.file.messages = file.has_messages ? file.checksums[file.messages_index()] : hash_hex("");
    contents.file.rows = file.rows > 0 ? file.checksums.front() : "";
  } else {
    set_digests(contents, layout);
  }
  return contents;
}

void cut_contents(OwnContents& contents, const KvLayout& layout, int64_t end) {
  PartRef& ref = contents.file.ref;
  ref.tokens = end - ref.first;
  ref.rows = std::clamp<int64_t>(ref.tokens - contents.first_row, 0, ref.rows);
  contents.ids.resize(size_t(ref.tokens));
  std::erase_if(contents.messages, [&](const StoredMessage& message) { return message.end > end; });
  contents.file.n_messages = contents.messages.size();
  set_digests(contents, layout);
}

OwnState read_own_state(const std::vector<OpenedFile>& files, const KvLayout& layout, const OwnStateOptions& options) {
  OwnState state;
  // No more than the files that are there have room for.
  int64_t end = 0;
  for (const OpenedFile& opened : files) {
    if (opened.handle == nullptr && opened.ref.end() > options.sealed) break;
    end = opened.ref.end();
  }
  end = std::min(end, options.length);
  const int all_rows = options.rows ? int(std::max<int64_t>(0, end - options.sealed)) : 0;
  const size_t n_tensors = layout.tensors.size();
  std::shared_ptr<std::byte> tail;
  RowBuffer buffer;
  int rows = 0;
  const auto fail = [&](const std::string& problem, bool missing) {
    if (!state.problem.empty()) return;
    state.problem = problem;
    state.missing = missing;
  };
  bool rows_follow = true;
  for (const OpenedFile& opened : files) {
    if (opened.ref.first > options.length) break;
    if (opened.handle != nullptr) {
      try {
        const bool has_rows = options.rows && opened.ref.end() > options.sealed;
        OwnContents contents = read_own_file(opened, layout, has_rows ? &buffer : nullptr, options.map);
        state.bytes_read += int64_t(opened.stat.size - opened.file->rows_bytes());
        state.ids.insert(state.ids.end(), contents.ids.begin(), contents.ids.end());
        std::move(contents.messages.begin(), contents.messages.end(), std::back_inserter(state.messages));
        state.files.push_back(std::move(contents.file));
        if (!contents.problem.empty()) fail(contents.problem, false);
        const int n = int(std::min<int64_t>(opened.ref.rows, all_rows - rows));
        rows_follow = rows_follow && (n <= 0 || !contents.rows.empty());
        if (n <= 0 || !rows_follow) continue;
        if (contents.mapping != nullptr && n == all_rows && contents.file_rows == all_rows) {
          state.tail = {all_rows, contents.rows, contents.mapping};  // all of it is in this file
          continue;
        }
        if (tail == nullptr) tail = options.allocate(layout.offset(n_tensors, all_rows));
        copy_rows(layout, {contents.rows.data(), contents.file_rows, 0}, {tail.get(), all_rows, rows}, n);
        rows += n;
        continue;
      } catch (const Error& error) {
        if (error.code() == ErrorCode::kIo) throw;
        fail(error.what(), false);
      }
    }
    fail(opened.problem, opened.missing);
    if (!options.recover_ids || opened.ref.first >= options.sealed || &opened == &files.back()) break;
    const int64_t recoverable = std::min(opened.ref.end(), options.sealed);
    const auto ids = options.recover_ids(opened.ref.first, recoverable);
    state.ids.insert(state.ids.end(), ids.begin(), ids.end());
    if (int64_t(state.ids.size()) < opened.ref.end()) break;
  }
  if (int64_t(state.ids.size()) > options.length) state.ids.resize(size_t(options.length));
  std::erase_if(state.messages, [&](const StoredMessage& message) { return message.end > options.length; });
  if (rows > 0 && rows < all_rows) {
    const auto cut = options.allocate(layout.offset(n_tensors, rows));
    copy_rows(layout, {tail.get(), all_rows, 0}, {cut.get(), rows, 0}, rows);
    tail = cut;
  }
  if (rows > 0) state.tail = {rows, {tail.get(), layout.offset(n_tensors, rows)}, tail};
  return state;
}

}  // namespace torpor
