#pragma once
/// What a store does of what Torpor needs, found by trying. Much that speaks S3's protocol ignores conditions or checks
/// them too late, and two machines would then both believe that they own an agent.

#include <cstddef>
#include <string>
#include <vector>

#include "remote/object_store.h"

namespace torpor::remote {

/// One thing that was tried.
struct ProbeCheck {
  std::string name;     ///< "create-again"
  std::string meaning;  ///< "an object that is there is not created again"
  bool holds = false;
  std::string found;  ///< what happened in its place; empty when it holds
};

struct ProbeReport {
  std::vector<ProbeCheck> checks;
  bool holds() const;  ///< all of them
};

/// Tries on objects below "probe/", with names that nobody else draws, and removes them. `large`: also an object of
/// 8 MiB, which is read in parallel. Throws what the first request throws: then nothing is known of the store.
ProbeReport probe(ObjectStore& store, bool large);

/// kInvalidArgument, in one sentence, when the store doesn't do what `probe` tries. `name` is the store's, for the
/// sentence.
void require_conditions(ObjectStore& store, const std::string& name);

struct RaceReport {
  size_t rounds = 0;
  size_t without_winner = 0;  ///< steps that nobody won; a round has two
  size_t with_several = 0;    ///< steps that several writers won: the store checks its conditions too late
  size_t of_another = 0;      ///< steps after which the object is not the winner's
  size_t lost = 0;            ///< writers that got no answer, or an error
  bool holds() const { return without_winner == 0 && with_several == 0 && of_another == 0; }
};

/// In each round `writers` threads create one object at a time, then replace it by its tag; both must have one winner.
RaceReport race(ObjectStore& store, size_t writers, size_t rounds);

}  // namespace torpor::remote
