#include "turn.h"

#include <chrono>
#include <system_error>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"

namespace nb = nanobind;

namespace torpor::python {

RunningTurn::RunningTurn(std::shared_ptr<Engine> engine, TurnRequest request) : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.engine = std::move(engine);
  state.request = std::move(request);
  state.request.generate.cancel = &state.cancelled;
  state.request.give_up = &state.undone;
  state.request.generate.on_text = [&state](std::string_view text) { state.say(text); };
  try {
    state.thread = std::thread([&state] { state.run(); });
  } catch (const std::system_error&) {
    throw Error(ErrorCode::kResourceExhausted,
                "The system refuses another thread; raise its limit or end some processes.");
  }
}

RunningTurn::~RunningTurn() {
  if (getpid() != state_->process) {
    static_cast<void>(state_.release());  // its thread is in the process that was forked
    return;
  }
  cancel();
  const nb::gil_scoped_release release;
  state_->thread.join();
  state_.reset();  // perhaps the last to hold the engine, which waits for its saves
}

void RunningTurn::State::say(std::string_view text) {
  MutexLock lock(mutex);
  while (!pieces.empty() && has_reader()) changed.wait(lock);
  pieces.emplace_back(text);
  changed.notify_all();
}

void RunningTurn::State::run() {
  std::optional<TurnResult> answer;
  std::exception_ptr failed;
  try {
    answer = engine->turn(request);
  } catch (...) {
    failed = std::current_exception();
  }
  const MutexLock lock(mutex);
  result = std::move(answer);
  error = failed;
  changed.notify_all();
}

void RunningTurn::check_process() const {
  if (getpid() == state_->process) return;
  throw Error(ErrorCode::kInvalidArgument, "The turn is in the process that this one was forked from.");
}

void RunningTurn::set(std::atomic<bool>& flag) {
  const MutexLock lock(state_->mutex);
  flag = true;
  state_->changed.notify_all();
}

void RunningTurn::cancel() {
  check_process();
  set(state_->cancelled);
}

bool RunningTurn::wait(std::optional<std::string>* piece) {
  // How soon a signal is seen.
  constexpr auto kPatience = std::chrono::milliseconds(50);
  check_process();
  State& state = *state_;
  while (true) {
    {
      const nb::gil_scoped_release release;
      MutexLock lock(state.mutex);
      const bool has_text = piece != nullptr && !state.pieces.empty();
      if (!state.over() && !has_text) state.changed.wait_for(lock, kPatience);
      if (piece != nullptr && !state.pieces.empty()) {
        *piece = std::move(state.pieces.front());
        state.pieces.pop_front();
        state.changed.notify_all();
        return true;
      }
      if (state.over()) return false;
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

std::optional<std::string> RunningTurn::next() {
  std::optional<std::string> piece;
  if (wait(&piece)) return piece;
  const MutexLock lock(state_->mutex);
  if (state_->error) std::rethrow_exception(state_->error);
  return std::nullopt;
}

void RunningTurn::undo() {
  check_process();
  set(state_->undone);
  const nb::gil_scoped_release release;
  MutexLock lock(state_->mutex);
  while (!state_->over()) state_->changed.wait(lock);
}

TurnResult RunningTurn::result() {
  check_process();
  const auto await = [this](int by) {
    const MutexLock lock(state_->mutex);
    state_->awaited += by;
    state_->changed.notify_all();
  };
  await(1);
  try {
    wait(nullptr);
  } catch (...) {
    await(-1);
    throw;
  }
  await(-1);
  const MutexLock lock(state_->mutex);
  if (state_->error) std::rethrow_exception(state_->error);
  return *state_->result;
}

// What each field means is said where programs see it: torpor/results.py.
void bind_turn(nb::module_& module) {
  nb::class_<TurnResult::Tokens>(module, "TurnTokens")
      .def_ro("prompt", &TurnResult::Tokens::prompt)
      .def_ro("cached", &TurnResult::Tokens::cached)
      .def_ro("again", &TurnResult::Tokens::again)
      .def_ro("prefilled", &TurnResult::Tokens::prefilled)
      .def_ro("generated", &TurnResult::Tokens::generated)
      .def_ro("proposed", &TurnResult::Tokens::proposed)
      .def_ro("accepted", &TurnResult::Tokens::accepted)
      .def_ro("context", &TurnResult::Tokens::context);
  nb::class_<TurnResult::Timing>(module, "TurnTiming")
      .def_ro("load", &TurnResult::Timing::load)
      .def_ro("wake", &TurnResult::Timing::wake)
      .def_ro("ttft", &TurnResult::Timing::ttft)
      .def_ro("decode", &TurnResult::Timing::decode)
      .def_ro("save", &TurnResult::Timing::save);
  nb::class_<TurnResult::Bytes>(module, "TurnBytes")
      .def_ro("read", &TurnResult::Bytes::read)
      .def_ro("written", &TurnResult::Bytes::written);
  nb::class_<MessageDivergence>(module, "MessageDivergence")
      .def_ro("message", &MessageDivergence::message)
      .def_ro("held", &MessageDivergence::held)
      .def_ro("given", &MessageDivergence::given)
      .def_ro("beginning", &MessageDivergence::beginning);
  nb::class_<TokenLogprob>(module, "TokenLogprob")
      .def_ro("token", &TokenLogprob::token)
      .def_ro("text", &TokenLogprob::text)
      .def_ro("logprob", &TokenLogprob::logprob);
  nb::class_<TokenLogprobs, TokenLogprob>(module, "TokenLogprobs")
      .def_ro("top", &TokenLogprobs::top)
      .def_ro("begin", &TokenLogprobs::begin);
  nb::class_<TurnResult>(module, "TurnResult")
      .def_ro("agent", &TurnResult::agent)
      .def_ro("model", &TurnResult::model)
      .def_ro("text", &TurnResult::text)
      .def_prop_ro("finish_reason",
                   [](const TurnResult& r) { return std::string(finish_reason_name(r.finish_reason)); })
      .def_ro("stop", &TurnResult::stop)
      .def_ro("logprobs", &TurnResult::logprobs)
      .def_ro("divergence", &TurnResult::divergence)
      .def_ro("tokens", &TurnResult::tokens)
      .def_ro("timing_ms", &TurnResult::timing_ms)
      .def_ro("bytes", &TurnResult::bytes)
      .def_ro("notices", &TurnResult::notices)
      .def_ro("damage", &TurnResult::damage)
      .def_prop_ro(
          "save_error", [](const TurnResult& r) { return r.save_error ? exception_of(*r.save_error) : nb::none(); },
          nb::sig("def save_error(self) -> Exception | None"));
  nb::class_<RunningTurn>(module, "RunningTurn")
      .def("next", &RunningTurn::next)
      .def("cancel", &RunningTurn::cancel)
      .def("undo", &RunningTurn::undo)
      .def("result", &RunningTurn::result);
}

}  // namespace torpor::python
