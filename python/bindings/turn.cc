#include "turn.h"

#include <chrono>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"

namespace nb = nanobind;

namespace torpor::python {

RunningTurn::RunningTurn(std::shared_ptr<Engine> engine, TurnRequest request)
    : engine_(std::move(engine)), request_(std::move(request)) {
  request_.generate.cancel = &cancelled_;
  request_.generate.on_prefill = [this](int, int) { check_undone(); };
  request_.generate.on_text = [this](std::string_view text) {
    check_undone();
    const std::lock_guard lock(mutex_);
    pieces_.emplace_back(text);
    changed_.notify_all();
  };
  thread_ = std::thread([this] { run(); });
}

RunningTurn::~RunningTurn() {
  cancel();
  const nb::gil_scoped_release release;
  thread_.join();
}

void RunningTurn::run() {
  std::optional<TurnResult> result;
  std::exception_ptr error;
  try {
    result = engine_->turn(request_);
  } catch (...) {
    error = std::current_exception();
  }
  const std::lock_guard lock(mutex_);
  result_ = std::move(result);
  error_ = error;
  changed_.notify_all();
}

void RunningTurn::check_undone() const {
  if (undone_) throw Error(ErrorCode::kCancelled, "The turn was given up; the agent is as it was before.");
}

void RunningTurn::wait(bool text) {
  // How soon a signal is seen.
  constexpr auto kPatience = std::chrono::milliseconds(50);
  while (true) {
    {
      const nb::gil_scoped_release release;
      std::unique_lock lock(mutex_);
      if (changed_.wait_for(lock, kPatience, [&] { return result_ || error_ || (text && !pieces_.empty()); })) return;
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

std::optional<std::string> RunningTurn::next() {
  wait(true);
  const std::lock_guard lock(mutex_);
  if (!pieces_.empty()) {
    std::string piece = std::move(pieces_.front());
    pieces_.pop_front();
    return piece;
  }
  if (error_) std::rethrow_exception(error_);
  return std::nullopt;
}

void RunningTurn::undo() {
  undone_ = true;
  const nb::gil_scoped_release release;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return result_ || error_; });
}

TurnResult RunningTurn::result() {
  wait(false);
  const std::lock_guard lock(mutex_);
  if (error_) std::rethrow_exception(error_);
  return *result_;
}

void bind_turn(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<TurnResult::Tokens>(module, "TurnTokens", "Tokens of a turn, counted.")
      .def_ro("prompt", &TurnResult::Tokens::prompt, "Before generation, the whole conversation: cached + prefilled.")
      .def_ro("cached", &TurnResult::Tokens::cached, "Of those, reused from the agent or from whoever has begun alike.")
      .def_ro("prefilled", &TurnResult::Tokens::prefilled, "Of those, computed now.")
      .def_ro("generated", &TurnResult::Tokens::generated, "Sampled, one that ends the turn included.")
      .def_ro("context", &TurnResult::Tokens::context, "Held by the agent afterwards.");
  nb::class_<TurnResult::Timing>(module, "TurnTiming", "Times of a turn, in milliseconds.")
      .def_ro("load", &TurnResult::Timing::load, "Loading the model, once per engine.")
      .def_ro("wake", &TurnResult::Timing::wake, "Loading the agent's cache from disk; 0 when it was awake.")
      .def_ro("ttft", &TurnResult::Timing::ttft, "From the turn's start, the agent still asleep, to the first token.")
      .def_ro("decode", &TurnResult::Timing::decode, "From the first token to the last.")
      .def_ro("save", &TurnResult::Timing::save, "Saving; with save=\"behind\" handing over.");
  nb::class_<TurnResult::Bytes>(module, "TurnBytes", "Bytes of a turn.")
      .def_ro("read", &TurnResult::Bytes::read, "By waking.")
      .def_ro("written", &TurnResult::Bytes::written, "By saving; 0 with save=\"behind\".");
  nb::class_<TurnResult>(module, "TurnResult", "What one turn answered, computed and cost.")
      .def_ro("agent", &TurnResult::agent, "The agent's id; empty for a prompt without an agent.")
      .def_ro("model", &TurnResult::model, "As given to the Engine.")
      .def_ro("text", &TurnResult::text, "The answer.")
      .def_prop_ro("finish_reason", [](const TurnResult& r) { return std::string(finish_reason_name(r.finish_reason)); },
                   "\"stop\": the model or a stop string ended it; \"length\": max_tokens or the model's context did; "
                   "\"cancelled\": TextStream.close did.")
      .def_ro("tokens", &TurnResult::tokens, "How many: a TurnTokens.")
      .def_ro("timing_ms", &TurnResult::timing_ms, "How long: a TurnTiming.")
      .def_ro("bytes", &TurnResult::bytes, "From and to the disk: a TurnBytes.")
      .def_ro("damage", &TurnResult::damage,
              "One sentence when the agent was damaged on disk and went on from its longest intact prefix; else None.")
      .def_prop_ro("save_error",
                   [](const TurnResult& r) { return r.save_error ? exception_of(*r.save_error) : nb::none(); },
                   nb::sig("def save_error(self) -> Exception | None"),
                   "A torpor.Error when the answer is complete but could not be saved, or the turn before it (save=\"behind\"); "
                   "nothing is lost while the agent stays awake. Else None.");
  nb::class_<RunningTurn>(module, "RunningTurn")
      .def("next", &RunningTurn::next)
      .def("cancel", &RunningTurn::cancel)
      .def("undo", &RunningTurn::undo)
      .def("result", &RunningTurn::result);
}

}  // namespace torpor::python
