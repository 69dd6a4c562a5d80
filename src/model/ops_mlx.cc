/// The layer vocabulary over MLX's own operations. Activations have the checkpoint's dtype on a GPU and are f32 on a
/// CPU, where MLX has no vector code for half types.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include <mlx/fast.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "model/key_rows.h"
#include "model/ops.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

/// A copy of the tensor's bytes.
mx::array to_array(const TensorView& tensor) {
  const mx::Dtype dtype = tensor.dtype == "U32"    ? mx::uint32
                          : tensor.dtype == "F16"  ? mx::float16
                          : tensor.dtype == "BF16" ? mx::bfloat16
                                                   : mx::float32;
  mx::array copy(mx::allocator::malloc(tensor.nbytes), mx::Shape(tensor.shape.begin(), tensor.shape.end()), dtype);
  std::memcpy(copy.data<uint8_t>(), tensor.data, tensor.nbytes);
  return copy;
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
  Linear(const Projection& p, mx::Dtype dtype) : weight(to_array(p.weight)), quantization(p.quantization) {
    const auto load = [&](const TensorView& tensor) { return mx::astype(to_array(tensor), dtype); };
    if (quantization) {
      scales = load(*p.scales);
      biases = load(*p.biases);
      mx::eval({weight, *scales, *biases});
    } else {
      weight = mx::astype(weight, dtype);
      mx::eval({weight});
    }
    if (p.bias) {
      bias = load(*p.bias);
      mx::eval({*bias});
    }
  }

  mx::array apply(const mx::array& x) const {
    mx::array y = quantization ? mx::quantized_matmul(x, weight, *scales, *biases, /*transpose=*/true,
                                                      quantization->group, quantization->bits)
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

/// Several projections of one input: q, k, v, perhaps with their norms; or gate and up.
struct Linears final : Ops::Packed {
  std::vector<Linear> parts;
  Ops::Weight q_norm, k_norm;
};

mx::array silu(const mx::array& x) { return mx::multiply(x, mx::sigmoid(x)); }

/// The approximation with a tanh.
mx::array gelu_tanh(const mx::array& x) {
  const auto number = [&](float value) { return mx::array(value, x.dtype()); };
  const mx::array cube = mx::multiply(number(0.044715f), mx::multiply(x, mx::multiply(x, x)));
  const mx::array inner = mx::multiply(number(float(std::sqrt(2 / std::numbers::pi))), mx::add(x, cube));
  return mx::multiply(mx::multiply(number(0.5f), x), mx::add(number(1), mx::tanh(inner)));
}

/// As kernels::AttentionSpec::rotate_keys has it.
mx::array hadamard(const mx::array& x) {
  const int dim = x.shape(-1), block = dim & -dim;
  return mx::flatten(mx::hadamard_transform(mx::unflatten(x, -1, {dim / block, block})), -2, -1);
}

const Linear& single(const Ops::Weight& w) { return static_cast<const Linear&>(*w); }
const Linear& part(const Ops::Weight& w, size_t i) { return static_cast<const Linears&>(*w).parts[i]; }

class MlxOps final : public Ops {
 public:
  MlxOps(const ModelConfig& config, KvDtype dtype)
      : config_(config),
        dtype_(mx::default_device() == mx::Device::gpu ? to_mlx(dtype) : mx::float32),
        rope_(angles(config.rope)),
        local_rope_(config.local_rope ? std::optional(angles(*config.local_rope)) : std::nullopt) {}

  Weight pack_linear(const Projection& p) override { return std::make_shared<Linear>(p, dtype_); }
  Weight pack_qkv(const Projection& q, const Projection& k, const Projection& v, Weight q_norm,
                  Weight k_norm) override {
    auto weight = pack({&q, &k, &v});
    weight->q_norm = std::move(q_norm);
    weight->k_norm = std::move(k_norm);
    return weight;
  }
  Weight pack_gated(const Projection& gate, const Projection& up) override { return pack({&gate, &up}); }
  Weight pack_norm(const TensorView& weight, float plus) override {
    mx::array w = mx::astype(to_array(weight), dtype_);
    if (plus != 0) w = mx::add(w, mx::array(plus, dtype_));
    mx::eval({w});
    return std::make_shared<Norm>(std::move(w));
  }

  mx::array embedding(const std::vector<int32_t>& tokens, const Weight& w) override {
    return single(w).rows(mx::array(tokens.data(), {int(tokens.size())}, mx::int32));
  }
  mx::array rms_norm(const mx::array& x, const Weight& w) override {
    return rms(x, w);
  }
  mx::array attention(const mx::array& x, const Weight& qkv, int layer, const Batch& batch) override {
    const mx::array q = part(qkv, 0).apply(x), k = part(qkv, 1).apply(x), v = part(qkv, 2).apply(x);
    const KvFormat& format = batch.kv_format;
    const auto turned = [](const mx::array& x, bool turn) { return turn ? hadamard(x) : x; };
    std::vector<mx::array> outputs;
    for (const BatchSequence& s : batch.sequences) {
      const auto& norms = static_cast<const Linears&>(*qkv);
      mx::array own_queries = normed(heads(q, s, config_.n_heads), norms.q_norm);
      mx::array own_keys = normed(heads(k, s, config_.n_kv_heads), norms.k_norm);
      if (format.rotates_keys() && norms.k_norm != nullptr) {
        const mx::array factors = factors_of(norms, layer);
        own_queries = mx::multiply(own_queries, factors);
        own_keys = mx::divide(own_keys, factors);
      }
      mx::array queries = rotate(own_queries, s.position, layer);
      if (format.bias_free) own_keys = mx::subtract(own_keys, key_bias(qkv));
      const mx::array new_keys = turned(rotate(own_keys, s.position, layer), format.rotates_keys());
      const mx::array new_values = turned(heads(v, s, config_.n_kv_heads), format.rotates_values());
      auto [keys, values] = s.kv->update_and_fetch(layer, new_keys, new_values);
      keys = mx::astype(keys, dtype_);
      if (format.bias_free) {
        const int held = keys.shape(2);
        const mx::array biases = mx::broadcast_to(key_bias(qkv), {1, config_.n_kv_heads, held, config_.head_dim});
        keys = mx::add(turned(keys, format.rotates_keys()), rotate(biases, s.position + s.n - held, layer));
      } else {
        queries = turned(queries, format.rotates_keys());
      }
      const mx::array attended = attend(queries, keys, mx::astype(values, dtype_), s, layer);
      const mx::array out = turned(attended, format.rotates_values());
      outputs.push_back(mx::reshape(mx::transpose(out, {0, 2, 1, 3}), {s.n, config_.n_heads * config_.head_dim}));
    }
    return outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, 0);
  }
  mx::array linear_add(const mx::array& x, const Weight& w, const mx::array& residual) override {
    return mx::add(residual, single(w).apply(x));
  }
  mx::array linear(const mx::array& x, const Weight& w) override { return single(w).apply(x); }
  mx::array gated(const mx::array& x, const Weight& w) override {
    const mx::array gate = part(w, 0).apply(x);
    return mx::multiply(config_.activation == Activation::kSilu ? silu(gate) : gelu_tanh(gate), part(w, 1).apply(x));
  }
  mx::array head(const mx::array& x, const Weight& w) override { return mx::astype(single(w).apply(x), mx::float32); }

  mx::Device device() const override { return mx::default_device(); }
  std::span<const KvBuffer> reserve(KvAccess&, int) override { return {}; }
  bool advances_per_chunk() const override { return true; }

 private:
  std::shared_ptr<Linears> pack(std::initializer_list<const Projection*> projections) const {
    auto weight = std::make_shared<Linears>();
    for (const Projection* p : projections) weight->parts.emplace_back(*p, dtype_);
    return weight;
  }
  /// As fast::rope wants them: 1 / inv_freq; and what a head's dims are multiplied by.
  struct Angles {
    mx::array periods;
    std::optional<mx::array> magnitudes;
  };
  Angles angles(const Rope& rope) const {
    std::vector<float> periods;
    for (float f : rope.inv_freq) periods.push_back(1 / f);
    Angles angles{.periods = mx::array(periods.data(), {int(periods.size())}, mx::float32)};
    if (rope.magnitude != 1) {
      std::vector<float> magnitudes(size_t(config_.head_dim), 1);
      std::fill_n(magnitudes.begin(), rope.dims, rope.magnitude);
      angles.magnitudes = mx::astype(mx::array(magnitudes.data(), {config_.head_dim}, mx::float32), dtype_);
    }
    return angles;
  }
  /// The sequence's rows of `x` [M, H D] as [1, H, n, D].
  mx::array heads(const mx::array& x, const BatchSequence& s, int n_heads) const {
    const mx::array rows = mx::slice(x, {s.row, 0}, {s.row + s.n, n_heads * config_.head_dim});
    return mx::transpose(mx::reshape(rows, {1, s.n, n_heads, config_.head_dim}), {0, 2, 1, 3});
  }
  /// [1, H_kv, 1, D]
  mx::array key_bias(const Weight& qkv) const {
    return mx::reshape(*part(qkv, 1).bias, {1, config_.n_kv_heads, 1, config_.head_dim});
  }
  /// pair_factors, [D].
  mx::array factors_of(const Linears& w, int layer) const {
    const auto floats = [](const Weight& norm) {
      const mx::array values = mx::astype(static_cast<const Norm&>(*norm).w, mx::float32);
      mx::eval({values});
      return std::vector<float>(values.data<float>(), values.data<float>() + values.size());
    };
    const std::vector<float> factors = pair_factors(config_.rope_of(layer), floats(w.q_norm), floats(w.k_norm));
    return mx::astype(mx::array(factors.data(), {config_.head_dim}, mx::float32), dtype_);
  }
  mx::array normed(const mx::array& x, const Weight& norm) const { return norm == nullptr ? x : rms(x, norm); }
  mx::array rms(const mx::array& x, const Weight& w) const {
    return mx::fast::rms_norm(x, static_cast<const Norm&>(*w).w, config_.rms_norm_eps);
  }
  mx::array rotate(const mx::array& x, int position, int layer) const {
    const Rope& rope = config_.rope_of(layer);
    const Angles& angles = &rope == &config_.rope ? rope_ : *local_rope_;
    return mx::fast::rope(angles.magnitudes ? mx::multiply(x, *angles.magnitudes) : x, rope.dims, rope.traditional,
                          std::nullopt, 1.0f, position, angles.periods);
  }
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const BatchSequence& s,
                   int layer) const {
    const int window = config_.windows[size_t(layer)], length = s.position + s.n;
    if (config_.attention_softcap == 0 && (window == 0 || length <= window)) {
      return mx::fast::scaled_dot_product_attention(q, k, v, config_.attention_scale, s.n > 1 ? "causal" : "");
    }
    const mx::array at = mx::expand_dims(mx::arange(s.position, length, mx::int32), 1);
    const mx::array key = mx::expand_dims(mx::arange(length - k.shape(2), length, mx::int32), 0);
    mx::array mask = mx::less_equal(key, at);
    if (window != 0) mask = mx::logical_and(mask, mx::greater(key, mx::subtract(at, mx::array(window))));
    if (config_.attention_softcap != 0) return attend_capped(q, k, v, mask);
    return mx::fast::scaled_dot_product_attention(q, k, v, config_.attention_scale, "array", mask);
  }

  /// MLX has no attention with a soft cap, so it is spelled out.
  mx::array attend_capped(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& mask) const {
    const int n = q.shape(2), groups = config_.n_kv_heads;
    const auto grouped = [&](const mx::array& x) { return mx::expand_dims(x, 2); };
    const mx::array queries = mx::reshape(scale(q, config_.attention_scale), {1, groups, -1, n, config_.head_dim});
    mx::array scores = mx::matmul(queries, mx::swapaxes(grouped(k), -1, -2));
    scores = soft_cap(scores, config_.attention_softcap);
    scores = mx::where(mask, scores, mx::array(-std::numeric_limits<float>::infinity(), scores.dtype()));
    const mx::array out = mx::matmul(mx::softmax(scores, -1, /*precise=*/true), grouped(v));
    return mx::reshape(out, {1, config_.n_heads, n, config_.head_dim});
  }

  const ModelConfig config_;
  const mx::Dtype dtype_;
  const Angles rope_;
  const std::optional<Angles> local_rope_;
};

}  // namespace

std::unique_ptr<Ops> make_mlx_ops(const ModelConfig& config, KvDtype dtype) {
  return std::make_unique<MlxOps>(config, dtype);
}

// ---- of either backend

mx::array Ops::add(const mx::array& x, const mx::array& y) const {
  if (x.dtype() != mx::float16) return mx::add(x, y, device());
  // Gemma's residuals outgrow f16; as in mlx-lm they stay at its largest number.
  const auto wide = [&](const mx::array& a) { return mx::astype(a, mx::float32, device()); };
  const mx::array bound(65504.0f);
  const mx::array sum = mx::clip(mx::add(wide(x), wide(y), device()), mx::negative(bound, device()), bound, device());
  return mx::astype(sum, mx::float16, device());
}

mx::array Ops::scale(const mx::array& x, float factor) const {
  return mx::multiply(x, mx::array(factor, x.dtype()), device());
}

mx::array Ops::soft_cap(const mx::array& x, float cap) const {
  return cap == 0 ? x : scale(mx::tanh(scale(x, 1 / cap), device()), cap);
}

}  // namespace torpor::model
