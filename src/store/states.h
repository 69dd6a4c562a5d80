#pragma once
/// States on disk, looked for and read.

#include "store/state_file.h"
#include "store/store_impl.h"

namespace torpor {

/// Reads and checks one; `layout` receives what it consists of. kNotFound, kCorruption.
std::shared_ptr<const StateCheckpoint> load_state(Store::Impl& store, const StateChain& chain, const StateRef& ref,
                                                  const BufferAllocator& allocate, StateLayout& layout);
/// What to say of one that is not there.
std::string missing_state(Store::Impl& store, const StateRef& ref);
/// Those of a prefix that are there, the last first, up to the end of its segments.
std::vector<StateRef> find_states(Store::Impl& store, const StateChain& chain, const StatesSought& sought);

}  // namespace torpor
