#pragma once
/// The kernels as MLX primitives. On inputs that are evaluated they compute at once, on the calling thread; on others they are
/// nodes of the lazy graph, evaluated on the CPU stream. Arrays are f32, row-major; shapes as in compute.h. Engine thread only,
/// like all of MLX.

#include <memory>
#include <vector>

#include <mlx/array.h>

#include "kernels/compute.h"
#include "kernels/heads_linear.h"
#include "kernels/moe.h"
#include "kernels/recurrent.h"

namespace torpor::kernels {

namespace mx = mlx::core;

mx::array linear(const mx::array& x, std::shared_ptr<const PackedLinear> w);                           // [M, N]
mx::array linear_add(const mx::array& x, std::shared_ptr<const PackedLinear> w, const mx::array& residual);  // [M, N]
mx::array gated_linear(const mx::array& x, std::shared_ptr<const PackedLinear> w, Activation activation);  // [M, N]
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);                            // [M, K]
mx::array embedding(const mx::array& tokens, std::shared_ptr<const PackedLinear> w);                   // [M] i32 -> [M, K]

/// [M, H K] -> [M, H N]
mx::array heads_linear(const mx::array& x, std::shared_ptr<const HeadWeights> heads);

/// `logits` [M, E] are the router's. [M, N]
mx::array moe(const mx::array& x, const mx::array& logits, std::shared_ptr<const Moe> w);

/// `given` [M, given()]. The sequences' states must outlive evaluation. [M, output()]
mx::array recurrent(const mx::array& given, std::shared_ptr<const Recurrent> w,
                    std::vector<RecurrentSequence> sequences);
mx::array gate(const mx::array& x, const mx::array& gates);                                            // [M, K]

/// One agent's part of a batch; `runs` are buffers of the layout's size for kSegmentTokens tokens, kept alive by the node.
/// One that a window has left behind may be empty, or end before this layer.
struct SequenceRuns {
  int row = 0, n = 0, position = 0;
  std::vector<KvBuffer> runs;
  size_t key_offset = 0, value_offset = 0;  ///< of this layer, in each run
  size_t key_scale_offset = 0, key_bias_offset = 0, value_scale_offset = 0, value_bias_offset = 0;  ///< if quantized
};

/// Writes the new rows into the runs in place when evaluated; a later node that reads them must depend on the result.
/// `spec`'s norm and sink pointers must outlive evaluation. A `qkv` that nobody else holds is worked in, others in a copy.
mx::array attention(mx::array qkv, std::shared_ptr<const AttentionSpec> spec,
                    std::vector<SequenceRuns> sequences);  // [M, H_q D]

}  // namespace torpor::kernels
