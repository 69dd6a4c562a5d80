#pragma once
/// What a worker says when something fails.

#include <string>

#include "base/env.h"
#include "base/foreign_error.h"
#include "torpor/error.h"
#include "torpor/log.h"
#include "torpor/remote_tier.h"
#include "torpor/store.h"

namespace torpor::remote {

/// 32 hex digits that nobody else draws.
inline std::string draw() { return Env::posix().random_id(); }

inline Error elsewhere(const std::string& id, const std::string& what, const std::string& address = {}) {
  return Error(ErrorCode::kBusy, "The agent '" + id + "' " + what)
      .with_agent(id)
      .with_field(kAgentElsewhere, {}, address);
}

inline Error uncommitted(const std::string& id, const std::string& why) {
  return Error(ErrorCode::kBusy, "Whether the change of agent '" + id + "' was committed to the bucket is not known (" +
                                     why + "); ask again with the same id.")
      .with_agent(id)
      .with_field(kUncommitted);
}

[[noreturn]] inline void refuse_copy(const std::string& id, const Store& store, const std::string& bucket) {
  throw Error(ErrorCode::kIncompatible, "The agent '" + id + "' in '" + store.root().string() +
                                            "' was changed without the bucket, which " + bucket +
                                            "; push it there, or remove it here.")
      .with_agent(id)
      .with_field("copy");
}

/// Of what nobody waits for, to the log. In a catch block.
inline void tell(const std::string& what) noexcept {
  try {
    log(LogLevel::kWarning, what + ": " + to_error(std::current_exception(), "the bucket").what());
  } catch (...) {
    // There is no memory for the sentence.
  }
}

}  // namespace torpor::remote
