#pragma once
/// Weights repacked once at load into the order the kernels read. Immutable after packing; shared freely.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "torpor/compute_options.h"

namespace torpor::kernels {

/// One projection as it stands in a checkpoint: `[N, K]` row-major, or MLX affine: `w = scale * q + bias` per group
/// along K, `bits`-wide q packed little-endian into u32 words `[N, K * bits / 32]`, scales and biases `[N, K / group]`.
struct WeightSource {
  enum class Type { kF32, kF16, kBF16, kAffine };
  Type type = Type::kF32;
  int n = 0, k = 0;
  const void* weight = nullptr;
  int bits = 0, group = 0;                               ///< kAffine: 4 or 8; 32, 64 or 128
  Type scale_type = Type::kF16;                          ///< kF32, kF16 or kBF16, of both scales and biases
  const void* scales = nullptr;
  const void* biases = nullptr;
  const void* bias = nullptr;                            ///< optional additive bias [N], of `bias_type`
  Type bias_type = Type::kF32;
};

class PackedLinear {
 public:
  /// Several projections of one input, stacked along N in the given order (q, k, v). Packs in parallel; the sources may be freed
  /// afterwards. `activations` is what their inputs' rows are rounded to.
  static std::shared_ptr<const PackedLinear> pack(const std::vector<WeightSource>& sources,
                                                  Activations activations = Activations::kF32);
  /// gate and up, interleaved so that `gated_linear` finds both rows of an output together; n() is that of one.
  static std::shared_ptr<const PackedLinear> pack_gated(const WeightSource& gate, const WeightSource& up,
                                                        Activations activations = Activations::kF32);
  ~PackedLinear();

  int n() const noexcept;
  int k() const noexcept;
  size_t nbytes() const noexcept;
  /// Row `row` as K floats: the embedding lookup of a tied head.
  void dequantize_row(int row, float* out) const;

  struct Impl;
  const Impl& impl() const noexcept { return *impl_; }

 private:
  explicit PackedLinear(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor::kernels
