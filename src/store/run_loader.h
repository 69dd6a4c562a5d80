#pragma once
/// The runs of an agent or a prefix on their way into memory: mapped, read, or shared with whoever in this process holds
/// them already.

#include "store/segment_headers.h"
#include "store/state_file.h"
#include "store/store_impl.h"

namespace torpor {

/// Damage ends a prefix; a disk that can't be read just now does not, or a passing EIO would cost tokens.
bool is_damage(const Error& error);
/// Puts the rows of `n` tokens of one tensor, head after head, where a sink wants them; zeros for nullptr.
void put_rows(const RowSink::Place& place, const KvTensorSpec& tensor, int n, const std::byte* rows);

class RunLoader {
 public:
  /// All must outlive the loader.
  /// `windows`: of a layout with tensors kept apart the files of their rows, each at the end of its run; `states` says
  /// where they stand. Of other tensors than those the runs are had that `options` asks for.
  RunLoader(Store::Impl& store, const KvLayout& layout, const SegmentChain& chain, const LoadOptions& options,
            std::span<const StateRef> windows = {}, const StateChain* states = nullptr)
      : store_(store), layout_(layout), chain_(chain), options_(options), windows_(windows), state_chain_(states) {}

  /// Opens the segments that the first `length` tokens are in, and checks all of them but the rows. With `share_held` runs that someone in this
  /// process holds are taken as they are.
  void open(int64_t length, bool share_held);
  /// The rows, of the runs before the first that has a problem.
  void read();
  /// The rows of all runs, none of which has a problem yet, to where the sink wants them; there is nothing to `take` then.
  void read_into(RowSink& sink);

  /// Runs before the first that has a problem, and that problem.
  size_t usable() const;
  bool complete() const { return usable() == runs_.size(); }
  const std::string& problem() const { return runs_[usable()].problem; }
  bool missing() const { return !complete() && runs_[usable()].missing; }
  /// Tokens of the usable runs.
  int64_t usable_tokens() const { return std::min(length_, int64_t(usable()) * kSegmentTokens); }

  /// Gives `snapshot` the rows of the usable runs, after `read`; of the last one its first rows where `length` ends inside it.
  void take(KvSnapshot& snapshot);
  /// What was really read: headers, token lists, rows.
  int64_t bytes_read() const { return bytes_read_; }
  /// Size of segment i's file, where it was found.
  std::optional<uint64_t> segment_size(size_t i) const;

 private:
  struct Run {
    std::optional<OpenedSegment> opened;  ///< unless the rows are held already
    FileStat stat;
    std::shared_ptr<const SealedRun> sealed;  ///< held already, or made of the rows when they are read
    std::span<const std::byte> rows;     ///< where they are, or are going to be
    std::shared_ptr<const void> owner;   ///< of `rows`
    std::span<std::byte> writable;       ///< `rows`, to be read into; empty for a mapping
    bool placed = false;                 ///< there are `rows`
    bool mapped = false;
    TensorMask checked;                  ///< of `rows`
    std::string problem;
    bool missing = false;
  };

  const TorporFile& file_of(size_t i) const { return runs_[i].opened->segment.file; }
  /// Tokens that will be held in all.
  int64_t length() const { return complete() ? length_ : usable_tokens(); }
  /// The tensors of run i that `options_` asks for when `length` tokens are held.
  TensorMask wanted(size_t i, int64_t length) const;
  void open_segment_file(size_t i);
  bool take_held(size_t i);
  /// `todo`: the tensors that are going to be read.
  void place_rows(size_t i, const TensorMask& todo);
  /// Whether any of these is kept apart.
  bool has_apart(const TensorMask& tensors) const;
  /// Reads the rows of run i that are kept apart, which `placed` has room for.
  void read_window(size_t i);
  void read_run(size_t i, const TensorMask& todo);
  /// The rows that were read, to where the sink wants them; 0 where no window sees them.
  void copy_into(RowSink& sink);
  void seal(size_t i);
  /// fn(i, handle) with the run's file, which is opened again when it could not be kept open.
  template <typename Fn>
  void with_file(size_t i, Fn fn);

  Store::Impl& store_;
  const KvLayout& layout_;
  const SegmentChain& chain_;
  const LoadOptions& options_;
  const std::span<const StateRef> windows_;
  const StateChain* const state_chain_;
  SegmentHeaders headers_;
  std::vector<Run> runs_;
  int64_t length_ = 0;
  bool keep_open_ = true;
  std::atomic<int64_t> bytes_read_ = 0;
};

}  // namespace torpor
