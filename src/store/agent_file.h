#pragma once
/// The agent file: the ids, messages and rows that no part and no segment holds, and in its metadata all that `ls` and `load`
/// need. An export is the same with every row in it, tensor by tensor, and no segments.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "store/parts.h"
#include "store/torpor_file.h"
#include "torpor/store.h"

namespace torpor {

struct AgentFile {
  TorporFile file;
  AgentInfo info;  ///< `bytes` counts this file alone
  std::string uid;              ///< names its parts; empty before version 3
  std::vector<PartRef> parts;   ///< first to last
  int64_t first = 0;            ///< position of the first id in this file
  /// Neither it nor its parts have rows: who wakes the agent computes those behind the last segment
  /// (AgentInfo::bare_tail).
  bool without_tail = false;
  std::string whole;            ///< then the checksum of the file with rows that this one was made of; may be empty
  /// Before version 3 messages are metadata; later they are a tensor of this file and of parts.
  std::vector<StoredMessage> old_messages;
};

/// Every rule that can be checked without the data, the parts and the segments. Versions 1 to 3.
AgentFile parse_agent_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);
AgentFile parse_export_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name);

/// What the first bytes of a file say, unchecked.
struct AgentFileBeginning {
  bool is_ours = false;  ///< an agent file, be it cut short or damaged
  std::string agent_id;  ///< empty when it is not said, or can't be
};
inline constexpr size_t kAgentFileBeginning = 320;  ///< bytes that say it
AgentFileBeginning read_beginning(std::string_view text);

/// What `file.info`, `uid`, `parts` and `first` say, as metadata. Where `uid` is empty that of an export. kInvalidArgument when
/// a key occurs twice or can't be kept.
Metadata agent_metadata(const AgentFile& file);

/// A part: what of an earlier agent file is still read.
struct PartFile {
  TorporFile file;
  int64_t first = 0;  ///< position of its first id
};
PartFile parse_part_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name,
                         const KnownLayout& layout);

/// RFC 3339 in UTC with microseconds.
std::string format_time(std::chrono::system_clock::time_point time);

/// AgentInfo::states, or none.
inline std::span<const StateRef> states_of(const AgentInfo& info) {
  return info.states ? std::span<const StateRef>(*info.states) : std::span<const StateRef>();
}

/// AgentInfo::window.
int window_apart(const KvLayout& layout);

/// Names of their files.
std::vector<std::string> state_names(const AgentInfo& info);

bool is_agent_id(std::string_view id);

}  // namespace torpor
