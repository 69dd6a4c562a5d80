#include "store/run_loader.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "base/large_pages.h"
#include "store/states.h"

namespace torpor {
namespace {

constexpr size_t kOpenFiles = 64;
/// Bytes of neighbouring tensors that one thread reads for a sink.
constexpr size_t kStretch = size_t(8) << 20;

}  // namespace

bool is_damage(const Error& error) {
  return error.code() == ErrorCode::kCorruption || error.code() == ErrorCode::kNotFound ||
         error.code() == ErrorCode::kIncompatible;
}

void put_rows(const RowSink::Place& place, const KvTensorSpec& tensor, int n, const std::byte* rows) {
  const size_t size = size_t(n) * tensor.bytes_per_token() / size_t(tensor.n_kv_heads);
  for (int head = 0; head < tensor.n_kv_heads; ++head) {
    std::byte* const to = place.rows + size_t(head) * place.stride;
    if (rows != nullptr) {
      std::memcpy(to, rows + size_t(head) * size, size);
    } else {
      std::memset(to, 0, size);
    }
  }
}

TensorMask RunLoader::wanted(size_t i, int64_t length) const {
  const int64_t first = int64_t(i) * kSegmentTokens;
  TensorMask mask = layout_.attended(first, std::min<int64_t>(kSegmentTokens, length - first), length);
  if (!options_.window_rows_only) std::fill_n(mask.begin(), layout_.n_together(), true);
  // All or none: they are in one file.
  if (has_apart(mask)) std::fill(mask.begin() + ptrdiff_t(layout_.n_together()), mask.end(), true);
  return mask;
}

bool RunLoader::has_apart(const TensorMask& tensors) const {
  return std::find(tensors.begin() + ptrdiff_t(layout_.n_together()), tensors.end(), true) != tensors.end();
}

size_t RunLoader::usable() const {
  size_t i = 0;
  while (i < runs_.size() && runs_[i].problem.empty()) ++i;
  return i;
}

std::optional<uint64_t> RunLoader::segment_size(size_t i) const {
  if (i >= runs_.size() || runs_[i].stat == FileStat{}) return std::nullopt;
  return runs_[i].stat.size;
}

void RunLoader::open(int64_t length, bool share_held) {
  length_ = length;
  const size_t n_segments = std::min(chain_.names.size(), size_t(length + kSegmentTokens - 1) / kSegmentTokens);
  runs_ = std::vector<Run>(n_segments);
  // Descriptors are few (256 on macOS): beyond a modest number each file is opened again when its turn comes.
  keep_open_ = n_segments <= kOpenFiles;
  // A thread costs as much as a few headers, or a megabyte of rows.
  parallel_for(n_segments, std::min(reader_threads(), 1 + n_segments / 8), [&](size_t i) {
    if (!share_held || !take_held(i)) open_segment_file(i);
  });
}

bool RunLoader::take_held(size_t i) {
  const std::string& name = chain_.names[i];
  const auto held = store_.known.run(name);
  if (held == nullptr || (held->mapped() && !options_.map_rows) || !covers(held->checked(), wanted(i, length_)))
    return false;
  const auto segment = held->segment();
  const auto stat = store_.segments.find(name);
  const auto file = store_.known.file(name);
  if (!stat || !file || file->stat != *stat || file->content != segment->content ||
      segment_name(chain_.place(i), segment->variant) != name) {
    return false;
  }
  try {
    recheck(store_, layout_, *held, wanted(i, length_));
  } catch (const Error& error) {
    if (!is_damage(error)) throw;
    return false;  // the file, which is looked at now, says what is wrong with it
  }
  runs_[i].stat = *stat;
  runs_[i].sealed = held;
  return true;
}

void RunLoader::open_segment_file(size_t i) {
  Run& run = runs_[i];
  try {
    run.opened = open_segment(store_.segments, chain_.names[i], chain_.place(i), headers_);
    run.stat = run.opened->stat;
    const TorporFile& file = run.opened->segment.file;
    bytes_read_ += int64_t(file.header.data_start + (file.tokens_tensor().end - file.tokens_tensor().begin));
    if (!keep_open_) run.opened->handle.release();
  } catch (const Error& error) {
    if (!is_damage(error)) throw;
    run.missing = error.code() == ErrorCode::kNotFound;
    run.problem = run.missing ? "The segment '" + store_.segments.path(chain_.names[i]).string() +
                                    "' is missing; restore it from "
                                    "a copy, or wake the agent with salvage."
                              : error.what();
  }
}

template <typename Fn>
void RunLoader::with_file(size_t i, Fn fn) {
  if (keep_open_) {
    fn(runs_[i].opened->handle);
  } else {
    fn(store_.segments.open(chain_.names[i]));
  }
}

void RunLoader::place_rows(size_t i, const TensorMask& todo) {
  Run& run = runs_[i];
  const TorporFile& file = file_of(i);
  // Rows of two files in one piece of memory can't be mapped.
  const bool apart = has_apart(todo);
  const size_t size = apart ? layout_.offset(layout_.tensors.size(), kSegmentTokens) : size_t(file.rows_bytes());
  run.placed = true;
  run.mapped = false;
  run.checked.assign(layout_.tensors.size(), false);
  if (options_.map_rows && !apart) {
    with_file(i, [&](const File& handle) {
      // Another file under that name may be shorter: it is read, and found out.
      if (!keep_open_ && handle.stat() != run.stat) return;
      const auto mapping = handle.map(run.stat.size);
      if (mapping == nullptr) return;
      run.rows = {mapping.get() + file.header.data_start, size};
      run.owner = mapping;
      run.mapped = true;
    });
    if (run.mapped) return;
  }
  const std::shared_ptr<std::byte> buffer = options_.allocate(size);
  run.writable = {buffer.get(), size};
  prefer_large_pages(run.writable);
  run.rows = run.writable;
  run.owner = buffer;
}

void RunLoader::read_run(size_t i, const TensorMask& todo) {
  Run& run = runs_[i];
  const TorporFile& file = file_of(i);
  const size_t together = layout_.n_together();
  try {
    if (run.mapped) {
      check_mapped_rows(run.rows, file, todo, store_.segments.path(chain_.names[i]).string());
    } else {
      with_file(i, [&](const File& handle) { read_rows(handle, file, todo, run.writable); });
    }
    if (has_apart(todo)) read_window(i);
  } catch (const Error& error) {
    if (!is_damage(error)) throw;
    run.missing = error.code() == ErrorCode::kNotFound;
    run.problem = error.what();
    return;
  }
  bytes_read_ += int64_t(file.rows_bytes(todo));
  for (size_t t = 0; t < todo.size(); ++t) run.checked[t] = run.checked[t] || todo[t];
  const SegmentFile& segment = run.opened->segment;
  const bool whole = covers({run.checked.begin(), run.checked.begin() + ptrdiff_t(together)}, {});
  store_.known.add_file(chain_.names[i], {run.stat, segment.content(), segment.last(), whole});
}

void RunLoader::read_window(size_t i) {
  const int64_t position = int64_t(i + 1) * kSegmentTokens;
  const auto ref = std::ranges::find(windows_, position, &StateRef::position);
  const StateLayout rows = window_rows(layout_);
  const std::span<std::byte> place = runs_[i].writable.subspan(layout_.together_bytes());
  const auto buffer = std::const_pointer_cast<void>(runs_[i].owner);
  if (ref == windows_.end()) {
    throw Error(ErrorCode::kNotFound, "No file holds the window rows of the run that ends at token " +
                                          std::to_string(position) + "; wake the agent with salvage.");
  }
  StateLayout found;
  try {
    load_state(store_, *state_chain_, *ref,
               [&](size_t size) {
                 if (size == place.size()) return std::shared_ptr<std::byte>(buffer, place.data());
                 throw Error(ErrorCode::kCorruption, "'" + store_.states.path(ref->file).string() +
                                                         "' is damaged: it is not of the agent's layout.");
               },
               found);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound) throw;
    throw Error(ErrorCode::kNotFound, missing_state(store_, *ref));
  }
  if (found != rows) {
    throw Error(ErrorCode::kCorruption, "'" + store_.states.path(ref->file).string() +
                                            "' is damaged: it is not of the agent's layout.");
  }
  bytes_read_ += int64_t(rows.bytes());
}

void RunLoader::seal(size_t i) {
  Run& run = runs_[i];
  const SegmentFile& segment = run.opened->segment;
  run.sealed = std::make_shared<const SealedRun>(run.rows, run.owner, run.mapped, run.checked);
  run.sealed->set_segment({chain_.names[i], segment.variant, segment.content()});
  store_.known.add_run(run.sealed);
}

void RunLoader::read() {
  // Damage shortens the prefix, and then its windows reach further back than was read at first.
  for (;;) {
    const int64_t length = this->length();
    std::vector<TensorMask> todo(usable());
    std::vector<size_t> work;
    size_t total_bytes = 0;
    for (size_t i = 0; i < todo.size(); ++i) {
      todo[i] = wanted(i, length);
      // A run of which no layer sees anything any more has its place all the same.
      const Run& run = runs_[i];
      if (run.sealed != nullptr ? covers(run.sealed->checked(), todo[i]) : run.placed && covers(run.checked, todo[i]))
        continue;
      if (run.sealed != nullptr) {  // what was held of it is not enough
        runs_[i].sealed = nullptr;
        open_segment_file(i);
      }
      if (!runs_[i].problem.empty()) break;
      // Rows that are kept apart need room that a run placed without them has not.
      const bool cramped = has_apart(todo[i]) && runs_[i].rows.size() < layout_.offset(todo[i].size(), kSegmentTokens);
      if (!runs_[i].placed || cramped) place_rows(i, todo[i]);
      for (size_t t = 0; t < todo[i].size(); ++t) todo[i][t] = todo[i][t] && !runs_[i].checked[t];
      total_bytes += size_t(file_of(i).rows_bytes(todo[i]));
      work.push_back(i);
    }
    if (work.empty() && this->length() == length) break;
    parallel_for(work.size(), std::min(reader_threads(), 1 + (total_bytes >> 20)),
                 [&](size_t i) { read_run(work[i], todo[work[i]]); });
    // A shorter prefix sees rows that no file may have: the caller finds one that can be had.
    if (layout_.has_apart() && !complete()) return;
  }
  for (size_t i = 0; i < usable(); ++i) {
    if (runs_[i].sealed == nullptr) seal(i);
  }
}

void RunLoader::copy_into(RowSink& sink) {
  parallel_for(runs_.size(), std::min(reader_threads(), runs_.size()), [&](size_t i) {
    const SealedRun& run = *runs_[i].sealed;
    for (size_t t = 0; t < layout_.tensors.size(); ++t) {
      const bool there = run.checked().empty() || run.checked()[t];
      put_rows(sink.place(t, int64_t(i) * kSegmentTokens, kSegmentTokens), layout_.tensors[t], kSegmentTokens,
               there ? run.bytes().data() + layout_.offset(t, kSegmentTokens) : nullptr);
    }
  });
}

void RunLoader::read_into(RowSink& sink) {
  if (layout_.has_apart()) {  // two files hold a run, and some rows have none
    read();
    if (complete()) copy_into(sink);
    return;
  }
  const size_t n_tensors = layout_.tensors.size();
  size_t bytes = 0;
  for (size_t i = 0; i < runs_.size(); ++i) bytes += size_t(file_of(i).rows_bytes());
  const size_t threads = std::min(reader_threads(), 1 + (bytes >> 20));
  // Give each thread a contiguous range of tensors. Adjacent rows may share pages, and the thread that faults a page in
  // has it in its cache. Every thread gets the same number of ranges.
  const size_t stretches = std::min(n_tensors, (bytes / kStretch / threads + 1) * threads);
  std::mutex mutex;
  for (size_t begin = 0; begin < runs_.size() && complete(); begin += kOpenFiles) {
    const size_t end = std::min(runs_.size(), begin + kOpenFiles);
    std::vector<File> reopened;
    std::vector<const File*> files;
    reopened.reserve(end - begin);
    for (size_t i = begin; i < end; ++i) {
      if (keep_open_) {
        files.push_back(&runs_[i].opened->handle);
        continue;
      }
      try {
        reopened.push_back(store_.segments.open(chain_.names[i]));
      } catch (const Error& error) {
        if (!is_damage(error)) throw;
        runs_[i].problem = error.what();
        return;
      }
      files.push_back(&reopened.back());
    }
    parallel_for(stretches, threads, [&](size_t stretch) {
      for (size_t i = begin; i < end; ++i) {
        for (size_t t = stretch * n_tensors / stretches; t < (stretch + 1) * n_tensors / stretches; ++t) {
          const RowSink::Place place = sink.place(t, int64_t(i) * kSegmentTokens, kSegmentTokens);
          try {
            read_tensor(*files[i - begin], file_of(i), t, place.rows, place.stride);
          } catch (const Error& error) {
            if (!is_damage(error)) throw;
            const std::lock_guard lock(mutex);
            runs_[i].problem = error.what();
          }
        }
      }
    });
  }
  if (!complete()) return;
  bytes_read_ += int64_t(bytes);
  for (size_t i = 0; i < chain_.names.size(); ++i) {
    const SegmentFile& segment = runs_[i].opened->segment;
    store_.known.add_file(chain_.names[i], {runs_[i].stat, segment.content(), segment.last(), true});
  }
}

void RunLoader::take(KvSnapshot& snapshot) {
  for (size_t i = 0; i < usable(); ++i) {
    const Run& run = runs_[i];
    const int64_t rows = length_ - int64_t(i) * kSegmentTokens;
    if (rows < kSegmentTokens) {
      TailBuffer tail(layout_, int(rows), options_.tail_in_run, options_.allocate);
      tail.append({run.sealed->bytes().data(), kSegmentTokens, 0}, int(rows));
      snapshot.tail = tail.take();
    } else {
      snapshot.sealed.push_back(run.sealed);
    }
  }
}

}  // namespace torpor
