#include "store/sidecar.h"

#include <algorithm>

#include "base/hash.h"
#include "base/json.h"
#include "store/agent_file.h"
#include "torpor/error.h"

namespace torpor {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kSidecarPrefix = "{\n  \"sidecar_checksum\": \"";

/// A number that can be one of bytes or tokens; whoever adds them up relies on it.
int64_t count_of(const Json& number) {
  const bool fits = number.is_number_unsigned() && number.get<uint64_t>() <= uint64_t(INT64_MAX);
  if (!fits) throw Error(ErrorCode::kCorruption, "A number of the sidecar is none.");
  return number.get<int64_t>();
}

}  // namespace

std::string encode_sidecar(const AgentInfo& info, const FileStat& agent_file) {
  Json identity = Json::object(), user = Json::object(), record = Json::object();
  for (const auto& [name, value] : info.identity.fields()) identity[name] = value;
  for (const auto& [name, value] : info.user) user[name] = value;
  for (const auto& [name, value] : info.record) record[name] = value;
  Json lineage = {{"numerics", Json::array()}};
  for (const auto& [first, numerics] : info.lineage.ranges) lineage["numerics"].push_back({first, numerics});
  if (const auto& old = info.lineage.old_names) lineage["old_names"] = {old->tokenizer, old->chat_template};
  if (!info.lineage.salt.empty()) lineage["salt"] = info.lineage.salt;
  Json json = {
      {"sidecar_checksum", kNoChecksum},
      {"agent_id", info.agent_id},
      {"model", info.model},
      {"hash", info.hash},
      {"cache_size", info.cache_size},
      {"created_at", info.created_at},
      {"updated_at", info.updated_at},
      {"identity", identity},
      {"lineage", lineage},
      {"conversation",
       {{"tokenizer", info.conversation.tokenizer}, {"chat_template", info.conversation.chat_template}}},
      {"record", record},
      {"user", user},
      {"bytes", info.bytes},
      {"tail_bytes", info.tail_bytes},
      {"segment_count", info.segments.size()},
      {"segments", info.segments},
      {"parts", info.parts}};
  if (info.states) {
    json["state_bytes"] = info.state_bytes;
    json["states"] = Json::array();
    for (const auto& [position, state] : *info.states) json["states"].push_back({position, state});
  }
  if (info.window > 0) json["window"] = info.window;
  if (info.bare_tail) json["bare_tail"] = true;
  json["agent_file"] = {{"size", agent_file.size}, {"mtime_ns", agent_file.mtime_ns}, {"inode", agent_file.inode}};
  // The texts come from a file or call that has been checked for UTF-8; `replace` keeps this from ever throwing.
  std::string text = dump_json(json, 2, Json::error_handler_t::replace) + "\n";
  return with_checksum(std::move(text), kSidecarPrefix.size());
}

bool is_sidecar(std::string_view beginning) {
  const size_t n = std::min(beginning.size(), kSidecarPrefix.size());
  size_t damaged = 0;
  for (size_t i = 0; i < n; ++i) damaged += beginning[i] != kSidecarPrefix[i];
  return damaged <= n / 8;
}

std::optional<AgentInfo> decode_sidecar(const std::string& text, const FileStat& agent_file) {
  if (!has_checksum(text, kSidecarPrefix)) return std::nullopt;
  try {
    // Deeper than any sidecar is: not looked at, for copying it recurses.
    constexpr int kDeepest = 8;
    const auto shallow = [](int depth, Json::parse_event_t, Json&) { return depth <= kDeepest; };
    const Json json = parse_json<Json>(text, shallow);
    const Json& file = json.at("agent_file");
    // As JSON, for a number of another kind is another number.
    if (file.at("size") != agent_file.size || file.at("mtime_ns") != agent_file.mtime_ns ||
        file.at("inode") != agent_file.inode) {
      return std::nullopt;
    }
    AgentInfo info;
    info.agent_id = json.at("agent_id").get<std::string>();
    info.model = json.at("model").get<std::string>();
    info.hash = json.at("hash").get<std::string>();
    info.cache_size = count_of(json.at("cache_size"));
    info.created_at = json.at("created_at").get<std::string>();
    info.updated_at = json.at("updated_at").get<std::string>();
    info.bytes = count_of(json.at("bytes"));
    info.tail_bytes = count_of(json.at("tail_bytes"));
    info.segments = json.at("segments").get<std::vector<std::string>>();
    info.parts = json.at("parts").get<std::vector<std::string>>();
    if (const auto states = json.find("states"); states != json.end()) {
      info.state_bytes = count_of(json.at("state_bytes"));
      info.states.emplace();
      for (const Json& state : *states) {
        info.states->push_back({count_of(state.at(0)), state.at(1).get<std::string>()});
      }
    }
    if (const auto window = json.find("window"); window != json.end()) {
      info.window = int(std::min<int64_t>(count_of(*window), std::numeric_limits<int>::max()));
    }
    info.bare_tail = json.contains("bare_tail");
    // Of its own are the agent file and its parts.
    if (info.tail_bytes < int64_t(agent_file.size) || info.bytes < info.tail_bytes) return std::nullopt;
    if (info.state_bytes > info.bytes - info.tail_bytes) return std::nullopt;
    std::vector<std::pair<std::string, std::string>> identity;
    for (const auto& [name, value] : json.at("identity").items()) identity.emplace_back(name, value.get<std::string>());
    info.identity = Identity::from_fields(identity);
    for (const Json& range : json.at("lineage").at("numerics")) {
      info.lineage.ranges.push_back({count_of(range.at(0)), range.at(1).get<std::string>()});
    }
    if (const auto old = json.at("lineage").find("old_names"); old != json.at("lineage").end()) {
      info.lineage.old_names = {old->at(0).get<std::string>(), old->at(1).get<std::string>()};
    }
    info.lineage.salt = json.at("lineage").value("salt", "");
    const Json& conversation = json.at("conversation");
    info.conversation = {conversation.at("tokenizer").get<std::string>(),
                         conversation.at("chat_template").get<std::string>()};
    for (const auto& [name, value] : json.at("record").items())
      info.record.emplace_back(name, value.get<std::string>());
    for (const auto& [name, value] : json.at("user").items()) info.user.emplace_back(name, value.get<std::string>());
    return info;
  } catch (const std::exception&) {
    return std::nullopt;  // a sidecar of another version: rebuilt
  }
}

}  // namespace torpor
