/// Looking again: verify, at all of an agent and its segments; recheck, at mapped rows that the system let go of.

#include "store/segment_headers.h"
#include "store/states.h"
#include "store/store_impl.h"

namespace torpor {
namespace {

VerifyReport verify_once(Store::Impl& store, const std::string& id,
                         std::unordered_map<std::string, std::string>& checked_rows) {
  VerifyReport report;
  report.agent_id = id;
  std::optional<OpenedAgent> opened;
  try {
    opened = store.agents.open(id);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kNotFound) throw;
    report.problems.push_back(error.what());
    report.readable = error.code() != ErrorCode::kIo;
    return report;
  }
  const AgentInfo& info = opened->agent.info;
  const KvLayout& layout = opened->agent.file.layout;
  // Every file of its own, also behind one that is damaged.
  std::vector<int32_t> tokens;
  RowBuffer rows;
  int64_t own_intact = 0;
  for (const OpenedFile& file : store.agents.open_files(*opened)) {
    std::string problem = file.problem;
    try {
      if (file.handle != nullptr) {
        const OwnContents contents = read_own_file(file, layout, &rows);
        problem = contents.problem;
        if (int64_t(tokens.size()) == file.ref.first)
          tokens.insert(tokens.end(), contents.ids.begin(), contents.ids.end());
      }
    } catch (const Error& error) {
      problem = error.what();
    }
    if (!problem.empty()) {
      report.problems.push_back(problem);
    } else if (own_intact == file.ref.first) {
      own_intact = file.ref.end();
    }
  }
  const SegmentChain chain(info.identity, info.lineage, layout, info.segments, tokens);
  bool intact = true;
  SegmentHeaders headers;
  for (size_t i = 0; i < info.segments.size(); ++i) {
    const std::string& name = info.segments[i];
    std::string problem;
    try {
      if ((i + 1) * kSegmentTokens > tokens.size()) break;  // what they belong to is damaged, and said
      const OpenedSegment segment = open_segment(store.segments, name, chain.place(i), headers);
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
      if (error.code() == ErrorCode::kIo) report.readable = false;
    }
    if (problem.empty()) {
      if (intact) report.intact_tokens += kSegmentTokens;
    } else {
      intact = false;
      report.problems.push_back(problem);
    }
  }
  const StateChain state_chain(info.identity, info.lineage, layout, info.segments, tokens);
  std::vector<StateRef> intact_states;
  for (const StateRef& state : states_of(info)) {
    if (state.position > int64_t(tokens.size())) break;  // what they belong to is damaged, and said
    auto [entry, is_new] = checked_rows.try_emplace(state.file);
    try {
      const OpenedState file = open_state(store.states, state_chain, state);
      if (is_new) read_state(file, state, allocate_heap_buffer);
    } catch (const Error& error) {
      entry->second = error.code() == ErrorCode::kNotFound ? missing_state(store, state) : error.what();
      if (error.code() == ErrorCode::kIo) report.readable = false;
    }
    if (!entry->second.empty()) {
      report.problems.push_back(entry->second);
    } else {
      intact_states.push_back(state);
    }
  }
  try {
    if (intact && report.intact_tokens == int64_t(info.segments.size()) * kSegmentTokens) {
      report.intact_tokens = std::max(report.intact_tokens, own_intact);
    }
    // Rows behind the last intact state are computed again, and those that were left out.
    if (info.states || info.bare_tail) {
      AgentInfo left = info;
      if (info.states) left.states = intact_states;
      report.intact_tokens = resumable_tokens(left, report.intact_tokens);
    }
    read_state(opened->handle, opened->agent.file);
  } catch (const Error& error) {
    report.problems.push_back(error.what());
  }
  return report;
}

}  // namespace

VerifyReport verify(Store::Impl& store, const std::string& id,
                    std::unordered_map<std::string, std::string>& checked_rows) {
  check_agent_id(id);
  constexpr int kAttempts = 5;
  for (int attempt = 1;; ++attempt) {
    const auto before = store.agents.stat(id);
    VerifyReport report = verify_once(store, id, checked_rows);
    // A save or a rewind in another process may have put a new agent file in place, and what is missing is no longer needed.
    if (report.problems.empty() || attempt == kAttempts || store.agents.stat(id) == before) return report;
  }
}

bool recheck(Store::Impl& store, const KvLayout& layout, const SealedRun& run, const TensorMask& wanted) {
  const auto segment = run.segment();
  if (!run.mapped() || segment == nullptr) return false;
  TensorMask todo(layout.tensors.size());
  bool in_memory = true;
  size_t begin = 0, end = 0;  // neighbouring tensors are asked for at once
  for (size_t t = 0; t <= todo.size() && in_memory; ++t) {
    if (t < todo.size()) todo[t] = (wanted.empty() || wanted[t]) && (run.checked().empty() || run.checked()[t]);
    const size_t offset = layout.offset(t, kSegmentTokens);
    if (t < todo.size() && todo[t]) {
      if (begin == end) begin = offset;
      end = layout.offset(t + 1, kSegmentTokens);
    } else if (begin < end) {
      in_memory = store.env.raw_in_memory(run.bytes().subspan(begin, end - begin));
      begin = end;
    }
  }
  const auto damaged = [&] {
    return Error(ErrorCode::kCorruption,
                 "'" + store.segments.path(segment->name).string() +
                     "' is damaged, and so are the rows "
                     "of it that are in use; wake the agent again, which goes on from what is intact.");
  };
  if (run.damaged()) throw damaged();
  if (in_memory) return false;
  try {
    // Through the file: a disk that fails is then an error, where touching the mapping would end the process.
    const auto known_file = store.known.file(segment->name);
    const auto stat = store.segments.find(segment->name);
    if (stat && known_file && known_file->stat == *stat) {
      const File handle = store.segments.open(segment->name);
      const auto header = read_header_bytes(handle, stat->size);
      check_rows(handle, parse_segment_file(header, stat->size, handle.path().string()).file, todo);
      return true;
    }
    // The file was removed or replaced, and the mapping is what is left of it.
    const std::span<const std::byte> rows = run.bytes();
    if (covers(run.checked(), {}) &&
        content_digest(run_checksums(layout, kSegmentTokens, {&rows, 1})) != segment->content) {
      throw damaged();
    }
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kCorruption) {
      run.set_damaged();
      store.known.forget(segment->name);
    }
    throw;
  }
  return true;
}

}  // namespace torpor
