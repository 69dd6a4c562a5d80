/// An agent's own files: opened, read, and remembered as they were last seen intact.

#include <algorithm>

#include "store/catalogue.h"
#include "torpor/error.h"

namespace torpor {

std::vector<OpenedFile> Catalogue::open_files(const OpenedAgent& opened) const {
  const AgentFile& agent = opened.agent;
  const KnownLayout layout{encode_layout(agent.file.layout, kFormatVersion), agent.file.layout.bytes_per_token()};
  std::vector<OpenedFile> files;
  for (const PartRef& ref : agent.parts) {
    OpenedFile& part = files.emplace_back();
    part.ref = ref;
    part.path = part_path(agent.uid, ref.name);
    const std::string name = part.path.string();
    try {
      File handle = env_.open(part.path, OpenMode::kRead);
      part.stat = handle.stat();
      PartFile parsed = parse_part_file(read_header_bytes(handle, part.stat.size), part.stat.size, name, layout);
      const TorporFile& file = parsed.file;
      const auto corrupt = [&](const char* what) {
        throw Error(ErrorCode::kCorruption, "'" + name + "' is damaged: " + what + ".").with_path(name);
      };
      if (file.checksum != ref.name) corrupt("it is another file than its name says");
      if (parsed.first != ref.first || ref.tokens > int64_t(file.n_tokens))
        corrupt("its ids are not those of the agent");
      const int64_t rows = std::max<int64_t>(0, ref.tokens - int64_t(file.n_tokens - file.rows));
      if (ref.rows != 0 && ref.rows != rows) corrupt("its rows are not those of the agent");
      part.handle = std::make_shared<const File>(std::move(handle));
      part.file = std::make_shared<const TorporFile>(std::move(parsed.file));
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kIo) throw;
      part.missing = error.code() == ErrorCode::kNotFound;
      part.problem = part.missing
                         ? "The part '" + name + "' is missing; restore it from a copy, or wake the agent with salvage."
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

void Catalogue::know(const std::string& id, const OpenedAgent& opened, std::vector<OwnFile> files) {
  if (opened.agent.file.version < kFormatVersion) files.clear();  // none can be a part
  know(id, {opened.stat, opened.agent.uid, opened.agent.info.created_at,
            layout_digest(opened.agent.file.layout, kFormatVersion), part_names(opened.agent.parts),
            state_names(opened.agent.info), std::move(files)});
}

void Catalogue::know(const std::string& id, OwnFiles files) {
  constexpr size_t kMostAgents =
      1 << 14;  // beyond it everything is forgotten, which costs one reading of what comes next
  const MutexLock lock(mutex_);
  if (known_.size() >= kMostAgents) known_.clear();
  known_[id] = std::make_shared<const OwnFiles>(std::move(files));
}

void Catalogue::forget(const std::string& id) {
  const MutexLock lock(mutex_);
  known_.erase(id);
}

std::shared_ptr<const OwnFiles> Catalogue::files(const std::string& id) {
  const auto stat = env_.stat(agent_path(id));
  if (!stat) return nullptr;
  if (auto known = known_files(id); known != nullptr && known->stat == *stat) return known;
  try {
    const OpenedAgent opened = open(id);
    // All of it, before anything is built on it.
    OwnFiles found{opened.stat, opened.agent.uid, opened.agent.info.created_at,
                   layout_digest(opened.agent.file.layout, kFormatVersion), part_names(opened.agent.parts),
                   state_names(opened.agent.info), {}};
    if (opened.agent.file.version == kFormatVersion) {
      RowBuffer rows;
      for (const OpenedFile& file : open_files(opened)) {
        if (file.handle == nullptr) break;
        OwnContents contents = read_own_file(file, opened.agent.file.layout, &rows);
        if (!contents.problem.empty()) break;
        found.files.push_back(std::move(contents.file));
      }
    }
    know(id, std::move(found));
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kIo) throw;
    return nullptr;  // a damaged file is being replaced: the agent begins anew
  }
  return known_files(id);
}

std::shared_ptr<const OwnFiles> Catalogue::known_files(const std::string& id) const {
  const MutexLock lock(mutex_);
  const auto found = known_.find(id);
  return found != known_.end() ? found->second : nullptr;
}

OwnState Catalogue::read(const std::string& id) const {
  constexpr int kAttempts = 5;
  for (int attempt = 1;; ++attempt) {
    const OpenedAgent opened = open(id);
    const AgentFile& agent = opened.agent;
    OwnState own = read_own_state(open_files(opened), agent.file.layout,
                                  {.sealed = agent.info.cache_size, .length = agent.info.cache_size, .rows = false});
    if (!agent.old_messages.empty()) own.messages = agent.old_messages;
    if (own.problem.empty()) return own;
    // A save in another process may have put a new agent file in place, which needs other files.
    if (attempt < kAttempts && own.missing && env_.stat(agent_path(id)) != opened.stat) continue;
    throw Error(ErrorCode::kCorruption, own.problem).with_agent(id);
  }
}

}  // namespace torpor
