#pragma once
/// The engine behind torpor.Engine and torpor.Team.

#include <exception>
#include <memory>
#include <optional>
#include <utility>

#include <nanobind/nanobind.h>

#include "torpor/engine.h"
#include "torpor/error.h"
#include "torpor/remote.h"

namespace torpor::python {

/// What an engine is made with. A bucket is attached to by whoever makes the engine, who has given the GIL back.
struct EngineSettings {
  EngineOptions engine;
  std::optional<RemoteOptions> remote;

  EngineOptions attached() const {
    EngineOptions options = engine;
    if (remote) options.remote = attach_remote(*remote);
    return options;
  }
};

/// An engine that can be closed, though a turn that runs keeps it until it is over.
class SharedEngine {
 public:
  explicit SharedEngine(EngineOptions options)
      : remote_(options.remote), engine_(std::make_shared<Engine>(std::move(options))) {}
  ~SharedEngine() {
    const nanobind::gil_scoped_release release;
    engine_.reset();
    remote_.reset();
  }

  const std::shared_ptr<Engine>& get() const {
    if (engine_ == nullptr) throw Error(ErrorCode::kInvalidArgument, "The engine is closed; make another one.");
    return engine_;
  }
  /// The engine's; nullptr: none.
  const std::shared_ptr<RemoteTier>& remote() const { return remote_; }
  /// Throws, when all is let go of, what saves behind turns have met.
  void close() {
    auto remote = std::move(remote_);
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
    remote.reset();
    if (failed) std::rethrow_exception(failed);
  }

 private:
  std::shared_ptr<RemoteTier> remote_;  // outlives the engine, which has one of its own
  std::shared_ptr<Engine> engine_;
};

}  // namespace torpor::python
