#pragma once
/// How a model computes. Environment variables are the defaults of what is not set here.

#include <optional>
#include <string>

namespace torpor {

/// Who computes: Torpor's CPU kernels, or MLX's own operations (Metal, CUDA; on a CPU for comparison).
enum class Backend { kKernels, kMlx };
/// "kernels", "mlx".
const char* backend_name(Backend backend) noexcept;

/// What rows are rounded to before the CPU kernels multiply them with quantized weights: nothing, or 16-bit integers with a
/// scale per group of the weights (a relative error of about 2^-16 per value; faster where the CPU multiplies integers well). A
/// cache made with one continues bit-exactly only with the same.
enum class Activations { kF32, kInt16 };
/// "f32", "int16".
const char* activations_name(Activations activations) noexcept;

/// Two models in one process may differ in backend and activations. Threads and CPU target are the process's: the first model
/// settles them, and another value later is kInvalidArgument.
struct ComputeOptions {
  std::optional<Backend> backend;          ///< nullopt: TORPOR_BACKEND, else kMlx where MLX's default device is a GPU, else kKernels
  std::optional<Activations> activations;  ///< nullopt: TORPOR_ACTIVATIONS ("f32", "int16"), else kInt16 for quantized
                                           ///< weights on a CPU with AVX-512 VNNI, else kF32; of kKernels alone
  int threads = 0;                         ///< of the kernels, 1 to 256; 0: TORPOR_THREADS, else one per core that may be used
  /// Instruction set of the kernels: portable, sse4, avx2, avx512, amx or neon. Empty: TORPOR_CPU_TARGET, else the CPU's best.
  std::string cpu_target;
  /// Whether packed weights are kept on disk for the next start, below TORPOR_CACHE, else the system's directory for
  /// caches. nullopt: TORPOR_PACK_CACHE ("0", "1"), else they are; of kKernels alone.
  std::optional<bool> pack_cache;
};

/// `options` with what is not set taken from the environment, where that says it. kInvalidArgument for a variable that can't be
/// understood.
ComputeOptions with_environment(ComputeOptions options);

}  // namespace torpor
