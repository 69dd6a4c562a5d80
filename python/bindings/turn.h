#pragma once
/// A turn on a thread of its own.

#include <memory>
#include <string>

#include "running.h"
#include "torpor/engine.h"

namespace torpor::python {

class RunningTurn : public Running<TurnResult, std::string> {
 public:
  RunningTurn(std::shared_ptr<Engine> engine, TurnRequest request);
};

}  // namespace torpor::python
