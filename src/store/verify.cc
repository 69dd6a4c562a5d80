/// verify: every byte of an agent and of the segments it names, changing nothing.

#include "store/segment_headers.h"
#include "store/store_impl.h"

namespace torpor {

VerifyReport Store::Impl::verify(const std::string& id, std::unordered_map<std::string, std::string>& checked_rows) {
  check_agent_id(id);
  constexpr int kAttempts = 5;
  for (int attempt = 1;; ++attempt) {
    const auto before = env.stat(agent_path(id));
    VerifyReport report = verify_once(id, checked_rows);
    // A save or a rewind in another process may have put a new agent file in place, and what is missing is no longer needed.
    if (report.problems.empty() || attempt == kAttempts || env.stat(agent_path(id)) == before) return report;
  }
}

VerifyReport Store::Impl::verify_once(const std::string& id, std::unordered_map<std::string, std::string>& checked_rows) {
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
  const SegmentChain chain{info.identity.digest(), layout_digest(opened->agent.file.layout), info.segments, tokens};
  bool intact = true;
  SegmentHeaders headers;
  for (size_t i = 0; i < info.segments.size(); ++i) {
    const std::string& name = info.segments[i];
    std::string problem;
    try {
      const OpenedSegment segment = open_segment(env, segment_path(name), name, chain.place(i), headers);
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
    read_state(opened->handle, opened->agent.file);
  } catch (const Error& error) {
    report.problems.push_back(error.what());
  }
  return report;
}

}  // namespace torpor
