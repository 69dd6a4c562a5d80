#include "turn.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"

namespace nb = nanobind;

namespace torpor::python {

RunningTurn::RunningTurn(std::shared_ptr<Engine> engine, TurnRequest request)
    : Running([engine = std::move(engine), request = std::move(request)](Control& control) {
        TurnRequest turn = request;
        turn.generate.cancel = &control.cancelled;
        turn.give_up = &control.undone;
        turn.generate.on_text = [&control](std::string_view text) { control.say(std::string(text)); };
        return engine->turn(turn);
      }) {}

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
      .def_ro("repeated", &TurnResult::repeated)
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
      .def("poll", &RunningTurn::poll)
      .def("fileno", &RunningTurn::fileno)
      .def("cancel", &RunningTurn::cancel)
      .def("give_up", &RunningTurn::give_up)
      .def("undo", &RunningTurn::undo)
      .def("result", &RunningTurn::result);
}

}  // namespace torpor::python
