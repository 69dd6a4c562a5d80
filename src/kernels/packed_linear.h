#pragma once
/// Weights repacked once at load into the order the kernels read. Immutable after packing; shared freely.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/gguf.h"
#include "kernels/weight_memory.h"
#include "torpor/compute_options.h"

namespace torpor::kernels {

/// One projection as it stands in a checkpoint: `[N, K]` row-major, or MLX affine: `w = scale * q + bias` per group
/// along K, a row's q a stream of `bits` each, low bits first, in u32 words `[N, K * bits / 32]`, scales and biases
/// `[N, K / group]`. Or floats of fewer bits: `w = scale * code`, codes E2M1 of 4 bits (mxfp4, nvfp4) or E4M3 of 8
/// (mxfp8), scales of a byte each, E8M0 (mxfp4, mxfp8) or E4M3 (nvfp4), and no biases. Or rows of GGUF's blocks
/// (gguf_blocks.h), which have all of that in themselves.
struct WeightSource {
  enum class Type { kF32, kF16, kBF16, kAffine, kMxfp4, kMxfp8, kNvfp4 };
  Type type = Type::kF32;
  int n = 0, k = 0;
  const void* weight = nullptr;
  int bits = 0, group = 0;         ///< kAffine: 2, 3, 4, 5, 6 or 8; 16, 32, 64 or 128. kMxfp4: 4; 32. kMxfp8: 8; 32. kNvfp4: 4; 16
  Type scale_type = Type::kF16;    ///< kAffine: kF32, kF16 or kBF16, of both scales and biases
  const void* scales = nullptr;
  const void* biases = nullptr;
  const void* bias = nullptr;                            ///< optional additive bias [N], of `bias_type`
  Type bias_type = Type::kF32;
  std::optional<GgmlType> blocks;  ///< a quantized type: in place of `type`, and of bits, group and scales
  /// Not 0: rows, and `bias`, are of so many heads, and come as neighbours rotate, 2i and 2i + 1. They are packed as i
  /// and i + half a head rotate.
  int neighbour_heads = 0;
};

class PackedLinear {
 public:
  /// Several projections of one input, stacked along N in the given order (q, k, v). Packs in parallel; the sources may be freed
  /// afterwards. `activations` is what their inputs' rows are rounded to. Where `memory` has them filled nothing is packed.
  static std::shared_ptr<const PackedLinear> pack(const std::vector<WeightSource>& sources,
                                                  Activations activations = Activations::kF32,
                                                  WeightMemory& memory = WeightMemory::plain());
  /// gate and up, interleaved so that `gated_linear` finds both rows of an output together; n() is that of one.
  static std::shared_ptr<const PackedLinear> pack_gated(const WeightSource& gate, const WeightSource& up,
                                                        Activations activations = Activations::kF32,
                                                        WeightMemory& memory = WeightMemory::plain());
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
