#include "store/run_loader.h"

#include <algorithm>
#include <mutex>

#include "base/large_pages.h"

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

TensorMask RunLoader::wanted(size_t i, int64_t length) const {
  if (!options_.window_rows_only) return TensorMask(layout_.tensors.size(), true);
  const int64_t first = int64_t(i) * kSegmentTokens;
  return attended_tensors(layout_, first, std::min<int64_t>(stored_tokens(i), length - first), length);
}

size_t RunLoader::usable() const {
  size_t i = 0;
  while (i < runs_.size() && runs_[i].problem.empty()) ++i;
  return i;
}

std::optional<uint64_t> RunLoader::segment_size(size_t i) const {
  if (i >= runs_.size() || is_tail(i) || runs_[i].stat == FileStat{}) return std::nullopt;
  return runs_[i].stat.size;
}

void RunLoader::open(int64_t length) {
  length_ = length;
  const size_t n_segments = std::min(chain_.names.size(), size_t(length + kSegmentTokens - 1) / kSegmentTokens);
  const bool with_tail = length > int64_t(chain_.names.size()) * kSegmentTokens;
  runs_ = std::vector<Run>(n_segments + (with_tail ? 1 : 0));
  // Descriptors are few (256 on macOS): beyond a modest number each file is opened again when its turn comes.
  keep_open_ = n_segments <= kOpenFiles;
  // A thread costs as much as a few headers, or a megabyte of rows.
  parallel_for(n_segments, std::min(reader_threads(), 1 + n_segments / 8), [&](size_t i) { open_run(i); });
  if (with_tail) runs_.back().stat = tail_->stat;
}

void RunLoader::open_run(size_t i) {
  const std::string& name = chain_.names[i];
  Run& run = runs_[i];
  const auto held = options_.sink == nullptr ? store_.known.rows_of(name) : std::nullopt;
  if (held && (options_.map_rows || !held->run.mapped) && covers(held->checked, wanted(i, length_)) &&
      segment_name(chain_.place(i), held->variant) == name) {
    const auto stat = store_.env.stat(store_.segment_path(name));
    const auto file = store_.known.file(name);
    if (stat && file && file->stat == *stat && file->content == held->content) {
      run.stat = *stat;
      run.rows = held->run;
      run.checked = held->checked;
      return;
    }
  }
  open_segment_file(i);
}

void RunLoader::open_segment_file(size_t i) {
  const auto path = store_.segment_path(chain_.names[i]);
  Run& run = runs_[i];
  try {
    run.opened = open_segment(store_.env, path, chain_.names[i], chain_.place(i), headers_);
    run.stat = run.opened->stat;
    const TorporFile& file = run.opened->segment.file;
    bytes_read_ += int64_t(file.header.data_start + (file.tokens_tensor().end - file.tokens_tensor().begin));
    if (!keep_open_) run.opened->handle.release();
  } catch (const Error& error) {
    if (!is_damage(error)) throw;
    run.missing = error.code() == ErrorCode::kNotFound;
    run.problem = run.missing ? "The segment '" + path.string() + "' is missing; restore it from a copy, or wake the agent "
                                "with salvage."
                              : error.what();
  }
}

template <typename Fn>
void RunLoader::with_file(size_t i, Fn fn) {
  if (is_tail(i)) {
    fn(tail_->handle);
  } else if (keep_open_) {
    fn(runs_[i].opened->handle);
  } else {
    fn(store_.env.open(store_.segment_path(chain_.names[i]), OpenMode::kRead));
  }
}

void RunLoader::place_rows(size_t i) {
  Run& run = runs_[i];
  const TorporFile& file = file_of(i);
  const size_t size = size_t(file.rows_bytes());
  run.placed = true;
  run.rows = {.n_tokens = stored_tokens(i)};
  run.checked.assign(layout_.tensors.size(), false);
  if (options_.map_rows) {
    with_file(i, [&](const File& handle) {
      // Another file under that name may be shorter: it is read, and found out.
      if (!is_tail(i) && !keep_open_ && handle.stat() != run.stat) return;
      const auto mapping = handle.map(run.stat.size);
      if (mapping == nullptr) return;
      run.rows.bytes = {mapping.get() + file.header.data_start, size};
      run.rows.owner = mapping;
      run.rows.mapped = true;
    });
    if (run.rows.mapped) return;
  }
  const std::shared_ptr<std::byte> buffer = options_.allocate(size);
  run.writable = {buffer.get(), size};
  prefer_large_pages(run.writable);
  run.rows.bytes = run.writable;
  run.rows.owner = buffer;
}

void RunLoader::read_run(size_t i, const TensorMask& todo) {
  Run& run = runs_[i];
  const TorporFile& file = file_of(i);
  try {
    if (run.rows.mapped) {
      const auto path = is_tail(i) ? tail_->handle.path() : store_.segment_path(chain_.names[i]);
      check_mapped_rows(run.rows.bytes, file, todo, path.string());
    } else {
      with_file(i, [&](const File& handle) { read_rows(handle, file, todo, run.writable); });
    }
  } catch (const Error& error) {
    if (!is_damage(error)) throw;
    run.problem = error.what();
    return;
  }
  bytes_read_ += int64_t(file.rows_bytes(todo));
  for (size_t t = 0; t < todo.size(); ++t) run.checked[t] = run.checked[t] || todo[t];
  if (is_tail(i)) return;
  const SegmentFile& segment = run.opened->segment;
  const bool whole = covers(run.checked, TensorMask(layout_.tensors.size(), true));
  store_.known.add_file(chain_.names[i], {run.stat, segment.content(), segment.last(), whole});
  store_.known.add_rows({chain_.names[i], segment.variant, segment.content(), run.rows, run.checked});
}

void RunLoader::read() {
  // Damage shortens the prefix, and then its windows reach further back than was read at first.
  for (;;) {
    const int64_t length = usable_tokens();
    std::vector<TensorMask> todo(usable());
    std::vector<size_t> work;
    size_t total_bytes = 0;
    for (size_t i = 0; i < todo.size(); ++i) {
      todo[i] = wanted(i, length);
      // A run of which no layer sees anything any more has its place all the same.
      if (runs_[i].rows.n_tokens > 0 && covers(runs_[i].checked, todo[i])) continue;
      if (!is_tail(i) && !runs_[i].opened) open_segment_file(i);  // what was held of it is not enough
      if (!runs_[i].problem.empty()) break;
      if (!runs_[i].placed) place_rows(i);
      for (size_t t = 0; t < todo[i].size(); ++t) todo[i][t] = todo[i][t] && !runs_[i].checked[t];
      total_bytes += size_t(file_of(i).rows_bytes(todo[i]));
      work.push_back(i);
    }
    if (work.empty() && usable_tokens() == length) return;
    parallel_for(work.size(), std::min(reader_threads(), 1 + (total_bytes >> 20)),
                 [&](size_t i) { read_run(work[i], todo[work[i]]); });
  }
}

void RunLoader::read_into(RowSink& sink) {
  const size_t n_tensors = layout_.tensors.size();
  size_t bytes = 0;
  for (size_t i = 0; i < runs_.size(); ++i) bytes += size_t(file_of(i).rows_bytes());
  const size_t threads = std::min(reader_threads(), 1 + (bytes >> 20));
  // Tensor by tensor, and neighbours by one thread: a sink has a tensor's rows together, and what it has together may share
  // pages, whose first writer waits until they are zeroed and then finds them in its cache. As many stretches for each thread.
  const size_t stretches = std::min(n_tensors, (bytes / kStretch / threads + 1) * threads);
  std::mutex mutex;
  for (size_t begin = 0; begin < runs_.size() && complete(); begin += kOpenFiles) {
    const size_t end = std::min(runs_.size(), begin + kOpenFiles);
    std::vector<File> reopened;
    std::vector<const File*> files;
    reopened.reserve(end - begin);
    for (size_t i = begin; i < end; ++i) {
      if (is_tail(i) || keep_open_) {
        files.push_back(is_tail(i) ? &tail_->handle : &runs_[i].opened->handle);
        continue;
      }
      try {
        reopened.push_back(store_.env.open(store_.segment_path(chain_.names[i]), OpenMode::kRead));
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
          const RowSink::Place place = sink.place(t, int64_t(i) * kSegmentTokens, stored_tokens(i));
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

std::vector<KvRun> RunLoader::take() {
  std::vector<KvRun> runs;
  for (size_t i = 0; i < usable(); ++i) {
    KvRun& run = runs.emplace_back(runs_[i].rows);
    const int64_t rows = length_ - int64_t(i) * kSegmentTokens;
    if (rows >= run.n_tokens) continue;
    const size_t size = layout_.offset(layout_.tensors.size(), int(rows));
    const std::shared_ptr<std::byte> buffer = options_.allocate(size);
    cut_rows(layout_, run.bytes, run.n_tokens, int(rows), buffer.get());
    run = {.n_tokens = int(rows), .bytes = {buffer.get(), size}, .owner = buffer};
  }
  return runs;
}

}  // namespace torpor
