#pragma once
/// A team's step on a thread of its own, beside its turns'.

#include <memory>
#include <string>
#include <utility>

#include "running.h"
#include "torpor/teams.h"

namespace torpor::python {

/// Pieces are a member's name and some text of it.
class RunningStep : public Running<StepResult, std::pair<std::string, std::string>> {
 public:
  RunningStep(std::shared_ptr<Engine> engine, std::string team, StepRequest request);
  /// Half an answer would count as one: an unfinished step is given up.
  ~RunningStep();
};

}  // namespace torpor::python
