/// Copies of an agent that read no sealed row: fork, rewind, rename, a change of metadata.

#include "store/segment_headers.h"
#include "store/writing.h"

namespace torpor {
namespace {

/// The first `n` rows of an open file.
KvTail first_rows(const File& handle, const TorporFile& file, int n) {
  const size_t read_size = size_t(file.rows_bytes());
  const auto read = allocate_heap_buffer(read_size);
  read_rows(handle, file, TensorMask(file.layout.tensors.size(), true), {read.get(), read_size});
  if (n == int(file.rows)) return {.n_tokens = n, .bytes = {read.get(), read_size}, .owner = read};
  const size_t size = file.layout.offset(file.layout.tensors.size(), n);
  const auto rows = allocate_heap_buffer(size);
  cut_rows(file.layout, {read.get(), read_size}, int(file.rows), n, rows.get());
  return {.n_tokens = n, .bytes = {rows.get(), size}, .owner = rows};
}

}  // namespace

SaveResult Store::Impl::copy(const std::string& src, const std::string& dst, const CopyOptions& options, bool keep_dates) {
  check_agent_id(src);
  check_agent_id(dst);
  constexpr int kAttempts = 20;
  for (int attempt = 1;; ++attempt) {
    // A save in another process may put a new file of `src` in place, and then nobody keeps the segments of the old one.
    const auto before = env.stat(agent_path(src));
    try {
      if (auto result = copy_once(src, dst, options, keep_dates)) return std::move(*result);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kCorruption || attempt == kAttempts || env.stat(agent_path(src)) == before) throw;
      continue;
    }
    if (attempt == kAttempts) {
      throw Error(ErrorCode::kBusy, "The agent '" + src + "' changes while it is copied; try again later.");
    }
  }
}

std::optional<SaveResult> Store::Impl::copy_once(const std::string& src, const std::string& dst, const CopyOptions& options,
                                                 bool keep_dates) {
  Writing writing(*this);
  const OpenedAgent opened = open_agent(src);
  const TorporFile& file = opened.agent.file;
  AgentInfo info = opened.agent.info;
  if (!options.replace && env.exists(agent_path(dst))) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + dst + "' already; choose another id.");
  }
  const int64_t n = options.n_tokens.value_or(info.cache_size);
  if (n < 0 || n > info.cache_size) {
    throw Error(ErrorCode::kInvalidArgument, "The agent '" + src + "' has " + std::to_string(info.cache_size) +
                                                 " tokens; it can't be cut to " + std::to_string(n) + ".");
  }
  if (n < info.cache_size && !file.state().empty()) {
    throw Error(ErrorCode::kInvalidArgument, "The agent '" + src + "' holds state of its last token besides its rows, so it can't be cut to " +
                                                 std::to_string(n) + " tokens; copy it whole.");
  }
  const std::vector<KvState> state = read_state(opened.handle, file);
  const std::vector<int32_t> tokens = read_tokens(opened.handle, file);
  const std::vector<std::string> all_segments = info.segments;
  const SegmentChain chain{info.identity.digest(), layout_digest(file.layout), all_segments, tokens};
  const size_t n_sealed = size_t(n / kSegmentTokens);
  const int rest = int(n % kSegmentTokens);

  KvTail tail;
  if (rest > 0 && n_sealed < all_segments.size()) {
    const std::string& name = all_segments[n_sealed];
    SegmentHeaders headers;
    const OpenedSegment segment = open_segment(env, segment_path(name), name, chain.place(n_sealed), headers);
    tail = first_rows(segment.handle, segment.segment.file, rest);
  } else if (rest > 0) {
    tail = first_rows(opened.handle, file, rest);
  }
  info.segments.resize(n_sealed);
  info.bytes = 0;
  std::vector<std::pair<std::string, FileStat>> segments;
  for (const auto& name : info.segments) {
    const auto stat = env.stat(segment_path(name));
    if (!stat) {
      throw Error(ErrorCode::kCorruption, "The segment '" + segment_path(name).string() + "' of agent '" + src +
                                              "' is missing; restore it from a copy, or cut the agent before it.");
    }
    segments.emplace_back(name, *stat);
    info.bytes += int64_t(stat->size);
  }
  info.agent_id = dst;
  if (options.user) info.user = *options.user;
  if (options.record) info.record = *options.record;
  if (!keep_dates) {
    info.updated_at = format_time(env.now());
    info.created_at = date_of_birth(dst, info.updated_at);
  }
  const AgentDraft draft =
      draft_agent(std::move(info), file.layout, tail.n_tokens, {&tail.bytes, 1}, state, std::span(tokens).first(size_t(n)));
  writing.make_room("Copying the agent '" + src + "' to '" + dst + "'", bytes_to_write(draft), draft.info.segments);
  if (!writing.claim(draft.info.segments, segments)) return std::nullopt;
  SaveResult result;
  result.segments = draft.info.segments;
  result.segments_shared = int(n_sealed);
  if (options.durability == Durability::kFull) flush_segments(segments);
  commit_agent(draft, options.durability, result);
  return result;
}

void Store::Impl::rename_agent(const std::string& id, const std::string& new_id) {
  check_agent_id(id);
  check_agent_id(new_id);
  require_agent(id);
  if (env.exists(agent_path(new_id))) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + new_id + "' already; choose another id.");
  }
  const FileLock lock = lock_agent(id), new_lock = lock_agent(new_id);
  copy(id, new_id, {}, /*keep_dates=*/true);
  remove_agent_file(id);
  tidy_after_agent(id, lock);
}

}  // namespace torpor
