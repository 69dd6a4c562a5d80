/// Where a model is, and how it is opened.

#include <algorithm>

#include "base/environment.h"
#include "base/foreign_error.h"
#include "base/gguf.h"
#include "kernels/cpu_target.h"
#include "kernels/thread_pool.h"
#include "model/decoder.h"
#include "model/family.h"
#include "model/key_rows.h"
#include "model/known_digests.h"
#include "model/local_models.h"
#include "model/modules.h"
#include "model/pack_file.h"
#include "torpor/error.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;

/// Of errors, what they name.
constexpr const char* kModel = "EngineOptions::model";

Backend backend_of_device() { return mx::default_device() == mx::Device::gpu ? Backend::kMlx : Backend::kKernels; }

/// ORG/NAME, or the NAME of one of the first models, which have no organization.
bool is_repo_id(const std::string& name) {
  const size_t slash = name.find('/');
  const auto part_ok = [](std::string_view part) {
    return !part.empty() && part.front() != '.' &&
           part.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == part.npos;
  };
  return part_ok(std::string_view(name).substr(0, slash)) &&
         (slash == std::string::npos || part_ok(std::string_view(name).substr(slash + 1)));
}

}  // namespace

Backend default_backend() {
  return with_environment({}).backend.value_or(backend_of_device());
}

fs::path resolve_model(const std::string& given) {
  std::error_code ignored;
  const std::string name = expand_home(given);
  if (fs::is_directory(name, ignored)) return name;
  if (is_gguf(name)) return name;
  if (fs::exists(name, ignored)) {
    throw Error(ErrorCode::kInvalidArgument, "'" + name + "' is neither a GGUF file nor a model directory, which has "
                                             "config.json, tokenizer.json and *.safetensors.");
  }
  // ORG/NAME:FILE
  if (const size_t colon = name.find(':'); colon != std::string::npos && is_repo_id(name.substr(0, colon))) {
    const fs::path file = name.substr(colon + 1);
    const bool inside = file.is_relative() && std::ranges::find(file, fs::path("..")) == file.end();
    const fs::path path = resolve_model(name.substr(0, colon)) / file;
    if (inside && is_gguf(path)) return path;
    throw Error(ErrorCode::kNotFound, "There is no GGUF file '" + file.string() + "' of " + name.substr(0, colon) +
                                          " in the Hugging Face cache; fetch it with `hf download " +
                                          name.substr(0, colon) + " " + file.string() + "`.")
        .with_field(kModel);
  }
  if (!is_repo_id(name)) {
    throw Error(ErrorCode::kNotFound, "There is no model directory '" + name +
                                          "'; one of the Hugging Face Hub is named ORG/NAME, once it is fetched with "
                                          "`hf download ORG/NAME`.")
        .with_field(kModel);
  }
  std::string folder = "models--" + name;
  if (const size_t slash = folder.find('/'); slash != std::string::npos) folder.replace(slash, 1, "--");
  if (fs::path snapshot = hub_snapshot(hub_cache() / folder); !snapshot.empty()) return snapshot;
  throw Error(ErrorCode::kNotFound, "The model " + name + " is neither a directory nor in the Hugging Face cache " +
                                        hub_cache().string() + "; fetch it with `hf download " + name + "`.")
      .with_field(kModel);
}

namespace {

/// `use(checkpoint)` of the model's directory, whose weights are mapped; the errors of others made Torpor's.
template <typename Use>
auto with_checkpoint(const std::string& name, const ComputeOptions& given, Use use) {
  const ComputeOptions compute = with_environment(given);
  try {
    const fs::path dir = resolve_model(name);
    model::ModelConfig config = model::read_config(dir);
    model::Weights weights = model::Weights::open(dir);
    weights.find_layers_as(config.weight_prefix + "model.");
    config.quantized |= weights.has_blocks();
    if (!config.tied_head) config.tied_head = weights.find(config.weight_prefix + "lm_head.weight") == nullptr;
    if (config.published_norm_plus != 0 && model::has_published_convolutions(config, weights)) {
      config.norm_plus = config.published_norm_plus;
    }
    model::Checkpoint checkpoint{.config = std::move(config), .weights = std::move(weights), .name = name, .dir = dir,
                                 .backend = compute.backend.value_or(backend_of_device()),
                                 .activations = compute.activations.value_or(Activations::kF32),
                                 .pack_cache = compute.pack_cache.value_or(true)};
    return use(checkpoint);
  } catch (...) {
    throw to_error(std::current_exception(), "Loading the model " + name);
  }
}

}  // namespace

std::unique_ptr<Model> Model::load(const std::string& name, const ComputeOptions& compute) {
  return with_checkpoint(name, compute, [&](model::Checkpoint& checkpoint) {
    const ComputeOptions settled = with_environment(compute);
    kernels::settle_cpu_target(settled.cpu_target);
    if (settled.threads != 0) kernels::ThreadPool::settle_shared(settled.threads);
    if (!settled.activations && checkpoint.backend == Backend::kKernels && checkpoint.config.quantized) {
      checkpoint.activations = kernels::fastest_activations();
    }
    return std::make_unique<model::Decoder>(checkpoint);
  });
}

ModelOutline outline_model(const std::string& name, const ComputeOptions& compute) {
  return with_checkpoint(name, compute, [](const model::Checkpoint& checkpoint) {
    return ModelOutline{model::info_of(checkpoint), model::identity_of(checkpoint),
                        [config = checkpoint.config](const KvFormat& format) {
                          return model::kv_layout_of(config, format);
                        },
                        model::restore_keys_of(checkpoint), model::state_layout_of(checkpoint.config)};
  });
}

void describe_headers(LocalModel& found) {
  try {
    with_checkpoint(found.path.string(), {}, [&](const model::Checkpoint& checkpoint) {
      found.info = model::info_of(checkpoint);
      found.kv_format = model::checkpoint_dtype(model::find_embedding(checkpoint));
      found.kv_layout = [config = checkpoint.config](const KvFormat& format) { return model::kv_layout_of(config, format); };
      found.state_bytes = int64_t(model::state_layout_of(checkpoint.config).bytes());
    });
  } catch (const Error& error) {
    found.problem = error.what();
  }
}

ModelReport verify_model(const std::string& name) {
  return with_checkpoint(name, {}, [](const model::Checkpoint& checkpoint) {
    ModelReport report;
    fs::path note;
    const std::string known = model::known_digest(checkpoint.weights.files(), note);
    report.weights_known = !known.empty();
    if (report.weights_known && known != checkpoint.weights.compute_digest()) {
      report.problems.push_back("The weights in '" + checkpoint.dir.string() +
                                "' are not what they were, though size and times of their files are; remove '" +
                                note.string() + "', or fetch the model again.");
    }
    const auto packed = model::PackFile::check(model::pack_key(model::identity_of(checkpoint)));
    report.packed = packed.has_value();
    if (packed && !packed->empty()) report.problems.push_back(*packed);
    return report;
  });
}

bool mlx_lm_rotates_windows(const std::string& architecture) { return model::rotates_windows_in_mlx_lm(architecture); }

}  // namespace torpor
