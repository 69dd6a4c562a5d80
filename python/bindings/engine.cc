// torpor.Engine: durable agents over one model.

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "torpor/engine.h"

namespace nb = nanobind;

namespace torpor::python {

void bind_engine(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<TurnResult>(module, "TurnResult", "What one turn answered and computed.")
      .def_ro("text", &TurnResult::text)
      .def_prop_ro("finish_reason", [](const TurnResult& r) { return std::string(finish_reason_name(r.finish_reason)); })
      .def_prop_ro("cached", [](const TurnResult& r) { return r.tokens.cached; }, "Prompt tokens that were not computed.")
      .def_prop_ro("prefilled", [](const TurnResult& r) { return r.tokens.prefilled; }, "Prompt tokens that were.")
      .def_prop_ro("generated", [](const TurnResult& r) { return r.tokens.generated; })
      .def_prop_ro("context", [](const TurnResult& r) { return r.tokens.context; }, "Tokens the agent holds now.")
      .def_prop_ro("ttft_ms", [](const TurnResult& r) { return r.timing_ms.ttft; });
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Engine>(module, "CoreEngine")
      .def("__init__", [](Engine* self, const std::string& model, const std::filesystem::path& store, size_t memory_budget) {
        EngineOptions options;
        options.model = model;
        options.store = store;
        options.memory_budget = memory_budget;
        new (self) Engine(std::move(options));
      }, "model"_a, "store"_a, "memory_budget"_a, Release())
      .def("turn", [](Engine& engine, const std::string& agent, const std::string& prompt, std::optional<std::string> system,
                      bool raw, int max_tokens, float temperature, float top_p, uint64_t seed,
                      std::function<void(std::string)> on_text) {
        TurnRequest request{.agent = agent, .prompt = prompt, .system = std::move(system), .raw = raw};
        request.generate.max_tokens = max_tokens;
        request.generate.sampling = {temperature, top_p, seed};
        if (on_text) request.generate.on_text = [&](std::string_view text) { on_text(std::string(text)); };
        nb::gil_scoped_release release;
        return engine.turn(request);
      }, "agent"_a, "prompt"_a, "system"_a.none(), "raw"_a, "max_tokens"_a, "temperature"_a, "top_p"_a, "seed"_a,
         "on_text"_a.none())
      .def("sleep", &Engine::sleep, "agent"_a, Release())
      .def("fork", &Engine::fork, "src"_a, "dst"_a, "at_token"_a.none(), Release())
      .def("rewind", &Engine::rewind, "agent"_a, "n_tokens"_a, Release())
      .def("pin", &Engine::pin, "agent"_a, "pinned"_a, Release());
}

}  // namespace torpor::python
