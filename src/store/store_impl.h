#pragma once
/// The parts of a store, and what is done with them.

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/env.h"
#include "base/mutex.h"
#include "base/parallel.h"
#include "store/catalogue.h"
#include "store/known.h"
#include "store/records.h"
#include "store/file_pool.h"
#include "store/store_locks.h"
#include "store/sweep.h"
#include "store/team_files.h"
#include "store/usage.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor {

struct Store::Impl {
  Impl(std::filesystem::path root_path, Env& environment);

  const std::filesystem::path root;
  Env& env;
  StoreLocks locks{env, root};
  FilePool segments{env, root, "segments", "segment"};
  FilePool states{env, root, "states", "state"};
  Records records{env, root};
  TeamFiles teams{env, root};
  WrittenBytes written{env, locks.counter_path()};
  Catalogue agents{env, root, segments, states, written};
  KnownSegments known;
  Mutex dropped_mutex;
  std::vector<std::string> dropped TORPOR_GUARDED_BY(dropped_mutex);  ///< names of state files (drop_states)

  DiskLimits own_limits() {
    const MutexLock lock(limits_mutex_);
    return limits_;
  }
  /// kInvalidArgument when one is negative.
  void set_disk_limits(const DiskLimits& limits);
  /// Store::set_reclaimer's; no lock is held meanwhile.
  bool reclaim();
  void set_reclaimer(std::function<bool()> reclaim);

 private:
  Mutex limits_mutex_;
  DiskLimits limits_ TORPOR_GUARDED_BY(limits_mutex_);
  std::function<bool()> reclaim_ TORPOR_GUARDED_BY(limits_mutex_);
};

// The verbs. Where a method of Store has the same arguments, its contract holds.

AgentFileLock lock_agent(Store::Impl& store, const std::string& id);

/// `rows`: where they are when they are not the snapshot's; else nullptr.
SaveResult save(Store::Impl& store, const std::string& id, const KvSnapshot& snapshot, const BorrowedRows* rows,
                const std::string& model, const UserMetadata& user, Durability durability, const AgentNotes& notes);
/// kInvalidArgument.
void check_storable(const KvSnapshot& snapshot, const BorrowedRows* rows);

/// `sink`: gets the rows of a whole agent, which the snapshot then lacks; else nullptr.
LoadedAgent load(Store::Impl& store, const std::string& id, const LoadOptions& options, RowSink* sink = nullptr);

SaveResult copy(Store::Impl& store, const std::string& src, const std::string& dst, const CopyOptions& options,
                bool keep_dates = false);
void rename_agent(Store::Impl& store, const std::string& id, const std::string& new_id);
SaveResult upgrade_agent(Store::Impl& store, const std::string& id);

SaveResult save_prefix(Store::Impl& store, const KvSnapshot& snapshot, Durability durability);
int64_t find_prefix(Store::Impl& store, const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                    std::span<const int32_t> tokens, const StatesSought* states);
/// Names of the segments.
std::vector<std::string> find_segments(Store::Impl& store, const Identity& identity, const Lineage& lineage,
                                       const KvLayout& layout, std::span<const int32_t> tokens);
LoadedPrefix load_prefix(Store::Impl& store, const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                         std::span<const int32_t> tokens, const LoadOptions& options);
std::shared_ptr<const StateCheckpoint> load_state(Store::Impl& store, const KvSnapshot& conversation,
                                                  std::span<const std::string> segments, const StateRef& ref,
                                                  const BufferAllocator& allocate);
std::shared_ptr<const SealedRun> map_segment(Store::Impl& store, const std::string& name);

void keep_record(Store::Impl& store, const Record& record, std::string_view bytes, Durability durability);

/// Makes a team's file, or puts one in place of another.
void keep_team(Store::Impl& store, const std::string& id, std::string_view json, bool is_new, Durability durability);

/// `hash`: only while its file has this checksum; nullptr: whatever it has. Whether it was removed.
bool remove_agent(Store::Impl& store, const std::string& id, bool whatever_it_is, const std::string* hash = nullptr);
/// After a commit by which an agent has the states `now` in place of those `before`: the others' files go when no agent
/// names them, several at a time. What is not removed is left to gc.
void drop_states(Store::Impl& store, const std::vector<std::string>& before, const std::vector<StateRef>& now);
GcResult gc(Store::Impl& store, bool dry_run = false);
/// nullopt when saves under way, or somebody else who removes, take longer than `timeout`.
std::optional<Sweep> begin_sweep(Store::Impl& store, std::chrono::milliseconds timeout);

/// `checked_rows`: what was found out about segments that agents share.
VerifyReport verify(Store::Impl& store, const std::string& id,
                    std::unordered_map<std::string, std::string>& checked_rows);
bool recheck(Store::Impl& store, const KvLayout& layout, const SealedRun& run, const TensorMask& wanted);

/// Those of the marker.
DiskLimits kept_limits(Store::Impl& store);
void keep_limits(Store::Impl& store, const DiskLimits& limits);
/// Those of this Store, and of the marker where this one has none.
DiskLimits disk_limits(Store::Impl& store);

DiskUsage usage(Store::Impl& store);
/// Of every file in the store, temporary ones included; locks have none. `reserved` receives what saves under limits have
/// been given room for, of which some may be written already.
int64_t stored_bytes(Store::Impl& store, int64_t* reserved = nullptr);

void export_agent(Store::Impl& store, const std::string& id, const std::filesystem::path& path, const std::string& as);
SaveResult import_agent(Store::Impl& store, const std::filesystem::path& path, const std::string& id);

}  // namespace torpor
