#pragma once
/// Removing from the bucket what no agent needs, beside workers that save, and safe from sweepers that are paused.
///
/// Object stores remove without condition, and a removal may be applied at any time after it was sent. So a sweeper may
/// only remove what will never be needed again, and decide that once. Ages don't decide it: a laptop that sleeps in the
/// middle of a save, or of a sweep, outlives any period of grace. Generations do.
///
/// The sweep of generation n:
///   1. reads all heads: `before`.
///   2. raises the sweep record's generation to n, by compare-and-swap. Another live sweeper: kBusy. One that doesn't
///      renew its lease is waited for until that is dead. (To begin beside it does no harm: by step 6 it has decided
///      before, or decides nothing. It would undo its work.)
///   3. waits until each lease has announced n or more, or is of a worker that is gone (LeaseWatch).
///   4. lists all saves, and reads all heads again. The head of an owner that is gone is freed: its epoch is raised, so
///      what that owner has under way can't be committed any more. An owner whose lease is younger than step 3 began
///      after step 2, and knows n from its first acquisition.
///   5. reads the manifests of the saves that heads name now, or named in step 1, and of all saves with a later
///      sequence than in step 1. What they name stays.
///   6. reads the sweep record again; if another sweep has begun, this one has decided nothing.
///   7. removes pool objects of generations before n that step 5 did not find, and saves that can never be committed or
///      read again: those with no later sequence than the head of step 4, which it does not name.
///   8. removes the leases of workers that are gone.
/// However it ends, the record then names no sweeper.
///
/// Why no head ever names a key that step 7 removes. Let K be such a key, of a generation before n, and let C be the
/// first commit after step 4's listing whose save names K. By rule 2 of ownership.h C has K from one of three places.
/// (c) from its own generation: then it began before it knew n. Its worker had not announced n: it is gone, or waited
///     for. If it owned the agent at step 4, the head was freed there, and C fails. If it came to own it later, it read
///     the generation after that (rule 3), and knew n.
/// (a) from the head that it replaced: that head was current until C.
/// (b) from a head that was current at some time after C's save had begun. By (c)'s argument the save began with n
///     known, so that time is after step 2.
/// In (a) and (b) the named save was current at some time after step 2, and names K. If it was put after step 4's
/// listing, it was committed after it and before C: C was not the first. So it was put before. It was not removed
/// before the listing: only a sweep removes saves, and an earlier one decided in its steps 4 to 6, before step 2, when
/// the save was not yet behind its head. So step 4 lists it, and step 5 reads it, because it is named in step 1 or
/// later than that. Then K stays. Nothing here asks how long a step takes, so a sweeper that is paused in step 7 does
/// no harm. And K never comes back: what puts K's file again knows n or more, and puts it under another key.
///
/// The price: bytes that are put again under a new key when an agent needs a file that nobody names any more, or that
/// the worker has not read a head for, once in a generation. Tombstones stay, for a head's key must not go (it has no
/// generation); an agent of that name may use it.

#include <cstdint>
#include <string>

#include "remote/lease.h"
#include "remote/operation.h"

namespace torpor::remote {

struct SweepOptions {
  std::string session;     ///< of the worker that sweeps: it has a lease, and renews it meanwhile
  std::string save_ids;    ///< 24 hex digits that nobody else draws; this call's save ids begin with them
  Instant look_every{std::chrono::seconds(3)};
  int looks = 20;          ///< after which step 3 is given up
};

struct Swept {
  enum class Outcome {
    kDone,
    kBusy,      ///< another sweep is under way
    kWaited,    ///< a worker did not end its saves in time; nothing was removed
    kReplaced,  ///< another sweep has begun meanwhile; nothing was removed
  };
  Outcome outcome = Outcome::kBusy;
  int64_t generation = 0;
  int64_t objects = 0, bytes = 0;  ///< removed: pool objects and saves
  int64_t freed = 0;               ///< agents of workers that were gone
};

/// `watch`: the worker's. It outlives the operation. kCorruption: a head, or a save that it names, can't be read; then
/// nothing is removed, for it is not known what it needs.
Operation<Swept> sweep(Exchange& exchange, LeaseWatch& watch, SweepOptions options);

}  // namespace torpor::remote
