#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>

#include "store/store_impl.h"

namespace torpor {
namespace {

/// Damage ends a prefix; a disk that can't be read just now does not, or a passing EIO would cost tokens.
bool is_damage(const Error& error) {
  return error.code() == ErrorCode::kCorruption || error.code() == ErrorCode::kNotFound ||
         error.code() == ErrorCode::kIncompatible;
}

/// What was found for each run; the first one that isn't whole ends the prefix.
struct RunState {
  std::optional<OpenedSegment> opened;
  std::string problem;
  bool missing = false;
};

/// Fresh memory costs more in page faults than the read itself; 2 MiB pages make that one fault in 512. A hint: memory
/// it does not suit ignores it.
void prefer_large_pages([[maybe_unused]] std::span<std::byte> memory) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kLargePage = uintptr_t(2) << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(memory.data()) + kLargePage - 1) / kLargePage * kLargePage;
  const auto end = reinterpret_cast<uintptr_t>(memory.data() + memory.size()) / kLargePage * kLargePage;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

/// Where one run's rows are to be.
struct Rows {
  std::span<const std::byte> bytes;
  std::span<std::byte> writable;  ///< the same, to be read into; empty for a mapping
  std::shared_ptr<const void> owner;
};

Rows allocate_rows(size_t size, const LoadOptions& options) {
  const std::shared_ptr<std::byte> buffer = options.allocate(size);
  const std::span<std::byte> bytes(buffer.get(), size);
  prefer_large_pages(bytes);
  return {bytes, bytes, buffer};
}

/// The rows of an open file: where it is mapped, else memory to read them into.
Rows file_rows(const File& handle, uint64_t file_size, const TorporFile& file, const LoadOptions& options) {
  const size_t size = size_t(file.rows_bytes());
  if (options.map_rows) {
    if (const auto mapping = handle.map(file_size)) return {{mapping.get() + file.header.data_start, size}, {}, mapping};
  }
  return allocate_rows(size, options);
}

/// The same for a segment, whose file is opened again when it could not be kept open.
Rows segment_rows(Env& env, const OpenedSegment& segment, const std::filesystem::path& path, bool open,
                  const LoadOptions& options) {
  const TorporFile& file = segment.segment.file;
  if (open) return file_rows(segment.handle, segment.stat.size, file, options);
  const File again = env.open(path, OpenMode::kRead);
  // Another file under that name may be shorter: it is read, and found out.
  if (again.stat() != segment.stat) return allocate_rows(size_t(file.rows_bytes()), options);
  return file_rows(again, segment.stat.size, file, options);
}

}  // namespace

LoadedAgent Store::Impl::load(const std::string& id, const LoadOptions& options) {
  constexpr int kAttempts = 5;
  for (int attempt = 1;; ++attempt) {
    const OpenedAgent opened = open_agent(id);
    const AgentFile& agent = opened.agent;
    const TorporFile& file = agent.file;
    if (options.expected != nullptr) {
      if (const auto field = agent.info.identity.first_difference(*options.expected)) {
        throw Error(ErrorCode::kIncompatible, "The agent '" + id + "' was cached with another " + *field +
                                                  " than the model now has; use the model it was saved with, or "
                                                  "rebuild it from its text.");
      }
    }
    LoadedAgent loaded;
    loaded.info = agent.info;
    KvSnapshot& snapshot = loaded.snapshot;
    snapshot.identity = agent.info.identity;
    snapshot.layout = file.layout;
    snapshot.tokens = read_tokens(opened.handle, file);
    loaded.bytes_read = int64_t(opened.stat.size);

    // 1. Everything but the rows, before a byte is allocated for them.
    const size_t n_segments = agent.info.segments.size();
    std::vector<RunState> runs(n_segments + (file.rows > 0 ? 1 : 0));
    const std::string identity_digest = snapshot.identity.digest(), layout = layout_digest(file.layout);
    // Descriptors are few (256 on macOS): beyond a modest number each file is opened again when its turn comes.
    const bool keep_open = n_segments <= 64;
    // A thread costs as much as a few headers, or a megabyte of rows.
    parallel_for(n_segments, std::min(reader_threads(), 1 + n_segments / 8), [&](size_t i) {
      const std::string& name = agent.info.segments[i];
      const SegmentPlace place{identity_digest, layout, i == 0 ? "" : agent.info.segments[i - 1],
                               std::span(snapshot.tokens).subspan(i * kSegmentTokens, kSegmentTokens)};
      try {
        runs[i].opened = open_segment(env, segment_path(name), name, place);
        if (!keep_open) runs[i].opened->handle.release();
      } catch (const Error& error) {
        if (!is_damage(error)) throw;
        runs[i].missing = error.code() == ErrorCode::kNotFound;
        runs[i].problem = runs[i].missing ? "The segment '" + segment_path(name).string() + "' of agent '" + id +
                                                "' is missing; restore it from a copy, or wake the agent with salvage."
                                          : error.what();
      }
    });
    auto first_bad = [&] {
      size_t i = 0;
      while (i < runs.size() && runs[i].problem.empty()) ++i;
      return i;
    };
    size_t usable = first_bad();
    if (usable < runs.size() && runs[usable].missing && attempt < kAttempts) {
      // A save in another process may have put a new agent file in place, and its segments are others.
      const auto now = env.stat(agent_path(id));
      if (!now || !(*now == opened.stat)) continue;
    }
    if (usable < runs.size() && !options.salvage) throw Error(ErrorCode::kCorruption, runs[usable].problem);

    // 2. The rows, each run straight into its buffer or where it is mapped.
    std::vector<Rows> rows;
    size_t total_bytes = 0;
    for (size_t i = 0; i < usable; ++i) {
      rows.push_back(i < n_segments ? segment_rows(env, *runs[i].opened, segment_path(agent.info.segments[i]), keep_open, options)
                                    : file_rows(opened.handle, opened.stat.size, file, options));
      total_bytes += rows.back().bytes.size();
    }
    parallel_for(usable, std::min(reader_threads(), 1 + (total_bytes >> 20)), [&](size_t i) {
      try {
        if (i == n_segments) {
          if (rows[i].writable.empty()) {
            check_mapped_rows(rows[i].bytes, file, opened.handle.path().string());
          } else {
            read_rows(opened.handle, file, rows[i].writable);
          }
          return;
        }
        const OpenedSegment& segment = *runs[i].opened;
        const auto path = segment_path(agent.info.segments[i]);
        if (rows[i].writable.empty()) {
          check_mapped_rows(rows[i].bytes, segment.segment.file, path.string());
        } else if (keep_open) {
          read_rows(segment.handle, segment.segment.file, rows[i].writable);
        } else {
          read_rows(env.open(path, OpenMode::kRead), segment.segment.file, rows[i].writable);
        }
        remember(agent.info.segments[i],
                 {segment.stat, segment.segment.content(), rows[i].owner, rows[i].bytes.data(), false});
      } catch (const Error& error) {
        if (!is_damage(error)) throw;
        runs[i].problem = error.what();
      }
    });
    usable = first_bad();
    if (usable < runs.size()) {
      if (!options.salvage) throw Error(ErrorCode::kCorruption, runs[usable].problem);
      loaded.damage = runs[usable].problem;
    }

    for (size_t i = 0; i < usable; ++i) {
      const bool sealed = i < n_segments;
      const TorporFile& source = sealed ? runs[i].opened->segment.file : file;
      snapshot.runs.push_back({.n_tokens = int(source.rows), .bytes = rows[i].bytes, .owner = rows[i].owner});
      if (sealed) loaded.bytes_read += int64_t(runs[i].opened->stat.size);
    }
    for (size_t i = 0; i < n_segments; ++i) {
      if (runs[i].opened) loaded.info.bytes += int64_t(runs[i].opened->stat.size);
    }
    loaded.tokens = snapshot.tokens;
    if (usable < runs.size()) snapshot.tokens.resize(usable * kSegmentTokens);
    return loaded;
  }
}

VerifyReport Store::Impl::verify(const std::string& id, std::unordered_map<std::string, std::string>& checked_rows) {
  check_agent_id(id);
  VerifyReport report;
  report.agent_id = id;
  std::optional<OpenedAgent> opened;
  std::vector<int32_t> tokens;
  try {
    opened = open_agent(id);
    tokens = read_tokens(opened->handle, opened->agent.file);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) throw;
    report.problems.push_back(error.what());
    return report;
  }
  const AgentInfo& info = opened->agent.info;
  const std::string identity_digest = info.identity.digest(), layout = layout_digest(opened->agent.file.layout);
  bool intact = true;
  for (size_t i = 0; i < info.segments.size(); ++i) {
    const std::string& name = info.segments[i];
    std::string problem;
    try {
      const SegmentPlace place{identity_digest, layout, i == 0 ? "" : info.segments[i - 1],
                               std::span(tokens).subspan(i * kSegmentTokens, kSegmentTokens)};
      const OpenedSegment segment = open_segment(env, segment_path(name), name, place);
      // Agents share segments: the rows of each are read once.
      auto [entry, is_new] = checked_rows.try_emplace(name);
      if (is_new) {
        try {
          check_rows(segment.handle, segment.segment.file);
        } catch (const Error& error) {
          entry->second = error.what();
        }
      }
      problem = entry->second;
    } catch (const Error& error) {
      problem = error.what();
    }
    if (problem.empty()) {
      if (intact) report.intact_tokens += kSegmentTokens;
    } else {
      intact = false;
      report.problems.push_back(problem);
    }
  }
  try {
    check_rows(opened->handle, opened->agent.file);
    if (intact) report.intact_tokens = info.cache_size;
  } catch (const Error& error) {
    report.problems.push_back(error.what());
  }
  return report;
}

}  // namespace torpor
