#pragma once
/// An agent file ready to be written, and what has to be on disk beside it.

#include <optional>
#include <string>
#include <vector>

#include "store/own_files.h"

namespace torpor {

/// What an agent is to consist of. All of it must outlive a draft of it.
struct AgentState {
  const KvLayout& layout;
  std::span<const int32_t> tokens;
  int64_t sealed = 0;                        ///< so many of them are in segments
  KvTail tail;                               ///< rows of the others, in one piece; none where no file is to hold any
  std::span<const KvState> state;
  std::span<const StoredMessage> messages;
  bool without_tail = false;                 ///< AgentFile's, and then there is no tail
  std::string whole = {};
};

/// A file of which the header is made.
struct FileDraft {
  PartRef ref;                               ///< its checksum, ids and rows
  std::string header, messages;
  std::vector<std::span<const std::byte>> rows;  ///< where they are in the agent's tail
  std::span<const KvState> state;
  std::span<const int32_t> ids;
  OwnFile digests;                           ///< of what is in it; not where it is
  std::vector<std::span<const std::byte>> pieces() const;
  int64_t size() const;
};

struct AgentDraft {
  AgentInfo info;
  std::string uid;
  std::string layout;                        ///< its digest
  FileDraft file;
  std::optional<FileDraft> history;          ///< a part without rows, to be written first
  std::vector<OwnFile> kept;                 ///< parts of the agent; those that lie elsewhere are to be linked
  std::vector<std::filesystem::path> obsolete;  ///< to be removed when the agent file is in place
  bool digests_known = true;                 ///< those of `kept`
};

/// How many rows of such a draft would be in its agent file.
int64_t rows_to_write(std::span<const OwnFile> held, const AgentState& state);

/// `held`: files on disk that hold what `state` begins with (held_files), the last of which may be the agent file
/// that is replaced.
AgentDraft draft_agent(AgentInfo info, const std::string& uid, const AgentState& state, std::vector<OwnFile> held);

/// Those of the files, from the first on, that hold what `agent` begins with: ids, messages and rows are equal. The last
/// one may hold more. kIo.
std::vector<OwnFile> held_files(Env& env, const OwnFiles& known, const AgentState& agent);

/// Of the agent file, a part that is written with it and, at most, its sidecar.
int64_t bytes_to_write(const AgentDraft& draft);

/// What nobody may remove until `draft` is committed (Writing::claim).
std::vector<std::string> claims_of(const AgentDraft& draft);

}  // namespace torpor
