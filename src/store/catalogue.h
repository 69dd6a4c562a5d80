#pragma once
/// The agents of a store: their files, the parts beside these, their sidecars (docs/format.md). What agents share is
/// the segment pool's. Thread-safe; whoever changes an agent holds its lock.

#include <atomic>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/env.h"
#include "base/mutex.h"
#include "store/agent_draft.h"
#include "store/marker.h"
#include "store/file_pool.h"
#include "store/usage.h"
#include "torpor/error.h"

namespace torpor {

struct OpenedAgent {
  File handle;
  FileStat stat;
  AgentFile agent;
};

/// A part's file as it was when it was looked at.
struct StoredPart {
  std::string uid, name;
  FileStat stat;
};

/// kIo, and where it says so kNotFound and kCorruption.
class Catalogue {
 public:
  /// All must outlive it.
  Catalogue(Env& env, std::filesystem::path root, const FilePool& segments, const FilePool& states,
            WrittenBytes& written)
      : env_(env), root_(std::move(root)), segments_(segments), states_(states), written_(written) {}

  // ---- whose it is
  /// The marker as it is on disk now; nullopt when there is none. kCorruption, kIncompatible.
  std::optional<Marker> marker() const;
  /// kInvalidArgument when the directory is no store, and not empty either.
  void require_store() const;
  /// Adds the marker unless there is one. Everything that writes files begins with it. A durable commit flushes it.
  void make_store();
  /// Of a store: from now on a power cut leaves the marker.
  void flush_marker();
  std::filesystem::path marker_path() const { return root_ / kMarkerName; }

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
  Holder holder(const std::string& id) const;
  /// Whether the directory lists the agent's file under exactly this name.
  bool is_listed(const std::string& id) const;
  Error no_agent(const std::string& id) const;
  /// Throws unless the agent may be written: kInvalidArgument when its file would take the place of another's.
  void require_replaceable(const std::string& id) const;
  /// kNotFound; kInvalidArgument or kCorruption when it is no agent file of this agent, unless `whatever_it_is`.
  void require_removable(const std::string& id, bool whatever_it_is) const;

  // ---- looking
  /// Whether a file has the agent's name.
  bool contains(const std::string& id) const { return env_.is_file(agent_path(id)); }
  /// kNotFound, naming it, unless there is.
  void require(const std::string& id) const;
  /// Of the agent file; nullopt when there is none.
  std::optional<FileStat> stat(const std::string& id) const { return env_.stat(agent_path(id)); }
  /// Of all agents.
  std::vector<std::string> ids() const;
  /// The agent file with its header checked. kNotFound, kCorruption.
  OpenedAgent open(const std::string& id) const;
  /// Its header; nullopt when there is none that can be read.
  std::optional<AgentFile> header(const std::string& id) const;
  /// From the header. kNotFound, kCorruption.
  AgentInfo info(const std::string& id) const;
  /// All agents, from sidecars where these can be believed. `rebuild_sidecars`: where not, they are written anew.
  std::vector<AgentInfo> list(bool rebuild_sidecars);
  /// Of each agent, how many of the segments, states and parts that it names are not there.
  std::vector<int64_t> count_missing(std::span<const AgentInfo> agents) const;
  /// Names of segments and states, and paths of parts, that some agent needs, read from the agent files, which are flushed.
  /// kCorruption when one can't be read.
  std::unordered_set<std::string> live_files() const;

  // ---- an agent's own files
  /// Its parts and the agent file, as long as `opened` lives. What is wrong with a part is said in it.
  std::vector<OpenedFile> open_files(const OpenedAgent& opened) const;
  /// Ids and messages alone. kNotFound, kCorruption.
  OwnState read(const std::string& id) const;
  /// Its files as they were last seen intact, and read unless this process has seen them. nullptr when there is no
  /// agent file, or a damaged one.
  std::shared_ptr<const OwnFiles> files(const std::string& id);
  /// What was read of them just now, intact.
  void know(const std::string& id, const OpenedAgent& opened, std::vector<OwnFile> files);

  // ---- changes
  /// Of parts of an agent, those that `draft` has no more: they go with the commit.
  void find_obsolete(const std::string& uid, const std::vector<std::string>& parts, AgentDraft& draft) const;
  /// Puts the parts and then the agent file in place, whose rename is the commit; then writes the sidecar.
  void commit(AgentDraft& draft, Durability durability, SaveResult& result);
  /// Puts an agent file from elsewhere in place, whose rename is the commit, in place of what the agent was. The files that
  /// it names were flushed, but for its parts.
  void install(const AgentFile& agent, std::span<const std::byte> bytes, Durability durability);
  /// The commit of a removal, and the agent's parts. kNotFound.
  void remove(const std::string& id);
  /// Removes the sidecar of an agent that is gone. What can't be removed now is left to gc.
  void remove_sidecar(const std::string& id) noexcept;

  // ---- for whoever removes what no agent needs
  std::vector<StoredPart> stored_parts() const;
  Removable removable(const StoredPart& part) const {
    return {part_path(part.uid, part.name), part.stat, part_claim(part.uid, part.name)};
  }
  /// Sidecars whose agent is gone.
  std::vector<Removable> stray_sidecars() const;
  /// Those beside the agents and the parts.
  std::vector<std::filesystem::path> temporary_files() const;

  std::filesystem::path agent_path(const std::string& id) const { return root_ / (id + ".safetensors"); }
  std::filesystem::path sidecar_path(const std::string& id) const { return root_ / (id + ".json"); }
  std::filesystem::path parts_path() const { return root_ / "parts"; }
  std::filesystem::path part_path(const std::string& uid, const std::string& name) const {
    return parts_path() / (part_stem(uid, name) + ".safetensors");
  }

 private:
  /// What a durable commit flushes before its agent file is put in place: a file, with the name that is remembered, or
  /// a directory.
  struct Unflushed {
    std::filesystem::path path;
    std::string name;
    FileStat stat;
    std::filesystem::path directory;
  };

  /// Whether there is an agent file or a directory of segments, which stores had before there were markers.
  bool is_old_store() const;
  /// Whether the agent's sidecar is one. (The marker has the name of the sidecar of an agent `torpor`, which has none.)
  /// `or_no_json`: or such garbage as a power cut leaves of one.
  bool is_own_sidecar(const std::string& id, bool or_no_json = false) const;
  std::string read_beginning_of(const std::filesystem::path& path, size_t size) const;
  /// What to say of a file that holds another agent, `held`.
  Error renamed_agent(const std::string& id, const std::string& held) const;
  /// Ids of agents, by the names in the root alone: what bears one may be no file.
  std::vector<std::string> names() const;
  /// nullopt when there is no such agent any more.
  std::optional<AgentInfo> list_one(const std::string& id, bool rebuild_sidecar);
  /// To `info.bytes`, `tail_bytes` and `state_bytes`, which are the agent file's, those of its parts, states and segments.
  void add_file_sizes(AgentInfo& info, const AgentFile& agent) const;
  /// Best effort: a read-only or full store still lists. Bytes written.
  int64_t write_sidecar(const AgentInfo& info, const FileStat& agent_file) noexcept;
  /// Files that this process has seen, be they still there or not; nullptr when it has seen none.
  std::shared_ptr<const OwnFiles> known_files(const std::string& id) const;
  void know(const std::string& id, OwnFiles files);
  void forget(const std::string& id);
  /// Gives a file another name, or copies it where it can't have two. False when it has it already.
  bool link_part(const OwnFile& from, const std::filesystem::path& to);
  /// Makes everything that the agent file is going to name. `put` receives the files that were not there before,
  /// `unflushed` what is not known to survive a power cut.
  void put_parts(AgentDraft& draft, SaveResult& result, std::vector<std::filesystem::path>& put, std::vector<Unflushed>& unflushed);
  void flush(const std::vector<Unflushed>& unflushed);
  /// A file in a directory of the store's. What can't be removed now is left to gc.
  void remove_quietly(const std::filesystem::path& path) noexcept;

  Env& env_;
  const std::filesystem::path root_;
  const FilePool &segments_, &states_;
  WrittenBytes& written_;
  DurableFiles durable_;  ///< agent files and parts, by their checksums
  std::atomic<bool> parts_durable_ = false;  ///< the root names their directory on the disk
  std::atomic<bool> marker_durable_ = false;
  mutable Mutex mutex_, marker_mutex_;
  std::unordered_map<std::string, std::shared_ptr<const OwnFiles>> known_ TORPOR_GUARDED_BY(mutex_);  ///< by agent id
  mutable std::optional<FileStat> marker_stat_ TORPOR_GUARDED_BY(marker_mutex_);  ///< of what `marker_` was read from
  mutable std::optional<Marker> marker_ TORPOR_GUARDED_BY(marker_mutex_);
  mutable std::atomic<bool> is_store_ = false;
  std::atomic<bool> has_marker_ = false;
};

}  // namespace torpor
