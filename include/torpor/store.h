#pragma once
/// The store: agents' KV caches as files (docs/format.md). Bytes only; it never sees an MLX array.
///
/// A Store may be used from many threads at once, and many processes may use one directory at once. A save claims the
/// segments that it will name. `gc` removes none that is claimed or named. AgentLock keeps an awake agent to one owner.
/// Readers (list, load, verify, disk usage) take no lock.
///
/// A directory is a store when it holds `torpor.json`, which the first save adds, or agents of before there was one.
/// Other files in it are never listed, replaced or removed.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "torpor/kv_snapshot.h"

namespace torpor {

class Env;  // src/base/env.h: files, fsync, locks, clock; tests replace it

/// `TORPOR_STORE`, else `~/.agent_caches`.
std::filesystem::path default_store_root();

/// kInvalidArgument unless `id` is 1 to 128 of [A-Za-z0-9._-] and does not begin with '.' or '-'.
void check_agent_id(const std::string& id);
/// Error::field of the kInvalidArgument that a name is given which an agent has already.
inline constexpr const char* kAgentTaken = "agent_id";
/// The same of a team's name.
inline constexpr const char* kTeamTaken = "team";

/// What a save means for a machine that loses power.
enum class Durability {
  kFull,    ///< files and directories are fsynced: the save survives a power cut (default)
  kRename,  ///< atomic against kill -9, not against a power cut
  kNone,    ///< as kRename, and the sidecar may lag; for benchmarks and throw-away stores
};

/// The caller's own metadata: keys and values, kept as given. No key begins with "torpor.".
using UserMetadata = std::vector<std::pair<std::string, std::string>>;
/// Torpor's own of an agent, apart from the caller's: the conversation and how far it has come (src/agents/record.h).
using RecordMetadata = std::vector<std::pair<std::string, std::string>>;

/// A message of an agent's conversation: a JSON object, {"role": ..., "content": ...}, and the positions of its tokens.
struct StoredMessage {
  std::string json;
  int64_t begin = 0, end = 0;
  bool operator==(const StoredMessage&) const = default;
};

/// A state that a conversation can go on from: that after its first `position` tokens.
struct StateRef {
  int64_t position = 0;
  std::string file;  ///< name of its state file, 32 hex digits
  bool operator==(const StateRef&) const = default;
};

/// What an agent's owner keeps with it that is not the caller's metadata.
struct AgentNotes {
  std::vector<StoredMessage> messages;  ///< in order; what was saved before is not written again
  RecordMetadata record;
  std::vector<StateRef> states;         ///< of the agent on disk, to be kept beside those of the snapshot
};

/// What people and programs read about an agent without opening its tensors. Mirrored in the sidecar JSON.
struct AgentInfo {
  std::string agent_id;
  std::string model;            ///< as given to --model when last saved
  std::string hash;             ///< the agent file's checksum: changes with every save
  Identity identity;
  Lineage lineage;
  ConversationIdentity conversation;
  int64_t cache_size = 0;       ///< tokens
  std::string created_at;       ///< RFC 3339, UTC
  std::string updated_at;
  int64_t bytes = 0;            ///< agent file and parts plus the segments and states it names
  int64_t tail_bytes = 0;       ///< agent file and parts alone
  std::vector<std::string> segments;
  std::vector<std::string> parts;  ///< its own in `parts/`, UID-NAME each, first to last
  /// Of a model with recurrent layers: the states on disk that it can go on from, first to last. Rows behind the last
  /// one are of no use before that state is computed again. nullopt: it has no such layers.
  std::optional<std::vector<StateRef>> states;
  int64_t state_bytes = 0;      ///< of their files, which `bytes` has too
  /// Where rows of sliding windows are kept apart (KvTensorSpec::apart): the widest such window. `states` are then the
  /// files of those rows, each at the end of its run.
  int window = 0;
  bool bare_tail = false;       ///< such rows of the tokens behind the last segment are missing, or all of them
  UserMetadata user;
  RecordMetadata record;
};

struct SaveResult {
  int64_t bytes_written = 0;
  int segments_written = 0;
  int segments_shared = 0;  ///< already on disk, by this agent's last save or another's
  std::vector<std::string> segments;  ///< the names of all, first to last
  int states_written = 0;
  std::vector<StateRef> states;       ///< all, first to last
};

/// From how many of its first `n_tokens` tokens an agent on disk can go on: all of them, or those up to a state, or to
/// where all rows that its windows see are kept.
int64_t resumable_tokens(const AgentInfo& info, int64_t n_tokens);

struct LoadedAgent {
  AgentInfo info;
  KvSnapshot snapshot;
  std::vector<int32_t> tokens;  ///< every id of the agent, those whose rows a salvage had to leave out included
  std::vector<StoredMessage> messages;  ///< those that end within `tokens`
  int64_t bytes_read = 0;
  /// Set when damage was found and the snapshot is the longest intact prefix (LoadOptions::salvage).
  std::optional<std::string> damage;
};

/// Where an agent's rows go when they are read: into memory that the caller lays out.
class RowSink {
 public:
  /// `[heads, n, dim]` elements; each head's rows begin `stride` bytes after those of the head before.
  struct Place {
    std::byte* rows = nullptr;
    size_t stride = 0;
  };
  virtual ~RowSink() = default;
  /// Once, on load_into's thread, when everything but the rows was read and checked. `snapshot` lacks the rows.
  virtual void begin(const AgentInfo& info, const KvSnapshot& snapshot) = 0;
  /// Where the rows of tokens [first, first + n) of one tensor of the layout go. Every row is asked for once, in any
  /// order, by several threads at a time. Rows are written there, then checked. They count only when load_into returns.
  virtual Place place(size_t tensor, int64_t first, int n) = 0;
};

/// Which states a prefix may end at: those at segments' ends, and others whose positions are known. Of a layout with
/// rows kept apart it ends where these are had, whatever this says.
struct StatesSought {
  StateLayout layout;
  std::vector<int64_t> positions;
};

struct LoadOptions {
  /// When set, the first differing field is kIncompatible before any tensor is read.
  const Identity* expected = nullptr;
  /// Give back the longest intact prefix instead of throwing kCorruption. (A damaged agent file whose token list or
  /// segment list can't be trusted is kCorruption either way.)
  bool salvage = false;
  BufferAllocator allocate = allocate_heap_buffer;
  /// Rows are mapped read-only instead of copied, where the system can: their pages are the page cache's, shared by all
  /// agents and processes. Every checksum is checked first all the same. Store files are never written again, only
  /// replaced or removed, which a mapping survives. Cutting one short by hand under a running process crashes that
  /// process.
  bool map_rows = false;
  /// Only the first so many tokens (or all, when the agent has fewer), as if it had been rewound to there.
  /// LoadedAgent::info stays that of the whole agent. Of an agent with states the snapshot always ends at one, the last
  /// that is at or before them; LoadedAgent::tokens does not. It holds that state alone.
  std::optional<int64_t> n_tokens;
  /// Of a layer with a window only runs that can still be attended (KvLayout::attended) are read, and their checksums
  /// checked. The other runs' bytes are unspecified. For waking, not for looking at rows.
  bool window_rows_only = false;
  /// Of a prefix: where a model with recurrent layers may go on from. nullptr: it has none.
  const StatesSought* states = nullptr;
  /// The tail comes in a buffer in which a cache can go on (KvTail::run): KvCache::restore then copies nothing.
  bool tail_in_run = false;
};

/// The sealed segments that begin a prompt, whoever saved them (Store::load_prefix).
struct LoadedPrefix {
  KvSnapshot snapshot;                ///< a multiple of kSegmentTokens tokens; none when nothing fits
  std::vector<std::string> segments;  ///< their names
  int64_t bytes_read = 0;
  int64_t rows = 0;                   ///< tokens that have rows; the snapshot ends at the last state before
  std::vector<StateRef> windows;      ///< the files of rows kept apart that were read
};

/// What Store::copy_agent_cache changes on the way.
struct CopyOptions {
  std::optional<int64_t> n_tokens;   ///< keep only the first so many tokens (kInvalidArgument beyond the agent's)
  std::optional<UserMetadata> user;  ///< instead of the source's
  std::optional<RecordMetadata> record;  ///< likewise
  bool replace = false;              ///< the destination may exist (else kInvalidArgument)
  Durability durability = Durability::kFull;
};

/// Bounds on what the store takes of the disk. A save, copy, import or prefix that would break one first evicts
/// segments that no agent names, oldest leaf first. When all of them would not be enough, nothing is evicted or
/// written, and it fails with kResourceExhausted. No named agent is removed to make room, but by Store::set_reclaimer.
struct DiskLimits {
  int64_t budget = 0;    ///< bytes of every file in the store, all models together; 0 = no bound
  int64_t min_free = 0;  ///< bytes that stay free on the file system; 0 = no bound
};

struct VerifyReport {
  std::string agent_id;
  bool readable = true;  ///< false: a file of the agent could not be read (kIo), so what it holds is not known
  int64_t intact_tokens = 0;
  std::vector<std::string> problems;  ///< one sentence per damaged file; empty = intact
};

struct DiskUsage {
  int64_t agents = 0, agent_bytes = 0;  ///< agent files, sidecars and parts; a part that forks share counts once
  int64_t segments = 0, segment_bytes = 0;    ///< all segment files, each once
  int64_t orphan_segments = 0;  ///< named by no agent
  int64_t states = 0, state_bytes = 0;        ///< all state files, each once
  int64_t orphan_states = 0;                  ///< named by no agent; `orphan_bytes` has theirs too
  int64_t orphan_bytes = 0;     ///< of these, of parts that no agent names, and of records that expired: what gc would free
  int64_t records = 0, record_bytes = 0;  ///< Store::keep_record
  int64_t teams = 0, team_bytes = 0;          ///< Store::make_team
  int64_t temporary_files = 0, temporary_bytes = 0;  ///< of saves under way, and of killed ones, which gc would free too
  int64_t total_bytes = 0;
  int64_t bytes_written = 0;  ///< by all saves of all processes since the store was made
};

/// Bytes that a program keeps beside the agents, as one file: a server's stored answers.
struct Record {
  std::string name;     ///< 1 to 32 letters a to z, '-' and 32 hex digits
  int64_t expires = 0;  ///< seconds since the epoch, when gc or who needs room may remove it; 0: never
  int64_t bytes = 0;    ///< of its file; given back, never asked for
};

struct GcResult {
  int64_t files_removed = 0, bytes_freed = 0;
};

/// What Store::verify_teams finds.
struct TeamReport {
  std::string team;
  std::string problem;  ///< one sentence; empty = intact
};

/// Exclusive ownership of an awake agent, or of a team in a step, across processes; released by the destructor (and by the kernel when the
/// process dies).
class AgentLock {
 public:
  virtual ~AgentLock() = default;
};

class Store {
 public:
  /// Makes `root` (0700) if absent. `env` must outlive the store; nullptr = the operating system. kIncompatible: a
  /// newer version's store; kCorruption: its `torpor.json` is damaged. A directory that is no store becomes one by the
  /// first save. Until then what lists, reads or removes agents throws kInvalidArgument if the directory holds
  /// anything.
  explicit Store(std::filesystem::path root, Env* env = nullptr);
  ~Store();
  const std::filesystem::path& root() const;
  /// What it reaches files through.
  Env& env() const;

  /// kBusy at once when another process (or another lock in this one) has it. A lock that is dropped locks nothing. Of
  /// a store that can't be written to, agents are locked against nobody: they can be read, and saving fails.
  [[nodiscard]] std::unique_ptr<AgentLock> lock_agent(const std::string& agent_id);
  /// Whether someone has the agent's lock right now.
  bool is_awake(const std::string& agent_id) const;

  /// Writes the segments that are not on disk yet, then the agent file; that rename is the commit. Then the sidecar.
  /// On any error the agent on disk is as it was, with one exception. When flushing that rename fails (kIo), the new
  /// state is in place, but may not survive a power cut. The caller holds the agent's lock.
  ///
  /// A SealedRun that an earlier save wrote, or a load read, has a segment. Its bytes are not read again while that
  /// file stays the same.
  ///
  /// kInvalidArgument for a key of `user` that begins with "torpor.". An embedder has no `notes`.
  SaveResult save_agent_cache(const std::string& agent_id, const KvSnapshot& snapshot, const std::string& model,
                              const UserMetadata& user = {},
                              Durability durability = Durability::kFull, const AgentNotes& notes = {});

  /// The same for rows in the caller's own memory; `snapshot` has no rows then.
  SaveResult save_agent_cache(const std::string& agent_id, const KvSnapshot& snapshot, const BorrowedRows& rows,
                              const std::string& model, const UserMetadata& user = {},
                              Durability durability = Durability::kFull, const AgentNotes& notes = {});

  /// kNotFound, kCorruption, kIncompatible as said above. Validates before it allocates, and checks every checksum.
  /// Rows that a snapshot of this process holds are shared, not read, unless their segment's file has changed since.
  LoadedAgent load_agent_cache(const std::string& agent_id, const LoadOptions& options = {}) const;

  /// Reads a whole agent into memory that `sink` lays out. `snapshot` has no rows; `allocate` gives memory for its
  /// state. Rows kept apart that no window of the last token sees are 0. Errors as load_agent_cache without salvage
  /// gives them. The sink's memory then counts for nothing.
  LoadedAgent load_into(const std::string& agent_id, RowSink& sink, const Identity* expected = nullptr,
                        const BufferAllocator& allocate = allocate_heap_buffer) const;

  /// Every id of the agent, checked; no rows are read. kNotFound, kCorruption.
  std::vector<int32_t> agent_tokens(const std::string& agent_id) const;
  /// Its messages, likewise.
  std::vector<StoredMessage> agent_messages(const std::string& agent_id) const;

  /// Writes the snapshot's sealed segments, and its states up to their end, for anyone whose prompt begins so. It names
  /// them in no agent: `gc` and the disk limits may remove them. Its tail is not kept. None of its states need be that
  /// after its last token.
  SaveResult save_prefix(const KvSnapshot& snapshot, Durability durability = Durability::kFull);

  /// How many of `tokens`, a multiple of kSegmentTokens, have their rows in segments of this identity, lineage and
  /// layout. Looks at names only. Of rows that were computed twice, with other bits, those that reach furthest count.
  /// With `states` the number up to the last state file among these; it need not be such a multiple then.
  int64_t find_prefix(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                      std::span<const int32_t> tokens, const StatesSought* states = nullptr) const;
  /// Their rows, up to the first segment that is damaged, and the state there. Of `options`: `allocate`, `map_rows`,
  /// `window_rows_only`, `states`, `tail_in_run`.
  LoadedPrefix load_prefix(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                           std::span<const int32_t> tokens, const LoadOptions& options = {}) const;

  /// Reads a state file of a conversation whose first tokens are in `segments`. kNotFound, kCorruption naming it.
  std::shared_ptr<const StateCheckpoint> load_state(const KvSnapshot& conversation,
                                                    std::span<const std::string> segments, const StateRef& ref,
                                                    const BufferAllocator& allocate = allocate_heap_buffer) const;

  /// The rows of a segment that this process has saved or loaded, mapped read-only. nullptr where mapping can't be had,
  /// or when the file is another one now.
  std::shared_ptr<const SealedRun> map_segment(const std::string& name) const;

  /// Checks the `wanted` tensors of a mapped run again if the system has let go of any of their pages. Pages that come
  /// back are unchecked. True if it had to. kCorruption names the segment: no load shares the run any more, and the
  /// next save of these rows writes it again. kIo when the disk fails, where a touch would end the process.
  bool recheck(const KvLayout& layout, const SealedRun& run, const TensorMask& wanted = {}) const;

  /// Makes agent `dst` of `src` without reading a sealed row: the same segments, tokens and tail, cut as asked. Writes
  /// one agent file, in which only the tail's rows are tensor bytes; that rename is the commit. No state is read either:
  /// a copy has those of its tokens. `dst` may be `src`. The
  /// caller holds the lock of `dst`; what is copied of `src` is its last save.
  SaveResult copy_agent_cache(const std::string& src, const std::string& dst, const CopyOptions& options = {});
  /// The agent under another id, which must be free; takes both locks itself. A crash may leave it under both.
  void rename_agent_cache(const std::string& agent_id, const std::string& new_id);

  /// Writes an agent of format version 1 or 2 anew, under the names of this version. So are its segments, which other
  /// agents then share. An agent that has these names is left as it is. Takes the agent's lock itself: kBusy.
  /// kNotFound, kCorruption.
  SaveResult upgrade_agent(const std::string& agent_id);

  /// For what this Store does from now on; a limit of 0 is the store's own (kept_disk_limits). Saves whose need fits
  /// run at once, and take no room twice. One that has to evict waits for those under way (kBusy after a minute).
  /// kInvalidArgument when a limit is negative.
  void set_disk_limits(const DiskLimits& limits);
  /// Asked on the thread of a save that finds no room below the limits: frees some and says whether it did. It is asked
  /// again until there is room or it frees nothing. It may call this Store, but not for the agent that is saved. Several
  /// saves may ask at a time. Empty: nobody is asked.
  void set_reclaimer(std::function<bool()> reclaim);
  /// The limits that the store keeps for every process that writes to it.
  DiskLimits kept_disk_limits() const;
  /// Changes them; 0 = no bound. An empty directory becomes a store. kInvalidArgument: a negative limit, or no store.
  void keep_disk_limits(const DiskLimits& limits);

  /// Keeps the bytes, at most 1 GiB, under the record's name and time, in place of what was there. They are there when
  /// this returns; after an error the old bytes or the new ones are, whole. The disk limits count them. kResourceExhausted; kInvalidArgument for
  /// what is no name, and more bytes.
  void keep_record(const Record& record, std::string_view bytes, Durability durability = Durability::kFull);
  /// kNotFound, kCorruption.
  std::string read_record(const Record& record) const;
  /// False when there is none. It is gone when this returns.
  bool drop_record(const Record& record, Durability durability = Durability::kFull);
  /// All of them, the oldest first.
  std::vector<Record> records() const;

  // Files of teams (torpor/teams.h), whose names are of the form of agents'. `json`: an object that begins "{\n", at most
  // 16 MiB. The disk limits count them. kResourceExhausted; kInvalidArgument for what is no name or object.
  /// kInvalidArgument, with kTeamTaken, when there is such a team. Of several makers at once one succeeds.
  void make_team(const std::string& id, std::string_view json, Durability durability = Durability::kFull);
  /// In place of what was there. After an error the old text or the new one is, whole. The caller holds the team's lock.
  void save_team(const std::string& id, std::string_view json, Durability durability = Durability::kFull);
  /// The object, with one member more. kNotFound, kCorruption.
  std::string read_team(const std::string& id) const;
  /// False when there is none. It is gone when this returns. The caller holds the team's lock.
  bool remove_team(const std::string& id, Durability durability = Durability::kFull);
  /// kBusy at once when another process, or another lock in this one, has it.
  [[nodiscard]] std::unique_ptr<AgentLock> lock_team(const std::string& id);
  /// Ids, sorted.
  std::vector<std::string> teams() const;
  /// Checks every byte of their files. Changes nothing.
  std::vector<TeamReport> verify_teams() const;

  /// Reads the agent file's header alone. kNotFound, kCorruption.
  AgentInfo agent_info(const std::string& agent_id) const;
  bool contains(const std::string& agent_id) const;

  /// All agents by id. Reads sidecars; rebuilds one that is missing, stale or edited from its agent file. An agent
  /// whose file is damaged is listed with an empty hash.
  std::vector<AgentInfo> list_cached_agents() const;
  /// Of each agent, how many of the segments and parts that it names are not there. Looks at names only: `verify`
  /// reads.
  std::vector<int64_t> count_missing_files(std::span<const AgentInfo> agents) const;

  /// Removes the agent file (the commit), its sidecar and segments that no agent names any more. Segments stay for `gc`
  /// when another process is saving just then, or an agent file is damaged. Takes the agent's lock itself: kBusy when
  /// anyone has it, the caller included. kNotFound. Unless `whatever_it_is`: kInvalidArgument when the file has no
  /// header of Torpor's, kCorruption when it is another agent's.
  void delete_agent_cache(const std::string& agent_id, bool whatever_it_is = false);
  /// The same, while the agent file has this checksum (AgentInfo::hash). False: it has another one.
  bool delete_agent_cache_of(const std::string& agent_id, const std::string& hash);

  DiskUsage get_cache_disk_usage() const;

  /// One report per agent (all of them when `agent_id` is nullopt), segments included. Changes nothing.
  std::vector<VerifyReport> verify(const std::optional<std::string>& agent_id = std::nullopt) const;

  /// Removes temporary files, segments and states that no agent names. Waits for the saves that are under way, at most a
  /// minute, else kBusy; saves that begin meanwhile do not wait for it. kCorruption naming the agent file that can't be
  /// read, and then no segment is removed: which ones it needs is not known. With `dry_run` nothing is removed, and the
  /// result says
  /// what would be.
  GcResult gc(bool dry_run = false);

  /// One self-contained safetensors file (all layers whole, the last state, `tokens`) and `path` with .json beside it.
  /// It calls the agent `as`, unless that is empty, and has neither its salt nor its earlier states. kInvalidArgument
  /// while tokens behind its last state have to be computed again.
  void export_agent(const std::string& agent_id, const std::filesystem::path& path, const std::string& as = {}) const;
  /// The inverse: a new agent. kInvalidArgument when the id is taken or the file is no export; kCorruption when it is
  /// damaged.
  SaveResult import_agent(const std::filesystem::path& path, const std::string& agent_id);

  struct Impl;  // src/store/store_impl.h; nothing for embedders

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor
