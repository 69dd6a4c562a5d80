#pragma once
/// A checkpoint's projections as MLX's operations take them.

#include <cstring>
#include <optional>
#include <vector>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "model/block_arrays.h"
#include "model/ops.h"

namespace torpor::model::on_mlx {

/// A copy of the tensor's bytes.
inline mx::array to_array(const TensorView& tensor) {
  const mx::Dtype dtype = tensor.dtype == "U32"    ? mx::uint32
                          : tensor.dtype == "U8"   ? mx::uint8
                          : tensor.dtype == "F16"  ? mx::float16
                          : tensor.dtype == "BF16" ? mx::bfloat16
                                                   : mx::float32;
  mx::array copy(mx::allocator::malloc(tensor.nbytes), mx::Shape(tensor.shape.begin(), tensor.shape.end()), dtype);
  std::memcpy(copy.data<uint8_t>(), tensor.data, tensor.nbytes);
  return copy;
}

/// A projection, or several of one shape, stacked.
struct Linear final : Ops::Packed {
  Linear(const Projection& p, mx::Dtype dtype) : Linear(p, p.blocks ? block_arrays(p) : arrays(p), dtype) {}
  Linear(const Projection& p, BlockArrays arrays, mx::Dtype dtype)
      : dtype(dtype), weight(std::move(arrays.weight)), quantization(arrays.quantization), scales(std::move(arrays.scales)),
        biases(std::move(arrays.biases)) {
    if (p.bias) bias = to_array(*p.bias);
    const auto settle = [&](mx::array& a, bool floats) {
      if (p.neighbour_heads != 0) {
        const std::vector<int32_t> rows = rows_of_halves(p.n, p.neighbour_heads);
        a = mx::take(a, mx::array(rows.data(), {p.n}, mx::int32), 0);
      }
      if (floats) a = mx::astype(a, dtype);
      mx::eval({a});
    };
    settle(weight, !quantization);
    if (scales) settle(*scales, biases.has_value());
    if (biases) settle(*biases, true);
    if (bias) settle(*bias, true);
  }
  static BlockArrays arrays(const Projection& p) {
    const auto load = [](const std::optional<TensorView>& tensor) {
      return tensor ? std::optional(to_array(*tensor)) : std::nullopt;
    };
    return {.weight = to_array(p.weight), .quantization = p.quantization, .scales = load(p.scales),
            .biases = load(p.biases)};
  }

  mx::array apply(const mx::array& x) const {
    const mx::array y =
        quantization ? mx::quantized_matmul(x, weight, *scales, biases, /*transpose=*/true, quantization->group,
                                            quantization->bits, mode_name(quantization->mode))
                     : mx::matmul(x, mx::transpose(weight));
    return bias ? mx::add(y, *bias) : y;
  }
  mx::array rows(const mx::array& indices) const {
    const auto take = [&](const mx::array& a) { return mx::take(a, indices, 0); };
    if (!quantization) return take(weight);
    const std::optional<mx::array> of_rows = biases ? std::optional(take(*biases)) : std::nullopt;
    return mx::dequantize(take(weight), take(*scales), of_rows, quantization->group, quantization->bits,
                          mode_name(quantization->mode), std::nullopt, dtype);
  }

  /// Of several of one shape, stacked: each row of x [M, chosen, 1, K] by the expert of `indices` [M, chosen].
  mx::array apply(const mx::array& x, const mx::array& indices) const {
    const mx::array y =
        quantization ? mx::gather_qmm(x, weight, *scales, biases, std::nullopt, indices, /*transpose=*/true,
                                      quantization->group, quantization->bits, mode_name(quantization->mode))
                     : mx::gather_mm(x, mx::swapaxes(weight, -1, -2), std::nullopt, indices);
    return bias ? mx::add(y, mx::expand_dims(mx::take(*bias, indices, 0), -2)) : y;
  }
  /// Of several of one shape, stacked: each head of x [1, H, n, K] by its own.
  mx::array apply_each(const mx::array& x) const {
    return quantization ? mx::quantized_matmul(x, weight, *scales, biases, /*transpose=*/true, quantization->group,
                                               quantization->bits, mode_name(quantization->mode))
                        : mx::matmul(x, mx::swapaxes(weight, -1, -2));
  }
  static Linear stacked(const std::vector<Projection>& parts, mx::Dtype dtype) {
    std::vector<mx::array> weights, scales, biases, additive;
    Linear all(parts.front(), dtype);
    for (const Projection& part : parts) {
      Linear one(part, dtype);
      weights.push_back(one.weight);
      if (one.scales) scales.push_back(*one.scales);
      if (one.biases) biases.push_back(*one.biases);
      if (one.bias) additive.push_back(*one.bias);
    }
    const auto stack = [](const std::vector<mx::array>& arrays) {
      mx::array stack = mx::stack(arrays);
      mx::eval({stack});
      return stack;
    };
    all.weight = stack(weights);
    if (!scales.empty()) all.scales = stack(scales);
    if (!biases.empty()) all.biases = stack(biases);
    if (!additive.empty()) all.bias = stack(additive);
    return all;
  }

  mx::Dtype dtype;
  mx::array weight;
  std::optional<Quantization> quantization;
  std::optional<mx::array> scales, biases, bias;
};

inline mx::array silu(const mx::array& x) { return mx::multiply(x, mx::sigmoid(x)); }

/// ops_mlx_experts.cc; as Ops has them.
Ops::Weight pack_experts(const Experts& spec, const ExpertProjections& projections, mx::Dtype dtype);
mx::array experts(const Ops& ops, const mx::array& x, const mx::array& routed, const Ops::Weight& w);

}  // namespace torpor::model::on_mlx
