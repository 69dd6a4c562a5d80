#pragma once
/// The files of one agent's own, its parts and the agent file behind them: opened, read, and compared with what is to be saved.

#include <memory>
#include <string>
#include <vector>

#include "base/env.h"
#include "store/agent_file.h"

namespace torpor {

/// Where a file of an agent's own is, and what of it counts.
struct OwnFile {
  PartRef ref;                 ///< of the agent file: all of it
  std::filesystem::path path;
  FileStat stat;
  bool has_state = false;
  // Digests of what counts, as the tensors of a file that held just that would have them.
  std::string ids, messages, rows;
  size_t n_messages = 0;
};

/// An agent's own files as they were last seen, intact.
struct OwnFiles {
  FileStat stat;               ///< of the agent file
  std::string uid, created_at;
  std::string layout;          ///< its digest
  std::vector<std::string> parts;  ///< names of all that the agent file lists
  std::vector<std::string> states; ///< names of the state files that it lists
  std::vector<OwnFile> files;  ///< those that are intact, first to last, then the agent file; none before version 3
};

/// Memory for the rows of one file after the other.
class RowBuffer {
 public:
  std::span<std::byte> of_size(size_t size);

 private:
  std::shared_ptr<std::byte> bytes_;
  size_t size_ = 0;
};

/// Memory for the tail of a snapshot. With `in_run` it is a run's (KvTail::run).
class TailBuffer {
 public:
  TailBuffer(const KvLayout& layout, int n_tokens, bool in_run, const BufferAllocator& allocate)
      : layout_(layout), capacity_(in_run ? kSegmentTokens : n_tokens), in_run_(in_run), allocate_(allocate),
        bytes_(allocate(layout.offset(layout.tensors.size(), capacity_))) {}

  /// Copies `n` rows there, behind those that came before.
  void append(const RowsIn<const std::byte>& rows, int n);
  /// Where the row `first` has its place.
  RowsIn<std::byte> place(int first) const { return {bytes_.get(), capacity_, first}; }
  /// The next `n` rows are in their places.
  void add_placed(int n) { n_tokens_ += n; }
  /// The rows that are there.
  KvTail take() const;

 private:
  const KvLayout& layout_;
  const int capacity_;
  const bool in_run_;
  const BufferAllocator& allocate_;
  const std::shared_ptr<std::byte> bytes_;
  int n_tokens_ = 0;
};

/// One of them in memory.
struct OwnContents {
  std::vector<int32_t> ids;              ///< those that count
  std::vector<StoredMessage> messages;   ///< those that end within them
  std::span<const std::byte> rows;       ///< all of the file's, or none were wanted; in the RowBuffer or the mapping
  std::shared_ptr<const std::byte> mapping;  ///< of the file; nullptr when it is read
  bool placed = false;                   ///< all of the file's rows are in their place of a tail, and `rows` is empty
  int file_rows = 0;                     ///< tokens in `rows`
  int first_row = 0;                     ///< position of the first of them, from the file's first id on
  std::string problem;                   ///< messages or rows are damaged, and not here
  OwnFile file;
};

/// An open one.
struct OpenedFile {
  PartRef ref;
  std::filesystem::path path;
  std::shared_ptr<const File> handle;    ///< nullptr: `problem` says why
  FileStat stat;
  std::shared_ptr<const TorporFile> file;
  std::string problem;
  bool missing = false;
};

/// Reads and checks ids, messages, and with a buffer for them rows. Where the file allows it they are read to their `place` in a
/// tail instead, or mapped with `map`. kCorruption when the ids are damaged, kIo.
OwnContents read_own_file(const OpenedFile& opened, const KvLayout& layout, RowBuffer* rows, bool map = false,
                          const RowsIn<std::byte>& place = {});

/// What of `contents` counts when the agent ends at `end`: ids, messages, digests.
void cut_contents(OwnContents& contents, const KvLayout& layout, int64_t end);

/// What all of an agent's own files hold together.
struct OwnState {
  std::vector<int32_t> ids;
  std::vector<StoredMessage> messages;
  KvTail tail;                  ///< rows past the sealed ones
  std::vector<OwnFile> files;   ///< as they were found, when there is no `problem`
  std::string problem;          ///< of the first file that is damaged or missing
  bool missing = false;
  int64_t bytes_read = 0;
};

struct OwnStateOptions {
  int64_t sealed = 0;           ///< tokens in segments
  int64_t length = 0;           ///< tokens that are asked for
  bool rows = true;             ///< the tail is wanted
  bool map = false;             ///< it may be a mapping: fresh memory costs more than its pages
  bool tail_in_run = false;     ///< LoadOptions::tail_in_run
  BufferAllocator allocate = allocate_heap_buffer;
  /// Gives ids at positions [first, end), all of them sealed, where a file that held them is damaged; fewer when it can't.
  std::function<std::vector<int32_t>(int64_t first, int64_t end)> recover_ids;
};
/// Reads them in order, and ends where something is missing. kIo.
OwnState read_own_state(const std::vector<OpenedFile>& files, const KvLayout& layout, const OwnStateOptions& options);

}  // namespace torpor
