/// What in a directory is the store's, and what is somebody else's and stays.

#include <algorithm>
#include <cctype>

#include "store/catalogue.h"
#include "store/sidecar.h"
#include "torpor/error.h"

namespace torpor {
namespace {

bool same_but_for_case(const std::string& a, const std::string& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

}  // namespace

// ---- the marker

std::optional<Marker> Catalogue::marker() const {
  const auto path = marker_path();
  const auto stat = env_.stat(path);
  if (!stat) return std::nullopt;
  const MutexLock lock(marker_mutex_);
  if (marker_stat_ == stat) return marker_;
  if (stat->size > kMaxMarker) {
    throw Error(ErrorCode::kCorruption, "'" + path.string() +
                                            "' is damaged: it is too long. Restore it from a copy, or remove it; the "
                                            "next save to the store makes another, without limits.")
        .with_path(path.string());
  }
  marker_ = decode_marker(env_.read_file(path, kMaxMarker), path.string());
  marker_stat_ = stat;
  return marker_;
}

bool Catalogue::is_old_store() const {
  for (const auto& id : ids()) {
    const Holder::Kind kind = holder(id).kind;
    if (kind == Holder::kAgent || kind == Holder::kOther) return true;
  }
  const auto buckets = env_.list_own(segments_.directory());
  return std::any_of(buckets.begin(), buckets.end(), [&](const std::string& name) {
    return name.size() == 2 && name.find_first_not_of("0123456789abcdef") == std::string::npos &&
           env_.is_own_directory(segments_.directory() / name);
  });
}

void Catalogue::require_store() const {
  if (is_store_ || marker()) {
    is_store_ = true;
    return;
  }
  const auto names = env_.list(root_);
  // A store that nothing was saved to yet.
  if (std::all_of(names.begin(), names.end(),
                  [](const std::string& name) { return name == ".locks" || is_temporary_name(name); }))
    return;
  // The marker comes before all else: where somebody has just made the store it is there by now.
  if (!marker() && !is_old_store()) {
    throw Error(ErrorCode::kInvalidArgument,
                "'" + root_.string() + "' is no store of Torpor's: it has no '" + kMarkerName +
                    "', and other files; choose a store, or save an agent here to make it one.")
        .with_path(root_.string())
        .with_field("Store::root");
  }
  is_store_ = true;
}

void Catalogue::make_store() {
  if (has_marker_) return;
  const auto is_whole = [&] {
    const auto found = marker();
    return found && !found->text.empty();
  };
  if (!is_whole()) {
    const std::string text = encode_marker({});
    TemporaryFile file(env_, root_, {as_bytes_of(text)}, false);
    // What has the name and is no marker is the sidecar of an agent `torpor`, or what a power cut left.
    if (!file.put_new(marker_path()) && !is_whole()) file.replace(marker_path());
  }
  has_marker_ = is_store_ = true;
}

void Catalogue::flush_marker() {
  if (marker_durable_) return;
  env_.open(marker_path(), OpenMode::kRead).sync();
  env_.sync_directory(root_);
  marker_durable_ = true;
}

// ---- agents' files

std::string Catalogue::read_beginning_of(const std::filesystem::path& path, size_t size) const {
  const File file = env_.open(path, OpenMode::kRead);
  std::string text(size_t(std::min<uint64_t>(size, file.stat().size)), '\0');
  file.read_at(std::as_writable_bytes(std::span(text.data(), text.size())), 0);
  return text;
}

Catalogue::Holder Catalogue::holder(const std::string& id) const {
  const auto path = agent_path(id);
  const auto stat = env_.stat(path);
  if (!stat) return {Holder::kNobody, {}};
  if (!stat->is_file) return {Holder::kForeign, {}};
  if (const auto known = known_files(id); known != nullptr && known->stat == *stat) return {Holder::kAgent, {}};
  try {
    const AgentFileBeginning beginning = read_beginning(read_beginning_of(path, kAgentFileBeginning));
    if (!beginning.agent_id.empty())
      return {beginning.agent_id == id ? Holder::kAgent : Holder::kOther, beginning.agent_id};
    if (beginning.is_ours) return {Holder::kDamaged, {}};
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound) throw;
    return {Holder::kNobody, {}};  // removed meanwhile
  }
  return {is_own_sidecar(id) ? Holder::kUnreadable : Holder::kForeign, {}};
}

bool Catalogue::is_own_sidecar(const std::string& id, bool or_no_json) const {
  const auto path = sidecar_path(id);
  if (!env_.is_file(path)) return false;
  try {
    const std::string text = read_beginning_of(path, kSidecarBeginning);
    const size_t first = text.find_first_not_of(" \t\r\n");
    const bool is_json = first != std::string::npos && (text[first] == '{' || text[first] == '[');
    return is_sidecar(text) || (or_no_json && !is_json);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound) throw;
    return false;
  }
}

bool Catalogue::is_listed(const std::string& id) const {
  const auto names = env_.list(root_);
  return std::binary_search(names.begin(), names.end(), agent_path(id).filename().string());
}

Error Catalogue::no_agent(const std::string& id) const {
  return Error(ErrorCode::kNotFound, "There is no agent '" + id + "' in '" + root_.string() + "'.")
      .with_agent(id)
      .with_path(root_.string());
}

Error Catalogue::renamed_agent(const std::string& id, const std::string& held) const {
  const std::string path = agent_path(id).string();
  if (same_but_for_case(id, held) && !is_listed(id)) return no_agent(id);
  return Error(ErrorCode::kCorruption,
               "'" + path + "' holds the agent '" + held + "': the file was renamed; give it its old name back.")
      .with_agent(id)
      .with_path(path);
}

void Catalogue::require_replaceable(const std::string& id) const {
  const Holder held = holder(id);
  if (held.kind == Holder::kNobody || held.kind == Holder::kAgent) return;
  const std::string path = agent_path(id).string();
  if (held.kind == Holder::kForeign) {
    throw Error(ErrorCode::kInvalidArgument,
                "'" + path +
                    "' is somebody else's file, so no agent can be kept there; choose another id, "
                    "or move the file aside.")
        .with_agent(id)
        .with_path(path);
  }
  if (!is_listed(id)) {
    throw Error(ErrorCode::kInvalidArgument,
                "There can be no agent '" + id +
                    "' beside one whose id differs in upper and lower case "
                    "alone, for this file system does not tell them apart; choose another id.")
        .with_agent(id)
        .with_path(path);
  }
  if (held.kind == Holder::kOther) throw renamed_agent(id, held.id);
}

void Catalogue::require_removable(const std::string& id, bool whatever_it_is) const {
  const Holder held = holder(id);
  if (held.kind == Holder::kAgent) return;
  // On a file system that folds case the name may be another agent's.
  if (held.kind == Holder::kNobody || !env_.is_file(agent_path(id)) || !is_listed(id)) throw no_agent(id);
  if (held.kind == Holder::kDamaged || whatever_it_is) return;
  if (held.kind == Holder::kOther) throw renamed_agent(id, held.id).with_field("force");
  const std::string path = agent_path(id).string();
  throw Error(ErrorCode::kInvalidArgument,
              "'" + path + "' has no header of Torpor's, so it was not removed; if it is to go, remove it by force.")
      .with_agent(id)
      .with_path(path)
      .with_field("force");
}

}  // namespace torpor
