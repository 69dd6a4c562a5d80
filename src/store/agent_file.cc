#include "store/agent_file.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <ctime>
#include <unordered_set>

#include "store/messages.h"
#include "store/state_file.h"
#include "torpor/error.h"

namespace torpor {
namespace {

constexpr std::string_view kIdentityPrefix = "identity.", kUserPrefix = "user.", kRecordPrefix = "torpor.";
constexpr std::string_view kOldInt8Suffix = "+int8";
constexpr const char* kOldNames = "1";
constexpr std::string_view kStatesKey = "states", kBareTailKey = "bare_tail", kWholeKey = "whole";  // of the record
constexpr std::string_view kAllRows = "all";  // of kBareTailKey

bool parse_number(std::string_view text, int64_t& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size() && out >= 0;
}

/// "f32/kernels/l16-fma", or where they changed "f32/kernels/l16-fma,512:int16/kernels/l16-fma".
std::string encode_numerics(const std::vector<Lineage::Range>& ranges) {
  std::string text;
  for (const Lineage::Range& range : ranges) {
    if (range.numerics.find_first_of(",:") != std::string::npos) {
      throw Error(ErrorCode::kInvalidArgument,
                  "'" + range.numerics + "' can't be the name of numerics: it has a ',' or ':' in it.");
    }
    if (!text.empty()) text += "," + std::to_string(range.first) + ":";
    text += range.numerics;
  }
  return text;
}

bool decode_numerics(std::string_view text, std::vector<Lineage::Range>& ranges) {
  for (const std::string& entry : split(text)) {
    Lineage::Range range;
    if (ranges.empty()) {
      range.numerics = entry;
    } else {
      const size_t colon = entry.find(':');
      if (colon == std::string::npos || !parse_number(std::string_view(entry).substr(0, colon), range.first) ||
          range.first % kSegmentTokens != 0 || range.first <= ranges.back().first) {
        return false;
      }
      range.numerics = entry.substr(colon + 1);
      if (range.numerics.empty()) return false;
    }
    if (range.numerics.find(':') != std::string::npos) return false;
    ranges.push_back(std::move(range));
  }
  return true;
}

/// What versions 1 and 2 kept otherwise: seven fields of identity, the numerics in one of them, the record among the user's.
void take_old_fields(AgentFile& agent, std::vector<std::pair<std::string, std::string>>& identity) {
  AgentInfo& info = agent.info;
  for (auto& [name, value] : identity) {
    if (name == "tokenizer") info.conversation.tokenizer = value;
    if (name == "chat_template") info.conversation.chat_template = value;
    if (name != "config") continue;
    const bool int8 = value.ends_with(kOldInt8Suffix);
    if (int8) value.resize(value.size() - kOldInt8Suffix.size());
    info.lineage.ranges = {{0, int8 ? "int8" : "f32"}};
  }
  std::erase_if(identity,
                [](const auto& field) { return field.first == "tokenizer" || field.first == "chat_template"; });
  info.lineage.old_names = info.conversation;
  // Torpor's own keys, which the first files of these versions have among the user's.
  UserMetadata old;
  std::swap(old, info.record);
  const bool apart = !old.empty();
  if (!apart) old = info.user;
  const auto value_of = [&](std::string_view key) {
    const auto found = std::find_if(old.begin(), old.end(), [&](const auto& entry) { return entry.first == key; });
    return found == old.end() ? nullptr : &found->second;
  };
  // The engine wrote both of these, always; whoever else has such keys keeps them.
  const std::string *messages = value_of("messages"), *ends = value_of("message_ends");
  if (messages == nullptr || ends == nullptr || value_of("mlx_lm.cache") != nullptr ||
      !decode_old_messages(*messages, *ends, info.cache_size, agent.old_messages)) {
    return;
  }
  std::vector<std::string_view> taken = {"messages", "message_ends"};
  int64_t number = 0;
  for (const char* key : {"history_tokens", "shortest_cut", "pinned"}) {
    const std::string* value = value_of(key);
    if (value == nullptr || !(key == std::string_view("pinned") ? *value == "true" : parse_number(*value, number)))
      continue;
    info.record.emplace_back(key, *value);
    taken.push_back(key);
  }
  if (apart) return;
  std::erase_if(info.user,
                [&](const auto& entry) { return std::find(taken.begin(), taken.end(), entry.first) != taken.end(); });
}

void take_fields(AgentFile& agent, const std::string& file_name) {
  AgentInfo& info = agent.info;
  const TorporFile& file = agent.file;
  info.conversation = {file.required("conversation.tokenizer", file_name),
                       file.required("conversation.chat_template", file_name)};
  if (!decode_numerics(file.required("numerics", file_name), info.lineage.ranges))
    corrupt(file_name, "its numerics can't be understood");
  if (const std::string* names = file.header.metadata_value("names")) {
    if (*names != kOldNames) {
      throw Error(ErrorCode::kIncompatible, "'" + file_name + "' names its segments in the way '" + *names +
                                                "', which this Torpor does not know; use a newer one.")
          .with_path(file_name)
          .with_field("names", kOldNames, *names);
    }
    info.lineage.old_names = {file.required("names.tokenizer", file_name),
                              file.required("names.chat_template", file_name)};
  }
  if (const std::string* salt = file.header.metadata_value("salt")) info.lineage.salt = *salt;
  if (file.kind != "agent") return;
  agent.uid = file.required("uid", file_name);
  if (!is_hex_digest(agent.uid)) corrupt(file_name, "its uid is none");
  const auto parts = decode_parts(file.required("parts", file_name));
  if (!parts) corrupt(file_name, "its list of parts can't be understood");
  agent.parts = *parts;
  for (const PartRef& part : agent.parts) info.parts.push_back(part_stem(agent.uid, part.name));
  if (!parse_number(file.required("first", file_name), agent.first) ||
      agent.first != (parts->empty() ? 0 : parts->back().end())) {
    corrupt(file_name, "its ids do not follow those of its parts");
  }
  // One in the file's size, the other below 2^62 by what `segments` and `cache_size` are compared with.
  info.cache_size += agent.first;
}

void take_states(AgentFile& agent, const std::string& file_name) {
  AgentInfo& info = agent.info;
  info.window = window_apart(agent.file.layout);
  const auto bare = std::ranges::find(info.record, kBareTailKey, &RecordMetadata::value_type::first);
  if (bare != info.record.end()) {
    info.bare_tail = true;
    agent.without_tail = bare->second == kAllRows;
    info.record.erase(bare);
  }
  const auto whole = std::ranges::find(info.record, kWholeKey, &RecordMetadata::value_type::first);
  if (whole != info.record.end()) {
    if (!agent.without_tail || !is_hex_digest(whole->second)) corrupt(file_name, "it is made of no file with rows");
    agent.whole = whole->second;
    info.record.erase(whole);
  }
  const auto entry = std::ranges::find(info.record, kStatesKey, &RecordMetadata::value_type::first);
  if (entry == info.record.end()) return;
  const bool in_export = agent.file.kind == "export";
  info.states = decode_states(entry->second, info.cache_size, in_export);
  if (!info.states) corrupt(file_name, "its list of states can't be understood");
  // Of an export the only one is that after the last token, in the file itself.
  const bool has_own = agent.file.state_tensors > 0;
  if (in_export ? has_own != (info.cache_size > 0) || info.states->size() != size_t(has_own) : has_own) {
    corrupt(file_name, "its list of states and its state don't fit each other");
  }
  info.record.erase(entry);
}

AgentFile parse_fields(TorporFile parsed, uint64_t file_size, const std::string& file_name) {
  AgentFile agent;
  agent.file = std::move(parsed);
  const TorporFile& file = agent.file;
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
  info.cache_size = int64_t(file.n_tokens);
  if (file.version < 3) {
    take_old_fields(agent, identity);
  } else {
    take_fields(agent, file_name);
  }
  info.identity = Identity::from_fields(identity);
  take_states(agent, file_name);
  if (file.required("cache_size", file_name) != std::to_string(info.cache_size)) {
    corrupt(file_name, "its cache_size is not the number of its tokens");
  }
  return agent;
}

}  // namespace

AgentFile parse_agent_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name) {
  TorporFile file = parse_torpor_file(prefix, file_size, file_name);
  if (file.kind != "agent") corrupt(file_name, "it is of the kind '" + file.kind + "', not an agent");
  AgentFile agent = parse_fields(std::move(file), file_size, file_name);
  const int64_t sealed = int64_t(agent.info.segments.size()) * kSegmentTokens, n_tokens = agent.info.cache_size;
  int64_t rows = int64_t(agent.file.rows);
  bool fits = agent.file.rows < uint64_t(kSegmentTokens) && agent.file.rows <= agent.file.n_tokens;
  for (const PartRef& part : agent.parts) {
    // Rows follow the last segment, each part's those of the one before it.
    fits = fits && part.rows < kSegmentTokens && (part.rows == 0 || part.end() - part.rows >= sealed) &&
           (part.rows > 0 || part.end() <= sealed);
    rows += fits ? part.rows : 0;
  }
  const int64_t tail = n_tokens - sealed;
  const bool has_them = agent.without_tail ? rows == 0 && tail > 0 && tail < kSegmentTokens : rows == tail;
  if (!fits || rows >= kSegmentTokens || !has_them) {
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

PartFile parse_part_file(std::span<const std::byte> prefix, uint64_t file_size, const std::string& file_name,
                         const KnownLayout& layout) {
  PartFile part{parse_torpor_file(prefix, file_size, file_name, &layout), 0};
  if (part.file.version < 3 || (part.file.kind != "agent" && part.file.kind != "part")) {
    corrupt(file_name, "it is of the kind '" + part.file.kind + "' and version " + std::to_string(part.file.version) +
                           ", not a part");
  }
  if (!parse_number(part.file.required("first", file_name), part.first))
    corrupt(file_name, "it does not say which ids it holds");
  if (part.file.rows > part.file.n_tokens) corrupt(file_name, "it has more rows than ids");
  return part;
}

AgentFileBeginning read_beginning(std::string_view text) {
  constexpr size_t kLength = 8, kDigest = 32;
  constexpr std::string_view kFragments[] = {R"({"__metadata__":{"checksum":")", R"(","format_version":")",
                                             R"(","kind":"agent")", R"(,"agent_id":")"};
  AgentFileBeginning beginning;
  // Whatever the damage, two of these are no accident.
  beginning.is_ours = std::count_if(std::begin(kFragments), std::end(kFragments), [&](std::string_view fragment) {
                        return text.find(fragment) != std::string_view::npos;
                      }) >= 2;
  // In the order of the container's rule 1 and of agent_metadata; a file that ends on the way was cut short.
  const auto skip = [&](size_t n) { text.remove_prefix(std::min(n, text.size())); };
  const auto expect = [&](std::string_view fragment) {
    const bool found = text.starts_with(fragment.substr(0, std::min(fragment.size(), text.size())));
    skip(fragment.size());
    return found;
  };
  skip(kLength);
  if (!expect(kFragments[0])) return beginning;
  skip(kDigest);
  if (!expect(kFragments[1])) return beginning;
  skip(text.find_first_not_of("0123456789"));
  if (!expect(kFragments[2]) || !expect(kFragments[3])) return beginning;
  beginning.is_ours = true;
  const size_t end = text.find('"');
  if (end != std::string_view::npos && is_agent_id(text.substr(0, end))) beginning.agent_id = text.substr(0, end);
  return beginning;
}

Metadata agent_metadata(const AgentFile& file) {
  const AgentInfo& info = file.info;
  Metadata metadata = {{"agent_id", info.agent_id}, {"model", info.model}};
  if (!file.uid.empty()) metadata.emplace_back("uid", file.uid);
  metadata.emplace_back("cache_size", std::to_string(info.cache_size));
  metadata.emplace_back("created_at", info.created_at);
  metadata.emplace_back("updated_at", info.updated_at);
  for (const auto& [name, value] : info.identity.fields())
    metadata.emplace_back(std::string(kIdentityPrefix) + name, value);
  metadata.emplace_back("numerics", encode_numerics(info.lineage.ranges));
  metadata.emplace_back("conversation.tokenizer", info.conversation.tokenizer);
  metadata.emplace_back("conversation.chat_template", info.conversation.chat_template);
  if (info.lineage.old_names) {
    metadata.emplace_back("names", kOldNames);
    metadata.emplace_back("names.tokenizer", info.lineage.old_names->tokenizer);
    metadata.emplace_back("names.chat_template", info.lineage.old_names->chat_template);
  }
  if (!info.lineage.salt.empty()) metadata.emplace_back("salt", info.lineage.salt);
  metadata.emplace_back("segments", join(info.segments));
  if (!file.uid.empty()) {
    metadata.emplace_back("parts", encode_parts(file.parts));
    metadata.emplace_back("first", std::to_string(file.first));
  }
  const auto add = [&](std::string_view prefix, const UserMetadata& entries) {
    std::unordered_set<std::string_view> seen;
    for (const auto& [name, value] : entries) {
      if (prefix == kUserPrefix && name.starts_with(kRecordPrefix)) {
        throw Error(ErrorCode::kInvalidArgument,
                    "The metadata key '" + name + "' begins with 'torpor.', as Torpor's own do; choose another.")
            .with_agent(info.agent_id)
            .with_field(name);
      }
      if (!seen.insert(name).second) {
        throw Error(ErrorCode::kInvalidArgument, "The metadata key '" + name + "' is given twice.");
      }
      metadata.emplace_back(std::string(prefix) + name, value);
    }
  };
  RecordMetadata record = info.record;
  if (info.states) record.emplace_back(kStatesKey, encode_states(*info.states));
  if (info.bare_tail) record.emplace_back(kBareTailKey, file.without_tail ? std::string(kAllRows) : "true");
  if (!file.whole.empty()) record.emplace_back(kWholeKey, file.whole);
  add(kRecordPrefix, record);
  add(kUserPrefix, info.user);
  return metadata;
}

int window_apart(const KvLayout& layout) {
  int widest = 0;
  for (size_t t = layout.n_together(); t < layout.tensors.size(); ++t) {
    widest = std::max(widest, layout.tensors[t].window);
  }
  return widest;
}

std::vector<std::string> state_names(const AgentInfo& info) {
  std::vector<std::string> names;
  for (const StateRef& state : states_of(info)) names.push_back(state.file);
  return names;
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
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' ||
                  c == '-';
         });
}

}  // namespace torpor
