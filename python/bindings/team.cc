// torpor.Team: agents that work together. What the functions do is said in torpor/team.py.

#include "team.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "shared_engine.h"

namespace nb = nanobind;

namespace torpor::python {
namespace {

using Members = std::vector<std::pair<std::string, std::string>>;

StepKind kind_of(const std::string& name) {
  for (const StepKind kind :
       {StepKind::kTurn, StepKind::kAsk, StepKind::kRound, StepKind::kHandOff, StepKind::kConclude}) {
    if (name == step_kind_name(kind)) return kind;
  }
  throw Error(ErrorCode::kInvalidArgument,
              "There is no step '" + name + "'; use turn, ask, round, handoff or conclude.");
}

void make(const SharedEngine& shared, const std::string& id, const Members& members, const std::string& coordinator,
          const std::string& system, const std::string& tools) {
  const std::shared_ptr<Engine> engine = shared.get();
  const nb::gil_scoped_release release;
  TeamSpec spec{.id = id, .coordinator = coordinator, .system = system, .tools = tools, .model = engine->model().name};
  for (const auto& [name, role] : members) spec.members.push_back({name, role});
  Teams(engine->store()).make(spec, *team_engine(*engine));
}

/// Members with their roles, the coordinator, the speaker.
std::tuple<Members, std::string, std::string> find(const SharedEngine& shared, const std::string& id) {
  const std::shared_ptr<Engine> engine = shared.get();
  const nb::gil_scoped_release release;
  const Team team = Teams(engine->store()).find(id);
  Members members;
  for (const TeamMember& member : team.spec.members) members.emplace_back(member.name, member.role);
  return {std::move(members), team.spec.coordinator, team.speaker};
}

std::vector<std::string> list(const SharedEngine& shared) {
  const std::shared_ptr<Engine> engine = shared.get();
  const nb::gil_scoped_release release;
  return Teams(engine->store()).list();
}

void remove(const SharedEngine& shared, const std::string& id) {
  const std::shared_ptr<Engine> engine = shared.get();
  const nb::gil_scoped_release release;
  Teams(engine->store()).remove(id, *team_engine(*engine));
}

std::unique_ptr<RunningStep> start(const SharedEngine& shared, const std::string& id, const std::string& kind,
                                   const std::string& message, std::vector<std::string> to, const std::string& from,
                                   bool summary, const std::string& key, int max_tokens, float temperature, float top_p,
                                   uint64_t seed, int top_k, float min_p, std::vector<std::string> stop) {
  StepRequest request{.key = key};
  request.words = {.kind = kind_of(kind), .message = message, .to = std::move(to), .from = from, .summary = summary};
  request.generate.max_tokens = max_tokens;
  request.generate.sampling = {
      .temperature = temperature, .top_p = top_p, .seed = seed, .top_k = top_k, .min_p = min_p};
  request.generate.stop = std::move(stop);
  return std::make_unique<RunningStep>(shared.get(), id, std::move(request));
}

}  // namespace

RunningStep::RunningStep(std::shared_ptr<Engine> engine, std::string team, StepRequest request)
    : Running([engine = std::move(engine), team = std::move(team), request = std::move(request)](Control& control) {
        StepRequest step = request;
        step.give_up = &control.undone;
        step.on_text = [&control](const std::string& member, std::string_view text) {
          control.say({member, std::string(text)});
        };
        const std::unique_ptr<TeamEngine> turns = team_engine(*engine);
        return Teams(engine->store()).begin(team, std::move(step), *turns).run();
      }) {}

RunningStep::~RunningStep() { give_up(); }

void bind_team(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<TeamAnswer>(module, "TeamAnswer")
      .def_ro("member", &TeamAnswer::member)
      .def_ro("agent", &TeamAnswer::agent)
      .def_ro("text", &TeamAnswer::text)
      .def_ro("kept", &TeamAnswer::kept)
      .def_ro("turn", &TeamAnswer::turn)
      .def_prop_ro(
          "error", [](const TeamAnswer& answer) { return answer.error ? exception_of(*answer.error) : nb::none(); },
          nb::sig("def error(self) -> Exception | None"));
  nb::class_<StepResult>(module, "StepResult")
      .def_prop_ro("kind", [](const StepResult& result) { return std::string(step_kind_name(result.kind)); })
      .def_ro("answers", &StepResult::answers)
      .def_ro("complete", &StepResult::complete)
      .def_ro("speaker", &StepResult::speaker);
  nb::class_<RunningStep>(module, "RunningStep")
      .def("next", &RunningStep::next)
      .def("undo", &RunningStep::undo)
      .def("result", &RunningStep::result);
  module.def("make_team", &make, "engine"_a, "team"_a, "members"_a, "coordinator"_a, "system"_a, "tools"_a);
  module.def("find_team", &find, "engine"_a, "team"_a);
  module.def("list_teams", &list, "engine"_a);
  module.def("remove_team", &remove, "engine"_a, "team"_a);
  module.def("start_step", &start, "engine"_a, "team"_a, "kind"_a, "message"_a, "to"_a, "from_"_a, "summary"_a, "key"_a,
             "max_tokens"_a, "temperature"_a, "top_p"_a, "seed"_a, "top_k"_a, "min_p"_a, "stop"_a);
}

}  // namespace torpor::python
