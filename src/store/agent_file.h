#pragma once
/// The agent file: `tokens`, the rows past the last sealed segment, and in its metadata all that `ls` and `load` need.
/// An export is the same with every row in it and no segments.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "store/torpor_file.h"
#include "torpor/store.h"

namespace torpor {

struct AgentFile {
  TorporFile file;
  AgentInfo info;  ///< `bytes` counts this file alone
};

/// Every rule that can be checked without the data and the segments.
AgentFile parse_agent_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);
AgentFile parse_export_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);

/// `info.agent_id`, `model`, `identity`, `cache_size`, timestamps, `segments`, `user` and `record` as metadata.
/// kInvalidArgument when a user key occurs twice or begins with "torpor.".
Metadata agent_metadata(const AgentInfo& info);

/// RFC 3339 in UTC with microseconds.
std::string format_time(std::chrono::system_clock::time_point time);

bool is_agent_id(std::string_view id);

}  // namespace torpor
