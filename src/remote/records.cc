#include "remote/records.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>

#include "base/hash.h"
#include "base/json.h"
#include "base/safetensors.h"
#include "torpor/error.h"

namespace torpor::remote {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kVersion = 1;
constexpr std::string_view kBegin = "{\"checksum\":\"";

bool is_hex(std::string_view text, size_t digits = 32) {
  return text.size() == digits && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

/// Decimal digits without a leading zero.
std::optional<int64_t> parse_number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0 || std::to_string(value) != text) return {};
  return value;
}

[[noreturn]] void damaged(const std::string& key, const std::string& problem) {
  throw Error(ErrorCode::kCorruption,
              "The object '" + key + "' is damaged: " + problem + "; restore it from a copy of the bucket.")
      .with_path(key);
}

/// `fields` as a record: the version first, and before all the checksum of the text with zeros in its place.
std::string seal(const char* kind, Json fields) {
  Json json{{"checksum", kNoChecksum}, {kind, kVersion}};
  json.update(fields);
  std::string text;
  try {
    text = dump_json(json);
  } catch (const Json::exception&) {
    throw Error(ErrorCode::kInvalidArgument, "A name that is to be kept in the bucket is no UTF-8; give another one.");
  }
  return with_checksum(std::move(text), kBegin.size());
}

/// The record's JSON. Whatever is not as `seal` writes it is found when the caller encodes what it read.
Json unseal(std::string_view text, const char* kind, size_t most_bytes, const std::string& key) {
  if (text.size() > most_bytes) damaged(key, "it is longer than any such record");
  if (!text.starts_with(kBegin)) damaged(key, "it has no checksum");
  if (!has_checksum(text, kBegin)) damaged(key, "its checksum is another one");
  Json json = parse_json<Json>(text, nullptr, false);
  if (!json.is_object()) damaged(key, "it is no JSON");
  const auto version = json.find(kind);
  if (version == json.end() || !version->is_number_integer()) damaged(key, std::string("it has no '") + kind + "'");
  if (*version != kVersion) {
    throw Error(ErrorCode::kIncompatible, "The object '" + key + "' is of version " + dump_json<Json>(*version) +
                                              ", and this Torpor knows version " + std::to_string(kVersion) +
                                              "; use a newer Torpor.")
        .with_path(key)
        .with_field(kind, std::to_string(kVersion), dump_json<Json>(*version));
  }
  return json;
}

void check_canonical(std::string_view text, const std::string& encoded, const std::string& key) {
  if (text != encoded) damaged(key, "it is not as Torpor writes it");
}

/// Calls `read`, which takes fields out of JSON. What it finds missing, or of another type, is damage.
template <typename Read>
auto reading(const std::string& key, Read read) {
  try {
    return read();
  } catch (const Json::exception&) {
    damaged(key, "a field is missing, or of another type");
  }
}

int64_t number(const Json& json, const char* field, const std::string& key, int64_t least = 0) {
  const Json& value = json.at(field);
  if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t(INT64_MAX) || value.get<int64_t>() < least) {
    damaged(key, std::string("'") + field + "' is no such number");
  }
  return value.get<int64_t>();
}

std::string session(const Json& json, const char* field, const std::string& key, bool may_be_empty) {
  std::string text = json.at(field).get<std::string>();
  if (!is_name(text) && !(may_be_empty && text.empty())) damaged(key, std::string("'") + field + "' is no session");
  return text;
}

std::string hex(const Json& json, const char* field, const std::string& key) {
  std::string text = json.at(field).get<std::string>();
  if (!is_hex(text)) damaged(key, std::string("'") + field + "' is not 32 hex digits");
  return text;
}

Json turn_json(const Turn& turn) {
  if (turn.id.empty() || turn.id.size() > 256 || turn.result.size() > 512 || !is_hex(turn.digest)) {
    throw Error(ErrorCode::kInvalidArgument,
                "A turn's id has 1 to 256 bytes, and what is kept of its result at most 512; give a shorter one.");
  }
  return Json{{"id", turn.id}, {"digest", turn.digest}, {"result", turn.result}};
}

}  // namespace

bool is_name(std::string_view text) {
  return !text.empty() && text.size() <= 128 && text.front() != '.' && text.front() != '-' &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
                  c == '-';
         });
}

std::string turn_mark(const std::string& id) { return hash_hex(id).substr(0, 16); }

std::string head_key(const std::string& agent) { return kAgentsPrefix + agent + "/head"; }
std::string save_key(const std::string& agent, const std::string& file) { return kAgentsPrefix + agent + "/" + file; }
std::string lease_key(const std::string& session) { return kNodesPrefix + session; }

std::string save_name(const SaveName& name) {
  return std::to_string(name.epoch) + "-" + std::to_string(name.sequence) + "-" + name.save_id;
}

std::optional<SaveName> parse_save_name(std::string_view text) {
  const size_t first = text.find('-'), second = first == text.npos ? text.npos : text.find('-', first + 1);
  if (second == text.npos) return std::nullopt;
  const auto epoch = parse_number(text.substr(0, first));
  const auto sequence = parse_number(text.substr(first + 1, second - first - 1));
  const std::string_view save_id = text.substr(second + 1);
  if (!epoch || !sequence || !is_hex(save_id)) return std::nullopt;
  return SaveName{*epoch, *sequence, std::string(save_id)};
}

std::string pool_key(const PoolName& name) {
  return name.path + "." + std::to_string(name.generation) + std::string(kSafetensorsExtension);
}

std::optional<PoolName> parse_pool_key(std::string_view key) {
  const bool in_pool = std::any_of(std::begin(kPoolPrefixes), std::end(kPoolPrefixes),
                                   [&](const char* prefix) { return key.starts_with(prefix); });
  if (!in_pool || !key.ends_with(kSafetensorsExtension)) return std::nullopt;
  key.remove_suffix(kSafetensorsExtension.size());
  const size_t dot = key.rfind('.');
  if (dot == key.npos || key.find("..") != key.npos) return std::nullopt;
  const auto generation = parse_number(key.substr(dot + 1));
  if (!generation) return std::nullopt;
  return PoolName{std::string(key.substr(0, dot)), *generation};
}

std::string encode(const Head& head) {
  Json fields{{"epoch", head.epoch}, {"sequence", head.sequence}, {"save_id", head.save_id},
              {"owner", head.owner}, {"file", head.file},         {"deleted", head.deleted},
              {"past", head.past}};
  if (head.turn) fields["turn"] = turn_json(*head.turn);
  return seal("torpor_head", std::move(fields));
}

Head decode_head(std::string_view text, const std::string& key) {
  const Json json = unseal(text, "torpor_head", kMostRecordBytes, key);
  const Head head = reading(key, [&] {
    Head head{.epoch = number(json, "epoch", key, 1),
              .sequence = number(json, "sequence", key, 1),
              .save_id = hex(json, "save_id", key),
              .owner = session(json, "owner", key, true),
              .file = json.at("file").get<std::string>(),
              .deleted = json.at("deleted").get<bool>(),
              .turn = {},
              .past = json.at("past").get<std::vector<std::string>>()};
    const auto is_mark = [](const std::string& text) { return is_hex(text, 16); };
    const bool marks = std::all_of(head.past.begin(), head.past.end(), is_mark);
    if (!marks || head.past.size() > kMostPast) damaged(key, "'past' is no list of turns");
    if (!head.file.empty() && !parse_save_name(head.file)) damaged(key, "'file' is no name of a save");
    if (const auto turn = json.find("turn"); turn != json.end()) {
      head.turn = Turn{turn->at("id").get<std::string>(), hex(*turn, "digest", key),
                       turn->at("result").get<std::string>()};
      const bool fits = !head.turn->id.empty() && head.turn->id.size() <= 256 && head.turn->result.size() <= 512;
      if (!fits) damaged(key, "'turn' is too long");
    }
    return head;
  });
  check_canonical(text, encode(head), key);
  return head;
}

std::string encode(const Lease& lease) {
  return seal("torpor_lease", Json{{"session", lease.session},
                                   {"address", lease.address},
                                   {"room", lease.room},
                                   {"ttl_ms", lease.ttl_ms},
                                   {"generation", lease.generation},
                                   {"renewals", lease.renewals}});
}

Lease decode_lease(std::string_view text, const std::string& key) {
  const Json json = unseal(text, "torpor_lease", kMostRecordBytes, key);
  const Lease lease = reading(key, [&] {
    return Lease{.session = session(json, "session", key, false),
                 .address = json.at("address").get<std::string>(),
                 .room = number(json, "room", key),
                 .ttl_ms = number(json, "ttl_ms", key, 1),
                 .generation = number(json, "generation", key),
                 .renewals = number(json, "renewals", key)};
  });
  if (lease_key(lease.session) != key) damaged(key, "it is another session's");
  if (lease.ttl_ms > 3'600'000) damaged(key, "'ttl_ms' is more than an hour");
  check_canonical(text, encode(lease), key);
  return lease;
}

std::string encode(const SweepRecord& record) {
  return seal("torpor_sweep",
              Json{{"generation", record.generation}, {"sweeper", record.sweeper}, {"save_id", record.save_id}});
}

SweepRecord decode_sweep(std::string_view text, const std::string& key) {
  const Json json = unseal(text, "torpor_sweep", kMostRecordBytes, key);
  const SweepRecord record = reading(key, [&] {
    return SweepRecord{.generation = number(json, "generation", key),
                       .sweeper = session(json, "sweeper", key, true),
                       .save_id = hex(json, "save_id", key)};
  });
  check_canonical(text, encode(record), key);
  return record;
}

std::string encode(const SealRecord& record) { return seal("torpor_seal", Json{{"names", record.names}}); }

SealRecord decode_seal(std::string_view text, const std::string& key) {
  const Json json = unseal(text, "torpor_seal", kMostRecordBytes, key);
  const SealRecord record = reading(key, [&] { return SealRecord{.names = hex(json, "names", key)}; });
  check_canonical(text, encode(record), key);
  return record;
}

std::string encode_manifest(const std::vector<std::string>& keys) {
  const std::string json = seal("torpor_save", Json{{"keys", keys}});
  std::string text;
  for (int i = 0; i < 8; ++i) text.push_back(char(uint64_t(json.size()) >> (8 * i) & 0xff));
  return text + json;
}

size_t manifest_bytes(std::string_view text, uint64_t object_bytes, const std::string& key) {
  uint64_t bytes = 0;
  if (text.size() < 8) damaged(key, "it ends before its manifest");
  for (int i = 0; i < 8; ++i) bytes |= uint64_t(uint8_t(text[size_t(i)])) << (8 * i);
  if (bytes > kMostManifestBytes) damaged(key, "its manifest is longer than any");
  if (bytes + 8 > object_bytes) damaged(key, "it ends within its manifest");
  return size_t(bytes) + 8;
}

std::vector<std::string> decode_manifest(std::string_view text, const std::string& key) {
  const size_t end = manifest_bytes(text, text.size(), key);
  const Json json = unseal(text.substr(8, end - 8), "torpor_save", kMostManifestBytes, key);
  const auto keys = reading(key, [&] { return json.at("keys").get<std::vector<std::string>>(); });
  for (const std::string& name : keys) {
    if (!parse_pool_key(name)) damaged(key, "it names something that is no segment, state or part");
  }
  check_canonical(text.substr(0, end), encode_manifest(keys), key);
  return keys;
}

}  // namespace torpor::remote
