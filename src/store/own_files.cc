#include "store/own_files.h"

#include <algorithm>
#include <iterator>

#include "base/hash.h"
#include "base/parallel.h"
#include "store/messages.h"
#include "torpor/error.h"

namespace torpor {
namespace {

void set_digests(OwnContents& contents, const KvLayout& layout) {
  OwnFile& file = contents.file;
  file.ids = hash_hex(token_bytes(contents.ids));
  file.messages = hash_hex(encode_messages(contents.messages));
  file.rows = file.ref.rows == 0
                  ? ""
                  : rows_checksum(layout, {contents.rows.data(), contents.file_rows, 0}, int(file.ref.rows));
}

/// What reading a file gave: contents or an error; neither when it is not there.
struct OwnRead {
  RowBuffer rows;
  std::optional<OwnContents> contents;
  std::optional<Error> error;
};

/// Those of `files` that begin within the length, several at a time; of all their rows `all_rows` count.
std::vector<OwnRead> read_own_files(const std::vector<OpenedFile>& files, const KvLayout& layout,
                                    const OwnStateOptions& options, int all_rows,
                                    const std::optional<TailBuffer>& tail) {
  size_t n = 0, row_bytes = 0;
  std::vector<int> first_rows;
  for (int rows = 0; n < files.size() && files[n].ref.first <= options.length; ++n) {
    first_rows.push_back(rows);
    rows += int(files[n].ref.rows);
    row_bytes += layout.bytes_per_token() * size_t(files[n].ref.rows);
  }
  std::vector<OwnRead> reads(n);
  parallel_for(n, std::min(reader_threads(), 1 + (row_bytes >> 20)), [&](size_t i) {
    const OpenedFile& file = files[i];
    if (file.handle == nullptr) return;
    try {
      RowBuffer* const rows = options.rows && file.ref.end() > options.sealed ? &reads[i].rows : nullptr;
      const bool fits = tail && first_rows[i] + file.ref.rows <= all_rows;
      reads[i].contents =
          read_own_file(file, layout, rows, options.map, fits ? tail->place(first_rows[i]) : RowsIn<std::byte>{});
    } catch (const Error& error) {
      reads[i].error = error;
    }
  });
  return reads;
}

}  // namespace

std::span<std::byte> RowBuffer::of_size(size_t size) {
  if (size > size_) bytes_ = allocate_heap_buffer(size);
  size_ = std::max(size, size_);
  return {bytes_.get(), size};
}

void TailBuffer::append(const RowsIn<const std::byte>& rows, int n) {
  copy_rows(layout_, rows, {bytes_.get(), capacity_, n_tokens_}, n);
  n_tokens_ += n;
}

KvTail TailBuffer::take() const {
  const size_t n_tensors = layout_.tensors.size();
  if (in_run_) return {n_tokens_, {bytes_.get(), layout_.offset(n_tensors, capacity_)}, bytes_, bytes_};
  if (n_tokens_ == capacity_) return {n_tokens_, {bytes_.get(), layout_.offset(n_tensors, n_tokens_)}, bytes_};
  TailBuffer shorter(layout_, n_tokens_, false, allocate_);
  shorter.append({bytes_.get(), capacity_, 0}, n_tokens_);
  return shorter.take();
}

OwnContents read_own_file(const OpenedFile& opened, const KvLayout& layout, RowBuffer* rows, bool map,
                          const RowsIn<std::byte>& place) {
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
    contents.placed =
        wanted && place.bytes != nullptr && file.row_tensors == 1 && opened.ref.rows == int64_t(file.rows);
    if (wanted && map && !contents.placed) contents.mapping = opened.handle->map(opened.stat.size);
    if (contents.mapping != nullptr) {
      const std::span rows_there(contents.mapping.get() + file.header.data_start, size_t(file.rows_bytes()));
      check_mapped_rows(rows_there, file, TensorMask(file.row_tensors, true), opened.path.string());
      contents.rows = rows_there;
    } else if (contents.placed) {
      read_rows_to(*opened.handle, file, layout, place);
    } else if (wanted) {
      const std::span<std::byte> bytes = rows->of_size(size_t(file.rows_bytes()));
      read_rows(*opened.handle, file, {}, bytes);
      contents.rows = bytes;
    }
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    contents.problem = error.what();
    contents.placed = false;
  }
  const size_t all_messages = contents.messages.size();
  const bool whole = n == contents.ids.size();
  contents.ids.resize(n);
  std::erase_if(contents.messages,
                [&](const StoredMessage& message) { return !whole && message.end > opened.ref.end(); });
  contents.file.n_messages = contents.messages.size();
  if (rows == nullptr || !contents.problem.empty()) return contents;
  if (whole && contents.messages.size() == all_messages && opened.ref.rows == int64_t(file.rows) &&
      file.row_tensors <= 1) {
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
  std::optional<TailBuffer> tail;
  if (options.tail_in_run && all_rows > 0) tail.emplace(layout, all_rows, true, options.allocate);
  std::vector<OwnRead> reads = read_own_files(files, layout, options, all_rows, tail);
  int rows = 0;
  const auto fail = [&](const std::string& problem, bool missing) {
    if (!state.problem.empty()) return;
    state.problem = problem;
    state.missing = missing;
  };
  bool rows_follow = true;
  for (size_t i = 0; i < reads.size(); ++i) {
    const OpenedFile& opened = files[i];
    if (opened.handle != nullptr) {
      if (reads[i].contents) {
        OwnContents& contents = *reads[i].contents;
        state.bytes_read += int64_t(opened.stat.size - opened.file->rows_bytes());
        state.ids.insert(state.ids.end(), contents.ids.begin(), contents.ids.end());
        std::move(contents.messages.begin(), contents.messages.end(), std::back_inserter(state.messages));
        state.files.push_back(std::move(contents.file));
        if (!contents.problem.empty()) fail(contents.problem, false);
        const int n = int(std::min<int64_t>(opened.ref.rows, all_rows - rows));
        rows_follow = rows_follow && (n <= 0 || contents.placed || !contents.rows.empty());
        if (n <= 0 || !rows_follow) continue;
        rows += n;
        if (contents.placed) {
          tail->add_placed(n);
          continue;
        }
        if (contents.mapping != nullptr && !options.tail_in_run && n == all_rows && contents.file_rows == all_rows) {
          state.tail = {all_rows, contents.rows, contents.mapping};  // all of it is in this file
          continue;
        }
        if (!tail) tail.emplace(layout, all_rows, options.tail_in_run, options.allocate);
        tail->append({contents.rows.data(), contents.file_rows, 0}, n);
        continue;
      }
      if (reads[i].error->code() == ErrorCode::kIo) throw *reads[i].error;
      fail(reads[i].error->what(), false);
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
  if (tail && rows > 0) state.tail = tail->take();
  return state;
}

}  // namespace torpor
