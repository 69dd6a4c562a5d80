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
  if (const std::string root = environment("TORPOR_STORE"); !root.empty()) return root;
  if (const std::string home = environment("HOME"); !home.empty()) {
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
  has_marker_ = is_store_ = marker().has_value();
}

AgentFileLock Store::Impl::lock_agent(const std::string& id) {
  check_agent_id(id);
  require_replaceable(id);
  return locks.agent(id, agent_path(id));
}

OpenedAgent Store::Impl::open_agent(const std::string& id) {
  check_agent_id(id);
  const auto path = agent_path(id);
  require_agent(id);
  File handle = env.open(path, OpenMode::kRead);
  const FileStat stat = handle.stat();
  try {
    AgentFile agent = parse_agent_file(read_header_bytes(handle, stat.size), stat.size, path.string());
    if (agent.info.agent_id != id) throw renamed_agent(id, agent.info.agent_id);
    return {std::move(handle), stat, std::move(agent)};
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kCorruption && holder(id).kind == Holder::kForeign) throw no_agent(id);
    throw;
  }
}

int64_t Store::Impl::write_sidecar(const AgentInfo& info, const FileStat& agent_file) noexcept {
  try {
    const auto path = sidecar_path(info.agent_id);
    if (path == marker_path()) return 0;
    if (env.exists(path) && !is_own_sidecar(info.agent_id, /*or_no_json=*/true)) throw Error(ErrorCode::kIo, "'" + path.string() + "' is no sidecar, and stays.");
    const std::string text = encode_sidecar(info, agent_file);
    // Never fsynced: half of one is found by its checksum and rebuilt.
    count_written(write_file(env, path, {as_bytes_of(text)}, false));
    return int64_t(text.size());
  } catch (const std::exception& error) {
    log(LogLevel::kWarning, "The sidecar of agent '" + info.agent_id + "' could not be written: " + error.what());
    return 0;
  }
}

// ---- Store

Store::Store(std::filesystem::path root, Env* env)
    : impl_(std::make_unique<Impl>(std::move(root), env != nullptr ? *env : Env::posix())) {}
Store::~Store() = default;
const std::filesystem::path& Store::root() const { return impl_->root; }
Env& Store::env() const { return impl_->env; }

std::unique_ptr<AgentLock> Store::lock_agent(const std::string& agent_id) {
  return std::make_unique<HeldAgentLock>(impl_->lock_agent(agent_id));
}
bool Store::is_awake(const std::string& agent_id) const {
  check_agent_id(agent_id);
  return impl_->locks.is_awake(agent_id);
}
SaveResult Store::save_agent_cache(const std::string& agent_id, const KvSnapshot& snapshot, const std::string& model,
                                   const UserMetadata& user, Durability durability, const AgentNotes& notes) {
  return impl_->save(agent_id, snapshot, nullptr, model, user, durability, notes);
}
SaveResult Store::save_agent_cache(const std::string& agent_id, const KvSnapshot& snapshot, const BorrowedRows& rows,
                                   const std::string& model, const UserMetadata& user, Durability durability, const AgentNotes& notes) {
  return impl_->save(agent_id, snapshot, &rows, model, user, durability, notes);
}
LoadedAgent Store::load_agent_cache(const std::string& agent_id, const LoadOptions& options) const {
  return impl_->load(agent_id, options);
}
LoadedAgent Store::load_into(const std::string& agent_id, RowSink& sink, const Identity* expected,
                             const BufferAllocator& allocate) const {
  return impl_->load(agent_id, {.expected = expected, .allocate = allocate}, &sink);
}
std::vector<int32_t> Store::agent_tokens(const std::string& agent_id) const {
  return impl_->read_agent(agent_id).ids;
}
std::vector<StoredMessage> Store::agent_messages(const std::string& agent_id) const {
  return impl_->read_agent(agent_id).messages;
}
SaveResult Store::save_prefix(const KvSnapshot& snapshot, Durability durability) {
  return impl_->save_prefix(snapshot, durability);
}
int64_t Store::find_prefix(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                           std::span<const int32_t> tokens) const {
  return int64_t(impl_->find_prefix(identity, lineage, layout, tokens).size()) * kSegmentTokens;
}
LoadedPrefix Store::load_prefix(const Identity& identity, const Lineage& lineage, const KvLayout& layout,
                                std::span<const int32_t> tokens, const LoadOptions& options) const {
  return impl_->load_prefix(identity, lineage, layout, tokens, options);
}
std::shared_ptr<const SealedRun> Store::map_segment(const std::string& name) const {
  return impl_->map_segment(name);
}
bool Store::recheck(const KvLayout& layout, const SealedRun& run, const TensorMask& wanted) const {
  return impl_->recheck(layout, run, wanted);
}
SaveResult Store::copy_agent_cache(const std::string& src, const std::string& dst, const CopyOptions& options) {
  return impl_->copy(src, dst, options);
}
void Store::rename_agent_cache(const std::string& agent_id, const std::string& new_id) {
  impl_->rename_agent(agent_id, new_id);
}
SaveResult Store::upgrade_agent(const std::string& agent_id) { return impl_->upgrade_agent(agent_id); }
void Store::set_disk_limits(const DiskLimits& limits) { impl_->set_disk_limits(limits); }
DiskLimits Store::kept_disk_limits() const { return impl_->kept_limits(); }
void Store::keep_disk_limits(const DiskLimits& limits) { impl_->keep_limits(limits); }
AgentInfo Store::agent_info(const std::string& agent_id) const { return impl_->info(agent_id); }
bool Store::contains(const std::string& agent_id) const {
  if (!is_agent_id(agent_id)) return false;
  switch (impl_->holder(agent_id).kind) {
    case Impl::Holder::kNobody:
    case Impl::Holder::kForeign: return false;
    case Impl::Holder::kOther: return impl_->is_listed(agent_id);  // else only the file system takes one for the other
    default: return true;
  }
}
std::vector<AgentInfo> Store::list_cached_agents() const { return impl_->list(true); }
void Store::delete_agent_cache(const std::string& agent_id, bool whatever_it_is) { impl_->remove_agent(agent_id, whatever_it_is); }
DiskUsage Store::get_cache_disk_usage() const { return impl_->usage(); }
std::vector<VerifyReport> Store::verify(const std::optional<std::string>& agent_id) const {
  impl_->require_store();
  std::unordered_map<std::string, std::string> checked_rows;
  if (agent_id) return {impl_->verify(*agent_id, checked_rows)};
  std::vector<VerifyReport> reports;
  for (const auto& id : impl_->agent_ids()) {
    try {
      reports.push_back(impl_->verify(id, checked_rows));
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kNotFound) throw;  // deleted meanwhile
    }
  }
  return reports;
}
GcResult Store::gc() { return impl_->gc(); }
void Store::export_agent(const std::string& agent_id, const std::filesystem::path& path) const {
  impl_->export_agent(agent_id, path);
}
SaveResult Store::import_agent(const std::filesystem::path& path, const std::string& agent_id) {
  return impl_->import_agent(path, agent_id);
}

}  // namespace torpor
