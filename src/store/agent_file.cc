#include "store/agent_file.h"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <unordered_set>

#include "torpor/error.h"

namespace torpor {
namespace {

constexpr std::string_view kIdentityPrefix = "identity.";
constexpr std::string_view kUserPrefix = "user.";
constexpr std::string_view kRecordPrefix = "torpor.";

[[noreturn]] void corrupt(const std::string& file_name, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "'" + file_name + "' is damaged: " + what + ".");
}

/// Earlier files of versions 1 and 2 have Torpor's own among the caller's. The engine wrote the conversation and its ends always
/// together; whoever else has a key of such a name (a file made from Python, which describes its cache) keeps it.
void take_old_record(AgentInfo& info) {
  const auto has = [&](std::string_view key) {
    return std::any_of(info.user.begin(), info.user.end(), [&](const auto& entry) { return entry.first == key; });
  };
  if (!info.record.empty() || !has("messages") || !has("message_ends") || has("mlx_lm.cache")) return;
  const auto old = std::stable_partition(info.user.begin(), info.user.end(), [](const auto& entry) {
    static constexpr std::string_view kOld[] = {"messages", "message_ends", "history_tokens", "shortest_cut", "pinned"};
    return std::find(std::begin(kOld), std::end(kOld), entry.first) == std::end(kOld);
  });
  info.record.assign(std::make_move_iterator(old), std::make_move_iterator(info.user.end()));
  info.user.erase(old, info.user.end());
}

AgentFile parse_fields(TorporFile file, uint64_t file_size, const std::string& file_name) {
  AgentFile agent;
  AgentInfo& info = agent.info;
  info.agent_id = file.required("agent_id", file_name);
  if (!is_agent_id(info.agent_id)) corrupt(file_name, "it names the impossible agent id '" + info.agent_id + "'");
  info.model = file.required("model", file_name);
  info.created_at = file.required("created_at", file_name);
  info.updated_at = file.required("updated_at", file_name);
  info.hash = file.checksum;
  info.bytes = info.tail_bytes = int64_t(file_size);
  info.segments = split(file.required("segments", file_name));
  if (!std::all_of(info.segments.begin(), info.segments.end(), is_hex_digest)) {
    corrupt(file_name, "its list of segments holds something that is no segment's name");
  }
  std::vector<std::pair<std::string, std::string>> identity;
  for (const auto& [key, value] : file.header.metadata) {
    if (key.starts_with(kIdentityPrefix)) identity.emplace_back(key.substr(kIdentityPrefix.size()), value);
    if (key.starts_with(kUserPrefix)) info.user.emplace_back(key.substr(kUserPrefix.size()), value);
    if (key.starts_with(kRecordPrefix)) info.record.emplace_back(key.substr(kRecordPrefix.size()), value);
  }
  take_old_record(info);
  info.identity = Identity::from_fields(identity);
  info.cache_size = int64_t(file.n_tokens);
  if (file.required("cache_size", file_name) != std::to_string(info.cache_size)) {
    corrupt(file_name, "its cache_size is not the number of its tokens");
  }
  agent.file = std::move(file);
  return agent;
}

}  // namespace

AgentFile parse_agent_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name) {
  TorporFile file = parse_torpor_file(prefix, file_size, file_name);
  if (file.kind != "agent") corrupt(file_name, "it is of the kind '" + file.kind + "', not an agent");
  AgentFile agent = parse_fields(std::move(file), file_size, file_name);
  const uint64_t rows = agent.file.rows, n_tokens = agent.file.n_tokens;
  // Both bounds come from the file's own size, so nothing here can overflow.
  if (rows >= kSegmentTokens || agent.info.segments.size() * uint64_t(kSegmentTokens) + rows != n_tokens) {
    corrupt(file_name, std::to_string(agent.info.segments.size()) + " segments and " + std::to_string(rows) +
                           " rows do not make its " + std::to_string(n_tokens) + " tokens");
  }
  return agent;
}

AgentFile parse_export_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name) {
  TorporFile file = parse_torpor_file(prefix, file_size, file_name);
  if (file.kind != "export") {
    throw Error(ErrorCode::kInvalidArgument, "'" + file_name + "' is of the kind '" + file.kind +
                                                 "', not an export; export the agent and import that file.")
        .with_path(file_name)
        .with_field("kind", "export", file.kind);
  }
  AgentFile agent = parse_fields(std::move(file), file_size, file_name);
  if (!agent.info.segments.empty()) corrupt(file_name, "an export names segments");
  if (agent.file.rows != agent.file.n_tokens) corrupt(file_name, "its rows are not as many as its tokens");
  return agent;
}

Metadata agent_metadata(const AgentInfo& info) {
  Metadata metadata = {{"agent_id", info.agent_id},
                       {"model", info.model},
                       {"cache_size", std::to_string(info.cache_size)},
                       {"created_at", info.created_at},
                       {"updated_at", info.updated_at}};
  for (const auto& [name, value] : info.identity.fields()) metadata.emplace_back(std::string(kIdentityPrefix) + name, value);
  metadata.emplace_back("segments", join(info.segments));
  std::unordered_set<std::string_view> seen;
  for (const auto& [name, value] : info.user) {
    if (!seen.insert(name).second) {
      throw Error(ErrorCode::kInvalidArgument, "The metadata key '" + name + "' is given twice.");
    }
    if (name.starts_with(kRecordPrefix)) {
      throw Error(ErrorCode::kInvalidArgument, "The metadata key '" + name + "' begins with 'torpor.', as Torpor's own do; choose another.")
          .with_agent(info.agent_id)
          .with_field(name);
    }
    metadata.emplace_back(std::string(kUserPrefix) + name, value);
  }
  for (const auto& [name, value] : info.record) metadata.emplace_back(std::string(kRecordPrefix) + name, value);
  return metadata;
}

std::string format_time(std::chrono::system_clock::time_point time) {
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(time.time_since_epoch()).count();
  const std::time_t seconds = std::time_t(micros / 1'000'000);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char text[64];
  const size_t length = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
  std::snprintf(text + length, sizeof text - length, ".%06dZ", int(micros % 1'000'000));
  return text;
}

bool is_agent_id(std::string_view id) {
  return !id.empty() && id.size() <= 128 && id[0] != '.' && id[0] != '-' &&
         std::all_of(id.begin(), id.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
         });
}

}  // namespace torpor
