#pragma once
/// What a worker decides about an agent that it is asked for. Nothing here does I/O.

#include <optional>
#include <string>

#include "remote/lease.h"

namespace torpor::remote {

enum class CopyStep {
  kKeep,     ///< it is the last commit, or there is neither copy nor commit
  kInstall,  ///< the commit takes its place
  kRemove,   ///< it is of an agent that is gone
  kAdopt,    ///< the bucket has no such agent yet: it is committed as it is
  kRefuse,   ///< it has what the bucket doesn't have, and nobody knows which of them is meant
};
/// Checksums of agent files; nullopt: none. `copy`: the store's. `cached`: what that was when it was last equal to a
/// commit. `in_use`: a worker has it, or was killed: what the copy has beyond a commit was never told to anybody.
/// `committed`: the one that the head names.
CopyStep judge_copy(const std::optional<std::string>& copy, const std::optional<std::string>& cached, bool in_use,
                    const std::optional<std::string>& committed);

enum class OwnerStep {
  kAlive,  ///< it was seen to renew its lease lately
  kGone,   ///< it may be taken over from
  kLook,   ///< look again: that is not known yet
};
/// `first`: since when the owner's lease had the tag that it was first seen with; `seen`: as of the last look. An owner
/// is alive if its tag has changed under an observer's eyes, within half of its TTL.
OwnerStep judge_owner(const std::optional<Instant>& first, const std::optional<LeaseWatch::Seen>& seen);

}  // namespace torpor::remote
