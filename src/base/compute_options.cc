#include "torpor/compute_options.h"

#include <charconv>

#include "base/environment.h"
#include "torpor/error.h"

namespace torpor {
namespace {

[[noreturn]] void refuse(const char* variable, const std::string& wanted, const std::string& value) {
  throw Error(ErrorCode::kInvalidArgument, std::string(variable) + " must be " + wanted + ", not '" + value + "'.")
      .with_field(variable, wanted, value);
}

}  // namespace

const char* backend_name(Backend backend) noexcept { return backend == Backend::kKernels ? "kernels" : "mlx"; }
const char* activations_name(Activations activations) noexcept { return activations == Activations::kF32 ? "f32" : "int16"; }

ComputeOptions with_environment(ComputeOptions options) {
  if (const std::string value = environment("TORPOR_BACKEND"); !options.backend && !value.empty()) {
    for (const Backend backend : {Backend::kKernels, Backend::kMlx}) {
      if (value == backend_name(backend)) options.backend = backend;
    }
    if (!options.backend) refuse("TORPOR_BACKEND", "kernels or mlx", value);
  }
  if (const std::string value = environment("TORPOR_ACTIVATIONS"); !options.activations && !value.empty()) {
    for (const Activations activations : {Activations::kF32, Activations::kInt16}) {
      if (value == activations_name(activations)) options.activations = activations;
    }
    if (!options.activations) refuse("TORPOR_ACTIVATIONS", "f32 or int16", value);
  }
  if (const std::string value = environment("TORPOR_THREADS"); options.threads == 0 && !value.empty()) {
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), options.threads);
    if (error != std::errc() || end != value.data() + value.size() || options.threads < 1 || options.threads > 256) {
      refuse("TORPOR_THREADS", "a number from 1 to 256", value);
    }
  }
  if (const std::string value = environment("TORPOR_PACK_CACHE"); !options.pack_cache && !value.empty()) {
    if (value != "0" && value != "1") refuse("TORPOR_PACK_CACHE", "0 or 1", value);
    options.pack_cache = value == "1";
  }
  if (options.cpu_target.empty()) options.cpu_target = environment("TORPOR_CPU_TARGET");
  return options;
}

}  // namespace torpor
