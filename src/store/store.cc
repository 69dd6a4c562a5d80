#include <algorithm>
#include <cerrno>
#include <chrono>

#include <unistd.h>

#include "base/environment.h"
#include "store/store_impl.h"
#include "torpor/log.h"

namespace torpor {
namespace {

class HeldAgentLock final : public AgentLock {
 public:
  explicit HeldAgentLock(AgentFileLock lock) : lock_(std::move(lock)) {}

 private:
  AgentFileLock lock_;
};

/// Parents first; each new entry is flushed, so that a store that was told to be durable does not vanish whole.
void make_directories(Env& env, const std::filesystem::path& path) {
  if (env.exists(path)) return;
  const std::filesystem::path parent = path.has_parent_path() ? path.parent_path() : ".";
  make_directories(env, parent);
  if (env.make_directory(path)) env.sync_directory(parent);
}

/// Containers and shared machines have such directories on purpose, so this is no error.
void warn_of_others(const std::filesystem::path& root, const FileStat& stat) {
  constexpr uint32_t kOthersWrite = 022, kSticky = 01000;
  if (stat.owner != ::geteuid()) {
    log(LogLevel::kWarning, "The store '" + root.string() + "' belongs to another user (id " + std::to_string(stat.owner) +
                                "), who can read and change its agents; choose a directory of your own.");
  } else if ((stat.permissions & kOthersWrite) != 0 && (stat.permissions & kSticky) == 0) {
    log(LogLevel::kWarning, "Other users may write to the store '" + root.string() + "', and so change its agents; take that "
                            "permission away (mode 0700).");
  }
}

}  // namespace

std::filesystem::path default_store_root() {
  if (const std::string root = environment("TORPOR_STORE"); !root.empty()) return expand_home(root);
  if (const std::string home = home_directory(); !home.empty()) {
    return std::filesystem::path(home) / ".agent_caches";
  }
  throw Error(ErrorCode::kInvalidArgument, "There is no home directory, so there is no default store; name the store's directory.")
      .with_field("EngineOptions::store");
}

void check_agent_id(const std::string& id) {
  if (is_agent_id(id)) return;
  std::string shown;
  for (char c : id.substr(0, 140)) shown += c >= ' ' && c <= '~' ? c : '?';
  throw Error(ErrorCode::kInvalidArgument,
              "'" + shown + "' can't be an agent id: use 1 to 128 letters, digits, '.', '_' or '-', and begin with none "
              "of '.' and '-'.");
}

// ---- Store::Impl

Store::Impl::Impl(std::filesystem::path root_path, Env& environment) : root(std::move(root_path)), env(environment) {
  if (root.empty()) throw Error(ErrorCode::kInvalidArgument, "The store's directory has no name.");
  const auto stat = env.stat(root);
  if (stat && !stat->is_directory) {
    throw Error(ErrorCode::kIo, "'" + root.string() + "' is not a directory; choose another store.");
  }
  make_directories(env, root);
  if (stat) warn_of_others(root, *stat);
  (void)agents.marker();  // one of a newer version is refused at once
}

AgentFileLock lock_agent(Store::Impl& store, const std::string& id) {
  check_agent_id(id);
  store.agents.require_replaceable(id);
  return store.locks.agent(id, store.agents.agent_path(id));
}

// ---- Store

Store::Store(std::filesystem::path root, Env* env)
    : impl_(std::make_unique<Impl>(std::move(root), env != nullptr ? *env : Env::posix())) {}
const std::filesystem::path& Store::root() const { return impl_->root; }
Env& Store::env() const { return impl_->env; }

std::unique_ptr<AgentLock> Store::lock_agent(const std::string& agent_id) {
  return std::make_unique<HeldAgentLock>(torpor::lock_agent(*impl_, agent_id));
}
bool Store::is_awake(const std::string& agent_id) const {
  check_agent_id(agent_id);
  return impl_->locks.is_awake(agent_id);
}
SaveResult Store::save_agent_cache(const std::string& agent_id, const KvSnapshot& snapshot, const std::string& model,
                                   const UserMetadata& user, Durability durability, const AgentNotes& notes) {
  return save(*impl_, agent_id, snapshot, nullptr, model, user, durability, notes);
}
SaveResult Store::save_agent_cache(const std::string& agent_id, const KvSnapshot& snapshot, const BorrowedRows& rows,
                                   const std::string& model, const UserMetadata& user, Durability durability, const AgentNotes& notes) {
  return save(*impl_, agent_id, snapshot, &rows, model, user, durability, notes);
}
LoadedAgent Store::load_agent_cache(const std::string& agent_id, const LoadOptions& options) const {
  return load(*impl_, agent_id, options);
}
LoadedAgent Store::load_into(const std::string& agent_id, RowSink& sink, const Identity* expected,
                             const BufferAllocator& allocate) const {
  return load(*impl_, agent_id, {.expected = expected, .allocate = allocate}, &sink);
}
std::vector<int32_t> Store::agent_tokens(const std::string& agent_id) const {
  return impl_->agents.read(agent_id).ids;
}
std::vector<StoredMessage> Store::agent_messages(const std::string& agent_id) const {
  return impl_->agents.read(agent_id).messages;
}
SaveResult Store::save_prefix(const KvSnapshot& snapshot, Durability durability) {
  return torpor::save_prefix(*impl_, snapshot, durability);
}
int64_t Store::find_prefix(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                           std::span<const int32_t> tokens, const StatesSought* states) const {
  return torpor::find_prefix(*impl_, identity, lineage, layout, tokens, states);
}
LoadedPrefix Store::load_prefix(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                                std::span<const int32_t> tokens, const LoadOptions& options) const {
  return torpor::load_prefix(*impl_, identity, lineage, layout, tokens, options);
}
std::shared_ptr<const StateCheckpoint> Store::load_state(const KvSnapshot& conversation,
                                                         std::span<const std::string> segments, const StateRef& ref,
                                                         const BufferAllocator& allocate) const {
  return torpor::load_state(*impl_, conversation, segments, ref, allocate);
}
std::shared_ptr<const SealedRun> Store::map_segment(const std::string& name) const {
  return torpor::map_segment(*impl_, name);
}
bool Store::recheck(const KvLayout& layout, const SealedRun& run, const TensorMask& wanted) const {
  return torpor::recheck(*impl_, layout, run, wanted);
}
SaveResult Store::copy_agent_cache(const std::string& src, const std::string& dst, const CopyOptions& options) {
  return copy(*impl_, src, dst, options);
}
void Store::rename_agent_cache(const std::string& agent_id, const std::string& new_id) {
  rename_agent(*impl_, agent_id, new_id);
}
SaveResult Store::upgrade_agent(const std::string& agent_id) { return torpor::upgrade_agent(*impl_, agent_id); }
void Store::keep_record(const Record& record, std::string_view bytes, Durability durability) {
  torpor::keep_record(*impl_, record, bytes, durability);
}
std::string Store::read_record(const Record& record) const { return impl_->records.read(record); }
bool Store::drop_record(const Record& record, Durability durability) {
  return impl_->records.remove(record, durability == Durability::kFull);
}
std::vector<Record> Store::records() const { return impl_->records.list(); }
void Store::make_team(const std::string& id, std::string_view json, Durability durability) {
  keep_team(*impl_, id, json, true, durability);
}
void Store::save_team(const std::string& id, std::string_view json, Durability durability) {
  keep_team(*impl_, id, json, false, durability);
}
std::string Store::read_team(const std::string& id) const { return impl_->teams.read(id); }
bool Store::remove_team(const std::string& id, Durability durability) {
  return impl_->teams.remove(id, durability == Durability::kFull);
}
std::unique_ptr<AgentLock> Store::lock_team(const std::string& id) {
  return std::make_unique<HeldAgentLock>(impl_->locks.team(id, impl_->teams.path(id)));
}
std::vector<std::string> Store::teams() const { return impl_->teams.list(); }
std::vector<TeamReport> Store::verify_teams() const {
  std::vector<TeamReport> reports;
  for (const std::string& id : impl_->teams.list()) {
    TeamReport& report = reports.emplace_back();
    report.team = id;
    try {
      impl_->teams.read(id);
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kNotFound) {
        reports.pop_back();  // removed meanwhile
        continue;
      }
      report.problem = error.what();
    }
  }
  return reports;
}
void Store::set_disk_limits(const DiskLimits& limits) { impl_->set_disk_limits(limits); }
void Store::set_reclaimer(std::function<bool()> reclaim) { impl_->set_reclaimer(std::move(reclaim)); }
DiskLimits Store::kept_disk_limits() const { return kept_limits(*impl_); }
void Store::keep_disk_limits(const DiskLimits& limits) { keep_limits(*impl_, limits); }
AgentInfo Store::agent_info(const std::string& agent_id) const { return impl_->agents.info(agent_id); }
bool Store::contains(const std::string& agent_id) const {
  if (!is_agent_id(agent_id)) return false;
  switch (impl_->agents.holder(agent_id).kind) {
    case Catalogue::Holder::kNobody:
    case Catalogue::Holder::kForeign: return false;
    case Catalogue::Holder::kOther: return impl_->agents.is_listed(agent_id);  // else only the file system takes one for the other
    default: return true;
  }
}
std::vector<AgentInfo> Store::list_cached_agents() const { return impl_->agents.list(true); }
std::vector<int64_t> Store::count_missing_files(std::span<const AgentInfo> agents) const {
  return impl_->agents.count_missing(agents);
}
void Store::delete_agent_cache(const std::string& agent_id, bool whatever_it_is) { remove_agent(*impl_, agent_id, whatever_it_is); }
bool Store::delete_agent_cache_of(const std::string& agent_id, const std::string& hash) {
  return remove_agent(*impl_, agent_id, false, &hash);
}
DiskUsage Store::get_cache_disk_usage() const { return usage(*impl_); }
std::vector<VerifyReport> Store::verify(const std::optional<std::string>& agent_id) const {
  impl_->agents.require_store();
  std::unordered_map<std::string, std::string> checked_rows;
  if (agent_id) return {torpor::verify(*impl_, *agent_id, checked_rows)};
  std::vector<VerifyReport> reports;
  for (const auto& id : impl_->agents.ids()) {
    try {
      reports.push_back(torpor::verify(*impl_, id, checked_rows));
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kNotFound) throw;  // deleted meanwhile
    }
  }
  return reports;
}
GcResult Store::gc(bool dry_run) { return torpor::gc(*impl_, dry_run); }
void Store::export_agent(const std::string& agent_id, const std::filesystem::path& path, const std::string& as) const {
  torpor::export_agent(*impl_, agent_id, path, as);
}
SaveResult Store::import_agent(const std::filesystem::path& path, const std::string& agent_id) {
  return torpor::import_agent(*impl_, path, agent_id);
}

}  // namespace torpor
