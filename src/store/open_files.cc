/// The files of one agent's own, as the store has them.

#include <algorithm>

#include "base/checked.h"
#include "base/hash.h"
#include "store/messages.h"
#include "store/store_impl.h"

namespace torpor {

std::vector<OpenedFile> Store::Impl::open_own_files(const OpenedAgent& opened) {
  const AgentFile& agent = opened.agent;
  const KnownLayout layout{encode_layout(agent.file.layout, kFormatVersion), agent.file.layout.bytes_per_token()};
  std::vector<OpenedFile> files;
  for (const PartRef& ref : agent.parts) {
    OpenedFile& part = files.emplace_back();
    part.ref = ref;
    part.path = part_path(agent.uid, ref.name);
    const std::string name = part.path.string();
    try {
      File handle = env.open(part.path, OpenMode::kRead);
      part.stat = handle.stat();
      PartFile parsed = parse_part_file(read_header_bytes(handle, part.stat.size), part.stat.size, name, layout);
      const TorporFile& file = parsed.file;
      const auto corrupt = [&](const char* what) {
        throw Error(ErrorCode::kCorruption, "'" + name + "' is damaged: " + what + ".").with_path(name);
      };
      if (file.checksum != ref.name) corrupt("it is another file than its name says");
      if (parsed.first != ref.first || ref.tokens > int64_t(file.n_tokens)) corrupt("its ids are not those of the agent");
      const int64_t rows = std::max<int64_t>(0, ref.tokens - int64_t(file.n_tokens - file.rows));
      if (ref.rows != 0 && ref.rows != rows) corrupt("its rows are not those of the agent");
      part.handle = std::make_shared<const File>(std::move(handle));
      part.file = std::make_shared<const TorporFile>(std::move(parsed.file));
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kIo) throw;
      part.missing = error.code() == ErrorCode::kNotFound;
      part.problem = part.missing ? "The part '" + name + "' is missing; restore it from a copy, or wake the agent with salvage."
                                  : error.what();
    }
  }
  OpenedFile& own = files.emplace_back();
  own.ref = {agent.info.hash, agent.first, int64_t(agent.file.n_tokens), int64_t(agent.file.rows)};
  own.path = opened.handle.path();
  own.stat = opened.stat;
  // As long as `opened`.
  own.handle = {std::shared_ptr<const File>(), &opened.handle};
  own.file = {std::shared_ptr<const TorporFile>(), &agent.file};
  return files;
}

void Store::Impl::know_files(const std::string& id, const OpenedAgent& opened, std::vector<OwnFile> files) {
  if (opened.agent.file.version < kFormatVersion) files.clear();  // none can be a part
  know_files(id, {opened.stat, opened.agent.uid, opened.agent.info.created_at,
                  layout_digest(opened.agent.file.layout, kFormatVersion), part_names(opened.agent.parts), std::move(files)});
}

void Store::Impl::know_files(const std::string& id, OwnFiles files) {
  constexpr size_t kMostAgents = 1 << 14;  // beyond it everything is forgotten, which costs one reading of what comes next
  const std::lock_guard lock(own_files_mutex_);
  if (own_files_.size() >= kMostAgents) own_files_.clear();
  own_files_[id] = std::make_shared<const OwnFiles>(std::move(files));
}

void Store::Impl::forget_files(const std::string& id) {
  const std::lock_guard lock(own_files_mutex_);
  own_files_.erase(id);
}

std::shared_ptr<const OwnFiles> Store::Impl::own_files(const std::string& id) {
  const auto stat = env.stat(agent_path(id));
  if (!stat) return nullptr;
  if (auto known = own_files_known(id); known != nullptr && known->stat == *stat) return known;
  try {
    const OpenedAgent opened = open_agent(id);
    // All of it, before anything is built on it.
    OwnFiles found{opened.stat, opened.agent.uid, opened.agent.info.created_at,
                   layout_digest(opened.agent.file.layout, kFormatVersion), part_names(opened.agent.parts), {}};
    if (opened.agent.file.version == kFormatVersion) {
      RowBuffer rows;
      for (const OpenedFile& file : open_own_files(opened)) {
        if (file.handle == nullptr) break;
        OwnContents contents = read_own_file(file, opened.agent.file.layout, &rows);
        if (!contents.problem.empty()) break;
        found.files.push_back(std::move(contents.file));
      }
    }
    know_files(id, std::move(found));
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    return nullptr;  // a damaged file is being replaced: the agent begins anew
  }
  return own_files_known(id);
}

std::shared_ptr<const OwnFiles> Store::Impl::own_files_known(const std::string& id) {
  const std::lock_guard lock(own_files_mutex_);
  const auto found = own_files_.find(id);
  return found != own_files_.end() ? found->second : nullptr;
}

std::vector<OwnFile> Store::Impl::held_files(const OwnFiles& known, const AgentState& agent) {
  std::vector<OwnFile> held;
  if (known.layout != layout_digest(agent.layout, kFormatVersion)) return held;
  const int64_t n_tokens = int64_t(agent.tokens.size());
  int64_t position = 0;
  std::span<const StoredMessage> messages = agent.messages;
  for (size_t i = 0; i < known.files.size(); ++i) {
    OwnFile file = known.files[i];
    if (file.ref.first != position || file.ref.first > n_tokens) break;
    if (i + 1 < known.files.size() && env.stat(file.path) != file.stat) break;
    int64_t end = std::min(file.ref.end(), n_tokens);
    if (const int64_t rows_begin = file.ref.end() - file.ref.rows; end > agent.sealed && rows_begin > std::max(agent.sealed, file.ref.first)) {
      end = agent.sealed;  // not all the rows that it would have to have
    }
    const bool cut = end < file.ref.end();
    if (cut && (end <= file.ref.first || !cut_own_file(file, agent.layout, end))) break;
    const PartRef& ref = file.ref;
    if (hash_hex(token_bytes(agent.tokens.subspan(size_t(ref.first), size_t(ref.tokens)))) != file.ids) break;
    if (file.n_messages > messages.size() || hash_hex(encode_messages(messages.first(file.n_messages))) != file.messages) break;
    if (end > agent.sealed &&
        rows_checksum(agent.layout, {agent.tail.bytes.data(), agent.tail.n_tokens, int(end - ref.rows - agent.sealed)}, int(ref.rows)) != file.rows) {
      break;
    }
    messages = messages.subspan(file.n_messages);
    position = end;
    held.push_back(std::move(file));
    if (cut) break;
  }
  return held;
}

bool Store::Impl::cut_own_file(OwnFile& file, const KvLayout& layout, int64_t end) {
  try {
    const KnownLayout known_layout{encode_layout(layout, kFormatVersion), layout.bytes_per_token()};
    const auto handle = std::make_shared<const File>(env.open(file.path, OpenMode::kRead));
    const uint64_t size = file.stat.size;
    const auto header = read_header_bytes(*handle, size);
    const auto parsed = std::make_shared<const TorporFile>(parse_part_file(header, size, file.path.string(), known_layout).file);
    if (parsed->checksum != file.ref.name) return false;
    RowBuffer rows;
    OwnContents contents = read_own_file({file.ref, file.path, handle, file.stat, parsed}, layout, &rows);
    if (!contents.problem.empty()) return false;
    cut_contents(contents, layout, end);
    file = std::move(contents.file);
    return true;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    return false;  // it is written anew
  }
}

void Store::Impl::find_obsolete(const std::string& uid, const std::vector<std::string>& parts, AgentDraft& draft) {
  for (const std::string& name : parts) {
    const bool kept = uid == draft.uid &&
                      (std::any_of(draft.kept.begin(), draft.kept.end(), [&](const OwnFile& part) { return part.ref.name == name; }) ||
                       (draft.history && draft.history->ref.name == name));
    if (!kept) draft.obsolete.push_back(part_path(uid, name));
  }
}

std::optional<AgentFile> Store::Impl::agent_file(const std::string& id) {
  try {
    if (env.exists(agent_path(id))) return open_agent(id).agent;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
  }
  return std::nullopt;
}

void Store::Impl::add_file_sizes(AgentInfo& info, const AgentFile& agent) {
  for (const PartRef& part : agent.parts) {
    const auto stat = env.stat(part_path(agent.uid, part.name));
    info.tail_bytes = saturating_add(info.tail_bytes, int64_t(stat.value_or(FileStat{}).size));
  }
  info.bytes = info.tail_bytes;
  for (const auto& stat : segments.find(info.segments)) {
    info.bytes = saturating_add(info.bytes, int64_t(stat.value_or(FileStat{}).size));
  }
}

OwnState Store::Impl::read_agent(const std::string& id) {
  constexpr int kAttempts = 5;
  for (int attempt = 1;; ++attempt) {
    const OpenedAgent opened = open_agent(id);
    const AgentFile& agent = opened.agent;
    OwnState own = read_own_state(open_own_files(opened), agent.file.layout,
                                  {.sealed = agent.info.cache_size, .length = agent.info.cache_size, .rows = false});
    if (!agent.old_messages.empty()) own.messages = agent.old_messages;
    if (own.problem.empty()) return own;
    // A save in another process may have put a new agent file in place, which needs other files.
    if (attempt < kAttempts && own.missing && env.stat(agent_path(id)) != opened.stat) continue;
    throw Error(ErrorCode::kCorruption, own.problem).with_agent(id);
  }
}

std::string Store::Impl::part_claim(const std::string& uid, const std::string& name) { return hash_hex(part_stem(uid, name)); }

std::vector<std::string> Store::Impl::claims_of(const AgentDraft& draft) {
  std::vector<std::string> claims = draft.info.segments;
  for (const OwnFile& part : draft.kept) claims.push_back(part_claim(draft.uid, part.ref.name));
  if (draft.history) claims.push_back(part_claim(draft.uid, draft.history->ref.name));
  return claims;
}

}  // namespace torpor
