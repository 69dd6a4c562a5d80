/// The layer vocabulary over MLX's own operations. Activations have the checkpoint's dtype on a GPU and are f32 on a
/// CPU, where MLX has no vector code for half types.

#include <cmath>

#include <mlx/fast.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "model/ops.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

/// A copy of the tensor's bytes.
mx::array to_array(const TensorView& tensor) {
  mx::Shape shape(tensor.shape.begin(), tensor.shape.end());
  const auto copy = [&](const auto* data, mx::Dtype dtype) { return mx::array(data, shape, dtype); };
  if (tensor.dtype == "U32") return copy(reinterpret_cast<const uint32_t*>(tensor.data), mx::uint32);
  if (tensor.dtype == "F16") return copy(reinterpret_cast<const mx::float16_t*>(tensor.data), mx::float16);
  if (tensor.dtype == "BF16") return copy(reinterpret_cast<const mx::bfloat16_t*>(tensor.data), mx::bfloat16);
  return copy(reinterpret_cast<const float*>(tensor.data), mx::float32);
}

mx::Dtype to_mlx(KvDtype dtype) {
  switch (dtype) {
    case KvDtype::kF16: return mx::float16;
    case KvDtype::kBF16: return mx::bfloat16;
    default: return mx::float32;
  }
}

struct Norm final : Ops::Packed {
  explicit Norm(mx::array w) : w(std::move(w)) {}
  mx::array w;
};

struct Linear final : Ops::Packed {
  Linear(const Projection& p, mx::Dtype dtype) : weight(to_array(*p.weight)), quantization(p.quantization) {
    const auto load = [&](const TensorView& tensor) { return mx::astype(to_array(tensor), dtype); };
    if (quantization) {
      scales = load(*p.scales);
      biases = load(*p.biases);
      mx::eval({weight, *scales, *biases});
    } else {
      weight = mx::astype(weight, dtype);
      mx::eval({weight});
    }
    if (p.bias != nullptr) {
      bias = load(*p.bias);
      mx::eval({*bias});
    }
  }

  mx::array apply(const mx::array& x) const {
    mx::array y = quantization ? mx::quantized_matmul(x, weight, *scales, *biases, /*transpose=*/true, quantization->group,
                                                      quantization->bits)
                               : mx::matmul(x, mx::transpose(weight));
    return bias ? mx::add(y, *bias) : y;
  }
  mx::array rows(const mx::array& indices) const {
    const auto take = [&](const mx::array& a) { return mx::take(a, indices, 0); };
    if (!quantization) return take(weight);
    return mx::dequantize(take(weight), take(*scales), take(*biases), quantization->group, quantization->bits);
  }

  mx::array weight;
  std::optional<Quantization> quantization;
  std::optional<mx::array> scales, biases, bias;
};

/// Several projections of one input: q, k, v; or gate and up.
struct Linears final : Ops::Packed {
  std::vector<Linear> parts;
};

const Linear& linear(const Ops::Weight& w) { return static_cast<const Linear&>(*w); }
const Linear& part(const Ops::Weight& w, size_t i) { return static_cast<const Linears&>(*w).parts[i]; }

class MlxOps final : public Ops {
 public:
  MlxOps(const ModelConfig& config, KvDtype dtype)
      : config_(config), dtype_(mx::default_device() == mx::Device::gpu ? to_mlx(dtype) : mx::float32),
        rope_periods_(periods(config.rope)) {}

  Weight pack_linear(const Projection& p) override { return std::make_shared<Linear>(p, dtype_); }
  Weight pack_qkv(const Projection& q, const Projection& k, const Projection& v) override { return pack({&q, &k, &v}); }
  Weight pack_gated(const Projection& gate, const Projection& up) override { return pack({&gate, &up}); }
  Weight pack_norm(const TensorView& weight) override {
    mx::array w = mx::astype(to_array(weight), dtype_);
    mx::eval({w});
    return std::make_shared<Norm>(std::move(w));
  }

  mx::array embedding(const std::vector<int32_t>& tokens, const Weight& w) override {
    return linear(w).rows(mx::array(tokens.data(), {int(tokens.size())}, mx::int32));
  }
  mx::array rms_norm(const mx::array& x, const Weight& w) override {
    return mx::fast::rms_norm(x, static_cast<const Norm&>(*w).w, config_.rms_norm_eps);
  }
  mx::array attention(const mx::array& x, const Weight& qkv, int layer, const Batch& batch) override {
    const mx::array q = part(qkv, 0).apply(x), k = part(qkv, 1).apply(x), v = part(qkv, 2).apply(x);
    std::vector<mx::array> outputs;
    for (const BatchSequence& s : batch.sequences) {
      const mx::array queries = rotate(heads(q, s, config_.n_heads), s.position);
      const mx::array new_keys = rotate(heads(k, s, config_.n_kv_heads), s.position);
      auto [keys, values] = s.kv->update_and_fetch(layer, new_keys, heads(v, s, config_.n_kv_heads));
      const mx::array out = attend(queries, mx::astype(keys, dtype_), mx::astype(values, dtype_), s, layer);
      outputs.push_back(mx::reshape(mx::transpose(out, {0, 2, 1, 3}), {s.n, config_.n_heads * config_.head_dim}));
    }
    return outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, 0);
  }
  mx::array linear_add(const mx::array& x, const Weight& w, const mx::array& residual) override {
    return mx::add(residual, linear(w).apply(x));
  }
  mx::array gated(const mx::array& x, const Weight& w) override {
    const mx::array gate = part(w, 0).apply(x);
    return mx::multiply(mx::multiply(gate, mx::sigmoid(gate)), part(w, 1).apply(x));
  }
  mx::array head(const mx::array& x, const Weight& w) override { return mx::astype(linear(w).apply(x), mx::float32); }

  mx::Device device() const override { return mx::default_device(); }
  std::span<const KvBuffer> reserve(KvAccess&, int) override { return {}; }
  bool advances_per_chunk() const override { return true; }

 private:
  Weight pack(std::initializer_list<const Projection*> projections) const {
    auto weight = std::make_shared<Linears>();
    for (const Projection* p : projections) weight->parts.emplace_back(*p, dtype_);
    return weight;
  }
  static mx::array periods(const Rope& rope) {
    std::vector<float> periods;
    for (float f : rope.inv_freq) periods.push_back(1 / f);
    return mx::array(periods.data(), {int(periods.size())}, mx::float32);
  }
  /// The sequence's rows of `x` [M, H D] as [1, H, n, D].
  mx::array heads(const mx::array& x, const BatchSequence& s, int n_heads) const {
    const mx::array rows = mx::slice(x, {s.row, 0}, {s.row + s.n, n_heads * config_.head_dim});
    return mx::transpose(mx::reshape(rows, {1, s.n, n_heads, config_.head_dim}), {0, 2, 1, 3});
  }
  mx::array rotate(const mx::array& x, int position) const {
    return mx::fast::rope(x, config_.rope.dims, config_.rope.traditional, std::nullopt, 1.0f, position, rope_periods_);
  }
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const BatchSequence& s, int layer) const {
    const float scale = 1 / std::sqrt(float(config_.head_dim));
    const int window = config_.windows[size_t(layer)], length = s.position + s.n;
    if (window == 0 || length <= window) {
      return mx::fast::scaled_dot_product_attention(q, k, v, scale, s.n > 1 ? "causal" : "");
    }
    const mx::array at = mx::expand_dims(mx::arange(s.position, length, mx::int32), 1);
    const mx::array key = mx::expand_dims(mx::arange(0, length, mx::int32), 0);
    const mx::array mask = mx::logical_and(mx::less_equal(key, at), mx::greater(key, mx::subtract(at, mx::array(window))));
    return mx::fast::scaled_dot_product_attention(q, k, v, scale, "array", mask);
  }

  const ModelConfig config_;
  const mx::Dtype dtype_;
  const mx::array rope_periods_;  // 1 / inv_freq, as fast::rope wants them
};

}  // namespace

std::unique_ptr<Ops> make_mlx_ops(const ModelConfig& config, KvDtype dtype) {
  return std::make_unique<MlxOps>(config, dtype);
}

}  // namespace torpor::model
