#pragma once
/// The sidecar: an agent's metadata as JSON for people and for `ls`. Derived from the agent file, and never trusted
/// over it. A checksum of itself shows edits; the agent file's size, time and inode show that it is stale.

#include <optional>
#include <string>
#include <string_view>

#include "base/env.h"
#include "torpor/store.h"

namespace torpor {

std::string encode_sidecar(const AgentInfo& info, const FileStat& agent_file);

inline constexpr size_t kSidecarBeginning = 32;  ///< bytes that say whether a file is one
/// Whether a text begins as a sidecar does, be it cut short or a little damaged.
bool is_sidecar(std::string_view beginning);

/// nullopt when the text was edited, damaged, or speaks of another state of the agent file.
std::optional<AgentInfo> decode_sidecar(const std::string& text, const FileStat& agent_file);

}  // namespace torpor
