#pragma once
/// The engine behind torpor.Engine and torpor.Team.

#include <exception>
#include <memory>
#include <utility>

#include <nanobind/nanobind.h>

#include "torpor/engine.h"
#include "torpor/error.h"

namespace torpor::python {

/// An engine that can be closed, though a turn that runs keeps it until it is over.
class SharedEngine {
 public:
  explicit SharedEngine(EngineOptions options) : engine_(std::make_shared<Engine>(std::move(options))) {}
  ~SharedEngine() {
    const nanobind::gil_scoped_release release;
    engine_.reset();
  }

  const std::shared_ptr<Engine>& get() const {
    if (engine_ == nullptr) throw Error(ErrorCode::kInvalidArgument, "The engine is closed; make another one.");
    return engine_;
  }
  /// Throws, when all is let go of, what saves behind turns have met.
  void close() {
    auto engine = std::move(engine_);
    if (engine == nullptr) return;
    const nanobind::gil_scoped_release release;
    std::exception_ptr failed;
    try {
      engine->finish_saves();
    } catch (...) {
      failed = std::current_exception();
    }
    engine.reset();
    if (failed) std::rethrow_exception(failed);
  }

 private:
  std::shared_ptr<Engine> engine_;
};

}  // namespace torpor::python
