#include "cli/model_options.h"

#include <chrono>
#include <cstdint>
#include <map>
#include <vector>

#include <CLI/CLI.hpp>

#include "base/environment.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "torpor/error.h"
#include "torpor/model.h"
#include "torpor/remote.h"

namespace torpor::cli {
namespace {

const std::map<std::string, std::optional<KvDtype>> kKvDtypes{{"auto", std::nullopt},
                                                              {"f32", KvDtype::kF32},
                                                              {"f16", KvDtype::kF16},
                                                              {"bf16", KvDtype::kBF16}};
const std::map<std::string, KvBits> kKvBits{{"8", 8}, {"4", 4}, {"8,4", {8, 4}}, {"4,8", {4, 8}}};
const std::map<std::string, Durability> kDurabilities{
    {"full", Durability::kFull}, {"rename", Durability::kRename}, {"none", Durability::kNone}};

const std::map<std::string, RemoteTail> kRemoteTails{{"turn", RemoteTail::kTurn}, {"sleep", RemoteTail::kSleep}};
const std::map<std::string, RemoteAck> kRemoteAcks{{"commit", RemoteAck::kCommit}, {"local", RemoteAck::kLocal}};
const std::map<std::string, Backend> kBackends{{"kernels", Backend::kKernels}, {"mlx", Backend::kMlx}};
const std::map<std::string, Activations> kActivations{{"f32", Activations::kF32}, {"int16", Activations::kInt16}};

template <typename Map>
std::vector<std::string> keys(const Map& map) {
  std::vector<std::string> names;
  for (const auto& [name, value] : map) names.push_back(name);
  return names;
}

}  // namespace

void add_size_option(CLI::App& app, const std::string& name, uint64_t& bytes, const std::string& help) {
  app.add_option(name, bytes, help + ", as 4GB or 512MiB; 0 = no bound")
      ->transform(CLI::AsSizeValue(true))
      ->check(CLI::Range(uint64_t(0), uint64_t(INT64_MAX)))
      ->type_name("SIZE");
}

std::optional<KvFormat> ModelOptions::kv_format() const {
  const std::optional<KvDtype> dtype = kKvDtypes.at(kv_dtype_name);
  if (kv_bits.empty()) return dtype;
  return KvFormat(dtype.value_or(KvDtype::kF16), kKvBits.at(kv_bits), kv_group);
}
ComputeOptions ModelOptions::compute() const {
  ComputeOptions compute = compute_given;
  if (!backend_name.empty()) compute.backend = kBackends.at(backend_name);
  if (!activations_name.empty()) compute.activations = kActivations.at(activations_name);
  return compute;
}
Durability ModelOptions::durability() const { return kDurabilities.at(durability_name); }

EngineOptions AnswerOptions::engine(const std::filesystem::path& root, std::function<void()> on_remote_end) const {
  EngineOptions engine;
  engine.model = model;
  engine.store = root;
  engine.kv_format = kv_format();
  engine.durability = durability();
  engine.compute = compute();
  engine.memory_budget = memory_budget;
  engine.map_rows = !no_mmap;
  engine.disk = {int64_t(disk_budget), int64_t(min_free)};
  if (!remote.empty()) {
    engine.remote = attach_remote({.url = remote, .store = root, .address = advertise,
                                   .ttl = std::chrono::milliseconds(int64_t(lease * 1000)),
                                   .durability = engine.durability, .disk = engine.disk,
                                   .tail = kRemoteTails.at(remote_tail),
                                   .ack = kRemoteAcks.at(ack), .key_command = key_command,
                                   .on_end = std::move(on_remote_end)});
  }
  return engine;
}

std::string model_of(const Store& store, const std::string& agent) {
  const std::string model = store.agent_info(agent).model;
  try {
    resolve_model(model);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kNotFound) throw;
    throw Error(ErrorCode::kNotFound, "The model '" + model + "' of agent '" + agent + "' is not there any more; say where it is "
                                      "with --model.");
  }
  return model;
}

void settle_model(ModelOptions& options, const std::filesystem::path& root, const std::string& agent) {
  if (!options.model.empty()) return;
  if (!agent.empty()) {
    if (const auto store = open_existing_store(root); store && store->contains(agent)) {
      options.model = model_of(*store, agent);
      return;
    }
  }
  options.model = environment("TORPOR_MODEL");
  if (options.model.empty()) {
    throw UsageError("--model is required" + (agent.empty() ? std::string() : ", for agent '" + agent + "' is new") +
                     "; or set TORPOR_MODEL");
  }
}

void add_key_command_option(CLI::App& app, std::string& command) {
  app.add_option("--key-command", command,
                 "Command of the shell that prints the key of a sealed bucket (default: $TORPOR_KEY_COMMAND)")
      ->type_name("CMD");
}

void add_remote_option(CLI::App& app, AnswerOptions& options) {
  app.add_option("--remote", options.remote,
                 "Agents are in this object store, and the local one is its cache: s3://BUCKET/PREFIX, gs://, az://")
      ->type_name("URL");
  app.add_option("--lease", options.lease,
                 "With --remote: seconds after which others may take over the agents of a silent worker")
      ->capture_default_str()
      ->check(CLI::Range(1.0, 3600.0))
      ->type_name("S");
  app.add_option("--remote-tail", options.remote_tail,
                 "With --remote: an agent's last rows go there with each turn, or when it sleeps: turn or sleep")
      ->capture_default_str()
      ->check(CLI::IsMember(keys(kRemoteTails)))
      ->type_name("WHEN");
  app.add_option("--ack", options.ack,
                 "With --remote: a turn is over when the bucket has it, or when this disk has it: commit or local")
      ->capture_default_str()
      ->check(CLI::IsMember(keys(kRemoteAcks)))
      ->type_name("WHEN");
  add_key_command_option(app, options.key_command);
}

void add_model_options(CLI::App& app, ModelOptions& options) {
  app.add_option("--model", options.model,
                 "Model directory, GGUF file, or ORG/NAME[:FILE] in the local Hugging Face cache (default: an agent's "
                 "own, else $TORPOR_MODEL)")
      ->type_name("M");
  app.add_option("--kv-dtype", options.kv_dtype_name, "What the cache is kept in (quantized: its scales and biases): auto, f32, f16 or bf16")
      ->capture_default_str()
      ->check(CLI::IsMember(keys(kKvDtypes)))
      ->type_name("TYPE");
  CLI::Option* bits = app.add_option("--kv-bits", options.kv_bits,
                                     "Quantize the cache to 8 or 4 bits; 8,4: keys to 8, values to 4")
                          ->check(CLI::IsMember(keys(kKvBits)))
                          ->type_name("N");
  app.add_option("--kv-group", options.kv_group, "Elements that share a scale and a bias: 32, 64 or 128")
      ->capture_default_str()
      ->check(CLI::IsMember({32, 64, 128}))
      ->needs(bits)
      ->type_name("N");
  app.add_option("--durability", options.durability_name,
                 "What a save survives: full (power cut), rename (kill -9), none")
      ->capture_default_str()
      ->check(CLI::IsMember(keys(kDurabilities)))
      ->type_name("LEVEL");
  app.add_option("--threads", options.compute_given.threads, "Threads that compute (default: $TORPOR_THREADS, else one per core that may be used)")
      ->check(CLI::Range(1, 256))
      ->type_name("N");
  app.add_option("--backend", options.backend_name,
                 "Who computes: kernels (Torpor's, on the CPU) or mlx (default: $TORPOR_BACKEND, else mlx on a GPU)")
      ->check(CLI::IsMember(keys(kBackends)))
      ->type_name("NAME");
  app.add_option("--activations", options.activations_name,
                 "What rows are rounded to: f32 or int16 (default: $TORPOR_ACTIVATIONS, else the faster one)")
      ->check(CLI::IsMember(keys(kActivations)))
      ->type_name("TYPE");
  app.add_flag_callback("--no-pack-cache", [&options] { options.compute_given.pack_cache = false; },
                        "Keep no packed weights on disk for the next start (default: $TORPOR_PACK_CACHE, else they are)");
  app.add_option("--cpu-target", options.compute_given.cpu_target,
                 "portable, sse4, avx2, avx512, amx or neon (default: $TORPOR_CPU_TARGET, else the CPU's best)")
      ->check(CLI::IsMember({"portable", "sse4", "avx2", "avx512", "amx", "neon"}))
      ->type_name("NAME");
}

}  // namespace torpor::cli
