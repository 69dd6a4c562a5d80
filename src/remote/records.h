#pragma once
/// What a bucket holds beside rows, and under which keys (docs/format.md, "A bucket").
///
/// A record is canonical JSON with a checksum. Reading one throws kCorruption, with one sentence, for any other bytes:
/// a flipped one, a longer number, another order. kIncompatible: a newer version's. Nothing is allocated by an input's
/// word; `key` names the object in errors.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torpor::remote {

/// Longest record but a manifest, in bytes.
inline constexpr size_t kMostRecordBytes = 8192;
inline constexpr size_t kMostManifestBytes = size_t(64) << 20;
/// Longest save that is read whole: its manifest, and an agent file.
inline constexpr uint64_t kMostSaveBytes = uint64_t(2) << 30;

/// A turn that was committed: what a client that asks again is answered from.
struct Turn {
  std::string id;      ///< the client's name for it, 1 to 256 bytes of UTF-8
  std::string digest;  ///< of its request, 32 hex digits
  std::string result;  ///< where its answer is, at most 512 bytes of UTF-8; the owner's own form
  bool operator==(const Turn&) const = default;
};

/// An agent's one commit point, replaced by compare-and-swap.
struct Head {
  int64_t epoch = 1;      ///< grows with each owner
  int64_t sequence = 1;   ///< grows by one with each swap
  std::string save_id;    ///< 32 hex digits, of this swap alone
  std::string owner;      ///< session; empty: nobody
  std::string file;       ///< name of the save object; empty: none yet
  bool deleted = false;   ///< a tombstone: no agent of this name
  std::optional<Turn> turn;  ///< that `file` ends with; nullopt: it had no id
  /// turn_mark of the turns before it, newest first: a request that comes late, after others, is not run again.
  std::vector<std::string> past;
  bool operator==(const Head&) const = default;
};

inline constexpr size_t kMostPast = 16;
/// 16 hex digits of a turn's id.
std::string turn_mark(const std::string& id);

/// A worker's sign of life, replaced by compare-and-swap.
struct Lease {
  std::string session;
  std::string address;      ///< where its agents are asked for; empty: nowhere
  int64_t room = 0;         ///< bytes of memory that are free, a hint
  int64_t ttl_ms = 10'000;
  int64_t generation = 0;   ///< no save of this worker under way began before it knew this one
  int64_t renewals = 0;     ///< so that each renewal has another tag
  bool operator==(const Lease&) const = default;
};

/// Where sweeps stand.
struct SweepRecord {
  int64_t generation = 0;  ///< grows by one with each sweep
  std::string sweeper;     ///< session of a sweep under way; empty: none
  std::string save_id;
  bool operator==(const SweepRecord&) const = default;
};

/// That objects and their names are sealed; it is not sealed itself.
struct SealRecord {
  std::string names;  ///< id of the key that names are made with, 32 hex digits
  bool operator==(const SealRecord&) const = default;
};

std::string encode(const Head& head);
std::string encode(const Lease& lease);
std::string encode(const SweepRecord& record);
std::string encode(const SealRecord& record);
Head decode_head(std::string_view text, const std::string& key);
Lease decode_lease(std::string_view text, const std::string& key);
SweepRecord decode_sweep(std::string_view text, const std::string& key);
SealRecord decode_seal(std::string_view text, const std::string& key);

/// What a save object begins with: the length in 8 bytes, little-endian, and the keys that the save needs, in the
/// caller's order. The agent file follows, as it is on disk.
std::string encode_manifest(const std::vector<std::string>& keys);
/// Bytes of the whole manifest, its first 8 included. `text` has these 8.
size_t manifest_bytes(std::string_view text, uint64_t object_bytes, const std::string& key);
/// Of `text` that has the whole manifest, or more.
std::vector<std::string> decode_manifest(std::string_view text, const std::string& key);

inline constexpr const char* kAgentsPrefix = "agents/";
inline constexpr const char* kNodesPrefix = "nodes/";
inline constexpr const char* kSweepKey = "sweep";
inline constexpr const char* kSealKey = "seal";
inline constexpr const char* kPoolPrefixes[] = {"segments/", "states/", "parts/"};

std::string head_key(const std::string& agent);
std::string save_key(const std::string& agent, const std::string& file);
std::string lease_key(const std::string& session);

/// 1 to 128 of A-Za-z0-9._- that begin with neither '.' nor '-': an agent, or a session.
bool is_name(std::string_view text);

/// Name of a save object: EPOCH-SEQUENCE-SAVE_ID.
struct SaveName {
  int64_t epoch = 0, sequence = 0;
  std::string save_id;
};
std::string save_name(const SaveName& name);
std::optional<SaveName> parse_save_name(std::string_view text);

/// A segment, a state or a part: its path on disk without ".safetensors", and the generation that it was put in.
struct PoolName {
  std::string path;
  int64_t generation = 0;
};
std::string pool_key(const PoolName& name);
std::optional<PoolName> parse_pool_key(std::string_view key);

}  // namespace torpor::remote
