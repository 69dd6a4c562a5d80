#include "remote/custody.h"

#include <chrono>

namespace torpor::remote {

CopyStep judge_copy(const std::optional<std::string>& copy, const std::optional<std::string>& cached, bool in_use,
                    const std::optional<std::string>& committed) {
  if (!copy) return committed ? CopyStep::kInstall : CopyStep::kKeep;
  if (copy == committed) return CopyStep::kKeep;
  if (in_use || cached == copy) return committed ? CopyStep::kInstall : CopyStep::kRemove;
  return committed || cached ? CopyStep::kRefuse : CopyStep::kAdopt;
}

OwnerStep judge_owner(const std::optional<Instant>& first, const std::optional<LeaseWatch::Seen>& seen) {
  if (!seen) return OwnerStep::kLook;
  if (seen->is_gone()) return OwnerStep::kGone;
  const bool renewed = first && *first != seen->since;
  const bool lately = seen->asked - seen->since < std::chrono::milliseconds(seen->lease.ttl_ms) / 2;
  return renewed && lately ? OwnerStep::kAlive : OwnerStep::kLook;
}

}  // namespace torpor::remote
