#pragma once
/// The options of every command that loads a model.

#include <optional>
#include <string>

#include "torpor/kv_snapshot.h"
#include "torpor/store.h"

namespace CLI {
class App;
}

namespace torpor::cli {

struct ModelOptions {
  std::string model;
  std::string kv_dtype_name = "auto", durability_name = "full";

  /// nullopt: the model's own.
  std::optional<KvFormat> kv_format() const;
  Durability durability() const;
};

/// Adds --model, --kv-dtype and --durability to a command.
void add_model_options(CLI::App& app, ModelOptions& options);

}  // namespace torpor::cli
