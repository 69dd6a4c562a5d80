// torpor.Engine: durable agents over one model. What the methods do is said in torpor/engine.py.

#include <chrono>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "shared_engine.h"
#include "turn.h"

#include <mlx/array.h>

namespace nb = nanobind;
namespace mx = mlx::core;

namespace torpor::python {
namespace {

/// A method of Engine's, called without the GIL.
template <class R, class... Args>
auto without_gil(R (Engine::*method)(Args...) const) {
  return [method](const SharedEngine& shared, std::decay_t<Args>... args) {
    const std::shared_ptr<Engine> engine = shared.get();
    const nb::gil_scoped_release release;
    return (engine.get()->*method)(args...);
  };
}
template <class R, class... Args>
auto without_gil(R (Engine::*method)(Args...)) {
  return [method](const SharedEngine& shared, std::decay_t<Args>... args) {
    const std::shared_ptr<Engine> engine = shared.get();
    const nb::gil_scoped_release release;
    return (engine.get()->*method)(args...);
  };
}

std::optional<KvFormat> parse_kv_format(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  if (const auto format = KvFormat::parse(*name)) return format;
  throw Error(ErrorCode::kInvalidArgument,
              "There is no KV format '" + *name + "'; use f32, f16 or bf16, or quantize, as 'q8 group 64 f16'.");
}

std::optional<Backend> parse_backend(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  for (const Backend backend : {Backend::kKernels, Backend::kMlx}) {
    if (*name == backend_name(backend)) return backend;
  }
  throw Error(ErrorCode::kInvalidArgument, "There is no backend '" + *name + "'; use kernels or mlx.");
}

RemoteTail parse_remote_tail(const std::string& name) {
  if (name == "turn") return RemoteTail::kTurn;
  if (name == "sleep") return RemoteTail::kSleep;
  throw Error(ErrorCode::kInvalidArgument, "There is no remote_tail '" + name + "'; use turn or sleep.");
}

RemoteAck parse_remote_ack(const std::string& name) {
  if (name == "commit") return RemoteAck::kCommit;
  if (name == "local") return RemoteAck::kLocal;
  throw Error(ErrorCode::kInvalidArgument, "There is no ack '" + name + "'; use commit or local.");
}

std::optional<Activations> parse_activations(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  for (const Activations activations : {Activations::kF32, Activations::kInt16}) {
    if (*name == activations_name(activations)) return activations;
  }
  throw Error(ErrorCode::kInvalidArgument, "There are no activations '" + *name + "'; use f32 or int16.");
}

SaveMode parse_save_mode(const std::string& name) {
  if (name == "wait") return SaveMode::kWait;
  if (name == "behind") return SaveMode::kBehind;
  if (name == "no") return SaveMode::kNo;
  throw Error(ErrorCode::kInvalidArgument, "There is no way '" + name + "' to save; use wait, behind or no.");
}

OnDivergence parse_on_divergence(const std::string& name) {
  if (name == "rewind") return OnDivergence::kRewind;
  if (name == "branch") return OnDivergence::kBranch;
  throw Error(ErrorCode::kInvalidArgument, "There is no way '" + name + "' to go on where messages differ; use rewind or branch.");
}

/// `messages`: a JSON array instead of the prompt, or empty.
std::unique_ptr<RunningTurn> start(const SharedEngine& shared, const std::string& agent, const std::string& prompt,
                                   const std::string& messages, std::optional<std::string> system, bool raw,
                                   const std::string& on_divergence, const std::string& tools, const std::string& template_args,
                                   bool special, const std::string& save, int max_tokens, float temperature, float top_p,
                                   uint64_t seed, int top_k, float min_p, float repetition_penalty, int penalty_context,
                                   float presence_penalty, float frequency_penalty,
                                   std::vector<std::pair<int32_t, float>> logit_bias, std::optional<int> logprobs,
                                   std::vector<std::string> stop, bool speculate, const std::string& key) {
  TurnRequest request{.agent = agent, .id = key, .prompt = prompt, .system = std::move(system), .raw = raw,
                      .on_divergence = parse_on_divergence(on_divergence), .tools = tools, .template_arguments = template_args,
                      .special = special, .save = parse_save_mode(save)};
  if (!messages.empty()) request.messages = messages_from_json(messages);
  request.generate.max_tokens = max_tokens;
  request.generate.sampling = {.temperature = temperature, .top_p = top_p, .seed = seed, .top_k = top_k, .min_p = min_p,
                               .repetition_penalty = repetition_penalty, .penalty_context = penalty_context,
                               .presence_penalty = presence_penalty, .frequency_penalty = frequency_penalty,
                               .logit_bias = std::move(logit_bias)};
  request.generate.logprobs = logprobs;
  request.generate.stop = std::move(stop);
  request.generate.speculate = speculate;
  return std::make_unique<RunningTurn>(shared.get(), std::move(request));
}

std::vector<int32_t> prompt_tokens(const SharedEngine& shared, const std::string& prompt, const std::string& messages,
                                   std::optional<std::string> system, bool raw, const std::string& tools,
                                   const std::string& template_args, bool special) {
  TurnRequest request{.prompt = prompt, .system = std::move(system), .raw = raw, .tools = tools,
                      .template_arguments = template_args, .special = special};
  if (!messages.empty()) request.messages = messages_from_json(messages);
  const std::shared_ptr<Engine> engine = shared.get();
  const nb::gil_scoped_release release;
  return engine->prompt_tokens(request);
}

void fork(const SharedEngine& shared, const std::string& src, const std::string& dst, std::optional<int64_t> at_token,
          const std::string& save) {
  const SaveMode mode = parse_save_mode(save);
  without_gil(&Engine::fork)(shared, src, dst, at_token, mode);
}

void rewind(const SharedEngine& shared, const std::string& agent, int64_t n_tokens, const std::string& save) {
  const SaveMode mode = parse_save_mode(save);
  without_gil(&Engine::rewind)(shared, agent, n_tokens, mode);
}

void pin(const SharedEngine& shared, const std::string& agent, bool pinned, const std::string& save) {
  const SaveMode mode = parse_save_mode(save);
  without_gil(&Engine::pin)(shared, agent, pinned, mode);
}

/// One JSON object each.
std::vector<std::string> messages(const SharedEngine& shared, const std::string& agent) {
  const std::shared_ptr<Engine> engine = shared.get();
  const nb::gil_scoped_release release;
  std::vector<std::string> messages;
  for (const Message& message : engine->messages(agent)) messages.push_back(message_to_json(message));
  return messages;
}

mx::array next_logits(const SharedEngine& shared, const std::string& agent) {
  const std::shared_ptr<Engine> engine = shared.get();
  const nb::gil_scoped_release release;
  const std::vector<float> logits = engine->next_logits(agent);
  return mx::array(logits.data(), mx::Shape{int(logits.size())}, mx::float32);
}

}  // namespace

void bind_engine(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<AgentMemory>(module, "AgentMemory")
      .def_ro("agent", &AgentMemory::agent)
      .def_ro("tokens", &AgentMemory::tokens)
      .def_ro("bytes", &AgentMemory::bytes)
      .def_ro("shared_bytes", &AgentMemory::shared_bytes)
      .def_ro("pinned", &AgentMemory::pinned)
      .def_ro("unsaved", &AgentMemory::unsaved);
  nb::class_<MemoryUsage>(module, "MemoryUsage")
      .def_ro("model_bytes", &MemoryUsage::model_bytes)
      .def_ro("agents", &MemoryUsage::agents)
      .def_ro("kv_bytes", &MemoryUsage::kv_bytes)
      .def_ro("mapped_bytes", &MemoryUsage::mapped_bytes)
      .def_ro("queued_bytes", &MemoryUsage::queued_bytes)
      .def_ro("budget", &MemoryUsage::budget);
  nb::class_<EngineWork>(module, "EngineWork")
      .def_ro("passes", &EngineWork::passes)
      .def_ro("turns", &EngineWork::turns)
      .def_ro("most_turns", &EngineWork::most_turns)
      .def_ro("prompt_tokens", &EngineWork::prompt_tokens)
      .def_ro("answer_tokens", &EngineWork::answer_tokens)
      .def_ro("accepted_tokens", &EngineWork::accepted_tokens)
      .def_ro("rejected_tokens", &EngineWork::rejected_tokens)
      .def_ro("put_aside", &EngineWork::put_aside);
  const EngineOptions defaults{.store = {}};
  nb::class_<EngineSettings>(module, "EngineOptions")
      .def("__init__",
           [](EngineSettings* self, const std::string& model, const std::filesystem::path& store,
              const std::optional<std::string>& kv_format, const std::string& durability, size_t memory_budget,
              int64_t disk_budget, int64_t min_free, size_t write_queue, size_t text_queue, int max_stall, bool map_rows,
              const std::optional<std::string>& backend, const std::optional<std::string>& activations, int threads,
              const std::string& cpu_target, const std::optional<std::string>& remote, double lease,
              const std::string& remote_tail, const std::string& ack, const std::string& advertise,
              const std::string& key_command) {
             const Durability durable = parse_durability(durability);
             const RemoteTail tail = parse_remote_tail(remote_tail);
             const RemoteAck told = parse_remote_ack(ack);
             new (self) EngineSettings{
                 .engine = {.model = model, .store = store, .kv_format = parse_kv_format(kv_format),
                            .durability = durable, .memory_budget = memory_budget, .disk = {disk_budget, min_free},
                            .compute = {.backend = parse_backend(backend),
                                        .activations = parse_activations(activations), .threads = threads,
                                        .cpu_target = cpu_target},
                            .write_queue_bytes = write_queue, .text_queue_bytes = text_queue,
                            .max_stall_ms = max_stall, .map_rows = map_rows},
                 .remote = {}};
             if (!remote) return;
             self->remote = RemoteOptions{.url = *remote, .store = store, .address = advertise,
                                          .ttl = std::chrono::milliseconds(int64_t(lease * 1000)),
                                          .durability = durable, .disk = {disk_budget, min_free}, .tail = tail,
                                          .ack = told, .key_command = key_command, .on_end = {}};
           },
           "model"_a, "store"_a, "kv_format"_a = nb::none(), "durability"_a = "full", "memory_budget"_a = 0,
           "disk_budget"_a = 0, "min_free"_a = 0, "write_queue"_a = defaults.write_queue_bytes,
           "text_queue"_a = defaults.text_queue_bytes, "max_stall"_a = defaults.max_stall_ms, "map_rows"_a = true,
           "backend"_a = nb::none(), "activations"_a = nb::none(), "threads"_a = 0, "cpu_target"_a = "",
           "remote"_a = nb::none(), "lease"_a = 10.0, "remote_tail"_a = "turn", "ack"_a = "commit",
           "advertise"_a = "", "key_command"_a = "",
           // As it is, but for the type of a path, which nanobind leaves open.
           nb::sig("def __init__(self, model: str, store: str | os.PathLike[str], kv_format: str | None = ..., "
                   "durability: str = ..., memory_budget: int = ..., disk_budget: int = ..., min_free: int = ..., "
                   "write_queue: int = ..., text_queue: int = ..., max_stall: int = ..., map_rows: bool = ..., "
                   "backend: str | None = ..., activations: str | None = ..., threads: int = ..., "
                   "cpu_target: str = ..., remote: str | None = ..., lease: float = ..., remote_tail: str = ..., "
                   "ack: str = ..., advertise: str = ..., key_command: str = ...) -> None"));
  nb::class_<SharedEngine>(module, "CoreEngine")
      .def("__init__",
           [](SharedEngine* self, const EngineSettings& options) {
             const nb::gil_scoped_release release;
             new (self) SharedEngine(options.attached());
           },
           "options"_a)
      .def("close", &SharedEngine::close)
      .def("start", &start, "agent"_a, "prompt"_a, "messages"_a, "system"_a.none(), "raw"_a, "on_divergence"_a,
           "tools"_a, "template_args"_a, "special"_a, "save"_a, "max_tokens"_a, "temperature"_a, "top_p"_a, "seed"_a,
           "top_k"_a, "min_p"_a, "repetition_penalty"_a, "penalty_context"_a, "presence_penalty"_a, "frequency_penalty"_a,
           "logit_bias"_a, "logprobs"_a.none(), "stop"_a, "speculate"_a, "key"_a)
      .def("prompt_tokens", &prompt_tokens, "prompt"_a, "messages"_a, "system"_a.none(), "raw"_a, "tools"_a, "template_args"_a,
           "special"_a)
      .def("prefetch", without_gil(&Engine::prefetch), "agent"_a)
      .def("save", without_gil(&Engine::save), "agent"_a)
      .def("save_all", [](const SharedEngine& shared) {
        const std::shared_ptr<Engine> engine = shared.get();
        const nb::gil_scoped_release release;
        engine->save_all();
      })
      .def("sleep", without_gil(&Engine::sleep), "agent"_a)
      .def("fork", &fork, "src"_a, "dst"_a, "at_token"_a.none(), "save"_a)
      .def("rewind", &rewind, "agent"_a, "n_tokens"_a, "save"_a)
      .def("pin", &pin, "agent"_a, "pinned"_a, "save"_a)
      .def("rename", without_gil(&Engine::rename), "agent"_a, "new_id"_a)
      .def("remove", without_gil(&Engine::remove), "agent"_a)
      .def("tokens", without_gil(&Engine::tokens), "agent"_a)
      .def("messages", &messages, "agent"_a)
      .def("next_logits", &next_logits, "agent"_a)
      .def("work", [](const SharedEngine& shared) {
        const std::shared_ptr<Engine> engine = shared.get();
        const nb::gil_scoped_release release;
        return engine->work();
      })
      .def("memory_usage", [](const SharedEngine& shared) {
        const std::shared_ptr<Engine> engine = shared.get();
        const nb::gil_scoped_release release;
        return engine->memory_usage();
      })
      .def("agents", [](const SharedEngine& shared) {
        const std::shared_ptr<Engine> engine = shared.get();
        std::vector<AgentStatus> agents;
        {
          const nb::gil_scoped_release release;
          agents = engine->agents();
        }
        nb::list out;
        for (const AgentStatus& agent : agents) {
          out.append(nb::make_tuple(agent.agent, agent.model, agent.tokens, agent.awake, agent.pinned, agent.unsaved,
                                    agent.memory_bytes, agent.disk_bytes, agent.in_turn));
        }
        return out;
      }, nb::sig("def agents(self) -> list[tuple[str, str, int, bool, bool, bool, int, int, bool]]"));
  module.def("check_agent_id", &check_agent_id, "agent"_a);
}

}  // namespace torpor::python
