#pragma once
/// What the parts of the store share; each of the other files holds one side of it.

#include <atomic>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "base/env.h"
#include "base/parallel.h"
#include "store/agent_draft.h"
#include "store/marker.h"
#include "store/segment_pool.h"
#include "store/sidecar.h"
#include "store/store_locks.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor {

struct OpenedAgent {
  File handle;
  FileStat stat;
  AgentFile agent;
};

struct Store::Impl {
  Impl(std::filesystem::path root_path, Env& environment);
  ~Impl() { record_written(); }

  std::filesystem::path root;
  Env& env;

  // ---- names
  std::filesystem::path agent_path(const std::string& id) const { return root / (id + ".safetensors"); }
  std::filesystem::path sidecar_path(const std::string& id) const { return root / (id + ".json"); }
  std::filesystem::path parts_path() const { return root / "parts"; }
  std::filesystem::path part_path(const std::string& uid, const std::string& name) const {
    return parts_path() / (part_stem(uid, name) + ".safetensors");
  }
  /// What a part is called by who claims it, or removes what is not claimed: as long as a segment's name.
  static std::string part_claim(const std::string& uid, const std::string& name);

  // ---- whose it is
  std::filesystem::path marker_path() const { return root / kMarkerName; }
  /// The marker as it is on disk now; nullopt when there is none. kCorruption, kIncompatible.
  std::optional<Marker> marker();
  /// Whether there is an agent file or a directory of segments, which stores had before there were markers.
  bool is_old_store();
  /// kInvalidArgument when the directory is no store, and not empty either.
  void require_store();
  /// Adds the marker unless there is one. Everything that writes files begins with it.
  void make_store();
  /// Those of the marker.
  DiskLimits kept_limits();
  void keep_limits(const DiskLimits& limits);
  /// Those of this Store, and of the marker where this one has none.
  DiskLimits disk_limits();
  /// kInvalidArgument when one is negative.
  void set_disk_limits(const DiskLimits& limits);

  /// Whose the file is that has the name of an agent's, by the first bytes of it. A file system may fold case.
  struct Holder {
    enum Kind {
      kNobody,
      kAgent,       ///< the agent's own
      kOther,       ///< another agent's, `id`
      kDamaged,     ///< an agent file that does not say whose
      kUnreadable,  ///< no agent file, beside a sidecar
      kForeign,     ///< somebody else's
    } kind;
    std::string id;
  };
  Holder holder(const std::string& id);
  /// Whether the agent's sidecar is one. (The marker has the name of the sidecar of an agent `torpor`, which has none.)
  /// `or_no_json`: or such garbage as a power cut leaves of one.
  bool is_own_sidecar(const std::string& id, bool or_no_json = false);
  std::string read_beginning_of(const std::filesystem::path& path, size_t size);
  /// Whether the directory lists the agent's file under exactly this name.
  bool is_listed(const std::string& id);
  Error no_agent(const std::string& id);
  /// What to say of a file that holds another agent, `held`.
  Error renamed_agent(const std::string& id, const std::string& held);
  /// Throws unless the agent may be written: kInvalidArgument when its file would take the place of another's.
  void require_replaceable(const std::string& id);
  /// kNotFound; kInvalidArgument or kCorruption when it is no agent file of this agent, unless `whatever_it_is`.
  void require_removable(const std::string& id, bool whatever_it_is);

  StoreLocks locks{env, root};
  SegmentPool segments{env, root};
  AgentFileLock lock_agent(const std::string& id);

  // ---- files
  /// `du` counts what was put into the store as written.
  void count_written(const FileStat& stat) { unrecorded_ += int64_t(stat.size); }
  /// Header of the agent file, checked. kNotFound says which agent.
  OpenedAgent open_agent(const std::string& id);
  /// Best effort: a read-only or full store still lists.
  int64_t write_sidecar(const AgentInfo& info, const FileStat& agent_file) noexcept;

  // ---- an agent's own files
  /// Its parts and the agent file, as long as `opened` lives. What is wrong with a part is said in it. kIo.
  std::vector<OpenedFile> open_own_files(const OpenedAgent& opened);
  /// The same as they were last seen intact, and read unless this process has seen them. nullptr when there is no agent file, or
  /// a damaged one. kIo.
  std::shared_ptr<const OwnFiles> own_files(const std::string& id);
  /// Those that this process has seen, be they still there or not; nullptr when it has seen none.
  std::shared_ptr<const OwnFiles> own_files_known(const std::string& id);
  void know_files(const std::string& id, OwnFiles files);
  void know_files(const std::string& id, const OpenedAgent& opened, std::vector<OwnFile> files);
  void forget_files(const std::string& id);
  /// Header of the agent file; nullopt when there is none that can be read.
  std::optional<AgentFile> agent_file(const std::string& id);
  /// Those of the files, from the first on, that hold what `agent` begins with: ids, messages and rows are equal. The last
  /// one may hold more.
  std::vector<OwnFile> held_files(const OwnFiles& known, const AgentState& agent);
  /// Reads the file for what it holds up to position `end`. False when it is damaged.
  bool cut_own_file(OwnFile& file, const KvLayout& layout, int64_t end);
  /// Of parts of an agent, those that `draft` has no more.
  void find_obsolete(const std::string& uid, const std::vector<std::string>& parts, AgentDraft& draft);
  /// What nobody may remove until `draft` is committed (Writing::claim).
  std::vector<std::string> claims_of(const AgentDraft& draft);
  /// Gives a file another name, or copies it where it can't have two. False when it has it already.
  bool link_part(const OwnFile& from, const std::filesystem::path& to);
  /// Everything that the agent file is going to name is there when this returns; `put` are those that were not before.
  void put_parts(AgentDraft& draft, bool durable, SaveResult& result, std::vector<std::filesystem::path>& put);
  /// A file in a directory of the store's. What can't be removed now is left to gc.
  void remove_quietly(const std::filesystem::path& path) noexcept;
  /// Ids and messages alone. kNotFound, kCorruption.
  OwnState read_agent(const std::string& id);
  /// To `info.bytes` and `tail_bytes`, which are the agent file's, those of its parts and segments.
  void add_file_sizes(AgentInfo& info, const AgentFile& agent);

  // ---- the work
  /// `rows`: where they are when they are not the snapshot's; else nullptr.
  SaveResult save(const std::string& id, const KvSnapshot& snapshot, const BorrowedRows* rows, const std::string& model,
                  const UserMetadata& user, Durability durability, const AgentNotes& notes);
  /// kInvalidArgument.
  void check_storable(const KvSnapshot& snapshot, const BorrowedRows* rows);
  /// Of the agent file, a part that is written with it and, at most, its sidecar.
  int64_t bytes_to_write(const AgentDraft& draft);
  /// The commit of save and copy, and the sidecar.
  void commit_agent(AgentDraft& draft, Durability durability, SaveResult& result);
  /// `sink`: gets the rows of a whole agent, which the snapshot then lacks; else nullptr.
  LoadedAgent load(const std::string& id, const LoadOptions& options, RowSink* sink = nullptr);
  SaveResult copy(const std::string& src, const std::string& dst, const CopyOptions& options, bool keep_dates = false);
  /// nullopt when something that `src` needs was removed meanwhile.
  std::optional<SaveResult> copy_once(const std::string& src, const std::string& dst, const CopyOptions& options, bool keep_dates);
  void rename_agent(const std::string& id, const std::string& new_id);
  SaveResult upgrade_agent(const std::string& id);
  /// Names of the segments.
  std::vector<std::string> find_prefix(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                                       std::span<const int32_t> tokens);
  LoadedPrefix load_prefix(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                           std::span<const int32_t> tokens, const LoadOptions& options);
  SaveResult save_prefix(const KvSnapshot& snapshot, Durability durability);
  std::shared_ptr<const SealedRun> map_segment(const std::string& name);
  /// Ids of agents, by the names in the root alone: what bears one may be no file.
  std::vector<std::string> agent_names();
  std::vector<std::string> agent_ids();
  AgentInfo info(const std::string& id);
  std::vector<AgentInfo> list(bool rebuild_sidecars);
  /// nullopt when there is no such agent any more.
  std::optional<AgentInfo> list_one(const std::string& id, bool rebuild_sidecar);
  std::vector<std::filesystem::path> temporary_files();
  struct StoredPart {
    std::string uid, name;
    FileStat stat;
  };
  std::vector<StoredPart> stored_parts();
  /// Names of segments, and paths of parts, that some agent needs, read from the agent files themselves. kCorruption when one can't be read.
  std::unordered_set<std::string> live_files();
  void remove_agent(const std::string& id, bool whatever_it_is);
  /// kNotFound says which agent.
  void require_agent(const std::string& id);
  /// The commit of a removal; its agent's lock is held.
  void remove_agent_file(const std::string& id);
  /// Removes the sidecar of an agent that is gone. What can't be removed now is left to gc.
  void remove_sidecar(const std::string& id) noexcept;
  GcResult gc();
  /// `checked_rows`: what was found out about segments that agents share.
  VerifyReport verify(const std::string& id, std::unordered_map<std::string, std::string>& checked_rows);
  VerifyReport verify_once(const std::string& id, std::unordered_map<std::string, std::string>& checked_rows);
  bool recheck(const KvLayout& layout, const SealedRun& run, const TensorMask& wanted);
  DiskUsage usage();
  /// Of every file in the store, temporary ones included; locks have none. `reserved` receives what saves under limits have been
  /// given room for, of which some may be written already.
  int64_t stored_bytes(int64_t* reserved = nullptr);
  /// nullopt when saves under way, or somebody else who removes, take longer than `timeout`.
  std::optional<Sweep> sweep(std::chrono::milliseconds timeout);
  /// Adds what this process has written since the last call to the store's counter. When that can't be done now, the next
  /// call makes up for it.
  void record_written() noexcept;
  int64_t total_written();
  void export_agent(const std::string& id, const std::filesystem::path& path);
  SaveResult import_agent(const std::filesystem::path& path, const std::string& id);

  KnownSegments known;
  DurableFiles durable_files;  ///< agent files and parts, by their checksums

 private:
  std::mutex limits_mutex_, counter_mutex_, own_files_mutex_, marker_mutex_;
  std::optional<FileStat> marker_stat_;  ///< of what `marker_` was read from
  std::optional<Marker> marker_;
  std::atomic<bool> is_store_ = false, has_marker_ = false;
  std::unordered_map<std::string, std::shared_ptr<const OwnFiles>> own_files_;  ///< by agent id
  DiskLimits limits_;
  std::atomic<int64_t> unrecorded_{0};
  std::atomic<bool> parts_durable_{false};  ///< the root names their directory on the disk
};

inline constexpr uint64_t kMaxSidecar = 64 << 20;  // bytes that are read of what may be one

}  // namespace torpor
