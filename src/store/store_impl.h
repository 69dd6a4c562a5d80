#pragma once
/// What the parts of the store share; each of the other files holds one side of it.

#include <atomic>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "base/env.h"
#include "base/parallel.h"
#include "store/agent_file.h"
#include "store/known.h"
#include "store/segment.h"
#include "store/sidecar.h"
#include "store/store_locks.h"
#include "store/sweep.h"
#include "store/temporary_file.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor {

/// An agent file ready to be written.
struct AgentDraft {
  AgentInfo info;
  std::string header;
  std::vector<std::span<const std::byte>> data;  ///< the tail, the state, the tokens
};

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
  std::filesystem::path segments_path() const { return root / "segments"; }
  std::filesystem::path segment_directory(const std::string& name) const { return segments_path() / name.substr(0, 2); }
  std::filesystem::path segment_path(const std::string& name) const {
    return segment_directory(name) / (name + ".safetensors");
  }

  StoreLocks locks{env, root};
  FileLock lock_agent(const std::string& id);

  // ---- files
  /// Writes `pieces` beside `path` and renames that into place. On an error nothing is left behind.
  FileStat write_file(const std::filesystem::path& path, const std::vector<std::span<const std::byte>>& pieces, bool sync);
  /// `du` counts what was put into the store as written.
  void count_written(const FileStat& stat) { unrecorded_ += int64_t(stat.size); }
  /// Header of the agent file, checked. kNotFound says which agent.
  OpenedAgent open_agent(const std::string& id);
  /// Best effort: a read-only or full store still lists.
  int64_t write_sidecar(const AgentInfo& info, const FileStat& agent_file) noexcept;

  // ---- the work
  /// `rows`: where they are when they are not the snapshot's; else nullptr.
  SaveResult save(const std::string& id, const KvSnapshot& snapshot, const BorrowedRows* rows, const std::string& model,
                  const UserMetadata& user, const RecordMetadata& record, Durability durability);
  /// kInvalidArgument.
  void check_storable(const KvSnapshot& snapshot, const BorrowedRows* rows);
  /// `created_at` of the agent that a save replaces, else `now`. What this process has saved is not read for it.
  std::string date_of_birth(const std::string& id, const std::string& now);
  /// `info.bytes`: its segments'. `tail`: the rows of `tail_tokens` tokens. These, `state`'s bytes and `tokens` must outlive
  /// the draft.
  AgentDraft draft_agent(AgentInfo info, const KvLayout& layout, int tail_tokens, Pieces tail, std::span<const KvState> state,
                         std::span<const int32_t> tokens);
  /// Of the agent file and, at most, its sidecar.
  int64_t bytes_to_write(const AgentDraft& draft);
  /// The commit of save and copy, and the sidecar.
  void commit_agent(const AgentDraft& draft, Durability durability, SaveResult& result);
  /// Files that a save which asked for less may have left in the page cache, or whose fsync we did not see.
  void flush_segments(const std::vector<std::pair<std::string, FileStat>>& segments);
  /// `sink`: gets the rows of a whole agent, which the snapshot then lacks; else nullptr.
  LoadedAgent load(const std::string& id, const LoadOptions& options, RowSink* sink = nullptr);
  SaveResult copy(const std::string& src, const std::string& dst, const CopyOptions& options, bool keep_dates = false);
  /// nullopt when a segment of `src` was removed meanwhile.
  std::optional<SaveResult> copy_once(const std::string& src, const std::string& dst, const CopyOptions& options, bool keep_dates);
  void rename_agent(const std::string& id, const std::string& new_id);
  /// Names of the segments.
  std::vector<std::string> find_prefix(const Identity& identity, const KvLayout& layout, std::span<const int32_t> tokens);
  LoadedPrefix load_prefix(const Identity& identity, const KvLayout& layout, std::span<const int32_t> tokens,
                           const LoadOptions& options);
  SaveResult save_prefix(const KvSnapshot& snapshot, Durability durability);
  std::shared_ptr<const SealedRun> map_segment(const std::string& name);
  std::vector<std::string> agent_ids();
  AgentInfo info(const std::string& id);
  std::vector<AgentInfo> list(bool rebuild_sidecars);
  /// nullopt when there is no such agent any more.
  std::optional<AgentInfo> list_one(const std::string& id, bool rebuild_sidecar);
  struct StoredSegment {
    std::string name;
    FileStat stat;
  };
  std::vector<StoredSegment> stored_segments();
  std::vector<std::filesystem::path> temporary_files();
  /// Names of segments that some agent needs, read from the agent files themselves. kCorruption when one can't be read.
  std::unordered_set<std::string> live_segments();
  void remove_agent(const std::string& id);
  /// kNotFound says which agent.
  void require_agent(const std::string& id);
  /// The commit of a removal; its agent's lock is held.
  void remove_agent_file(const std::string& id);
  /// Removes what else bears the name of an agent that is gone. What can't be removed now is left to gc.
  void tidy_after_agent(const std::string& id, const FileLock& agent_lock) noexcept;
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
  /// The directory that a file `path` outside the store is to be written to. kIo when there is none, kInvalidArgument.
  std::filesystem::path export_directory(const std::filesystem::path& path);
  void export_agent(const std::string& id, const std::filesystem::path& path);
  void export_prompt_cache(const std::string& id, const std::filesystem::path& path, PromptCacheDialect dialect);
  PromptCache read_prompt_cache(const std::filesystem::path& path, const CacheModel& model);
  SaveResult import_agent(const std::filesystem::path& path, const std::string& id);

  KnownSegments known;

  DiskLimits disk_limits() {
    const std::lock_guard lock(limits_mutex_);
    return limits_;
  }
  void set_disk_limits(const DiskLimits& limits) {
    const std::lock_guard lock(limits_mutex_);
    limits_ = limits;
  }

 private:
  std::mutex limits_mutex_, counter_mutex_, births_mutex_;
  std::unordered_map<std::string, std::pair<FileStat, std::string>> births_;  ///< by agent id: its file as we wrote it, created_at
  DiskLimits limits_;
  std::atomic<int64_t> unrecorded_{0};
};

inline constexpr uint64_t kMaxSidecar = 64 << 20;  // bytes that are read of what may be one

inline std::span<const std::byte> as_bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace torpor
