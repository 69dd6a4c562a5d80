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

/// The files of a prefix's rows that are kept apart, first to last, each at the end of its segment.
std::vector<StateRef> find_windows(Store::Impl& store, const StateChain& chain, const KvLayout& layout);
/// resumable_by_windows where these files are there. Nothing behind `sealed` tokens is in files of this kind.
int64_t resumable_by_files(const KvLayout& layout, std::span<const StateRef> windows, int64_t sealed, int64_t n_tokens);

}  // namespace torpor
