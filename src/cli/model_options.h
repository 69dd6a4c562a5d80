#pragma once
/// The options of every command that loads a model.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "torpor/compute_options.h"
#include "torpor/engine.h"
#include "torpor/kv_snapshot.h"
#include "torpor/store.h"

namespace CLI {
class App;
}

namespace torpor::cli {

/// An option of bytes.
void add_size_option(CLI::App& app, const std::string& name, uint64_t& bytes, const std::string& help);

struct ModelOptions {
  std::string model;
  std::string kv_dtype_name = "auto", durability_name = "full";
  std::string kv_bits;  ///< empty, "8", or of keys and values apart "8,4"
  int kv_group = 64;
  std::string backend_name, activations_name;
  ComputeOptions compute_given;  ///< threads, cpu_target and pack_cache

  /// nullopt: not said, so an agent's own, else the model's. With --kv-bits but no dtype, scales and biases are f16.
  std::optional<KvFormat> kv_format() const;
  Durability durability() const;
  ComputeOptions compute() const;
};

/// Of commands that answer with an Engine.
struct AnswerOptions : ModelOptions {
  bool no_mmap = false;
  uint64_t memory_budget = 0, disk_budget = 0, min_free = 0;  // bytes
  std::string remote;     ///< URL; empty: agents are in the store alone
  std::string key_command;  ///< RemoteOptions::key_command
  std::string advertise;  ///< RemoteOptions::address
  double lease = 10;      ///< RemoteOptions::ttl, in seconds
  std::string remote_tail = "turn";  ///< RemoteOptions::tail
  std::string ack = "commit";  ///< RemoteOptions::ack

  /// `on_remote_end`: RemoteOptions::on_end.
  EngineOptions engine(const std::filesystem::path& root, std::function<void()> on_remote_end = nullptr) const;
};

/// Where --model is left out: the model of `agent`, if `root` has one of that name, else $TORPOR_MODEL. UsageError where there is
/// neither. kNotFound when the agent's model is no longer where it was.
void settle_model(ModelOptions& options, const std::filesystem::path& root, const std::string& agent);
/// The model that an agent was last saved with, checked to be there. kNotFound.
std::string model_of(const Store& store, const std::string& agent);

/// Adds --key-command.
void add_key_command_option(CLI::App& app, std::string& command);
/// Adds --remote, and the options that it has.
void add_remote_option(CLI::App& app, AnswerOptions& options);
/// Adds --model, the options of the KV format, --durability, and those of ComputeOptions to a command.
void add_model_options(CLI::App& app, ModelOptions& options);

}  // namespace torpor::cli
