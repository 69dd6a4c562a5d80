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
#include "model/recurrent_mlx.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

/// A copy of the tensor's bytes.
mx::array to_array(const TensorView& tensor) {
  const mx::Dtype dtype = tensor.dtype == "U32"    ? mx::uint32
                          : tensor.dtype == "U8"   ? mx::uint8
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
  Norm(mx::array w, bool centred) : w(std::move(w)), centred(centred) {}
  mx::array w;
  bool centred;
};

struct Linear final : Ops::Packed {
  Linear(const Projection& p, mx::Dtype dtype)
      : dtype(dtype), weight(to_array(p.weight)), quantization(p.quantization) {
    const auto load = [&](const TensorView& tensor) { return mx::astype(to_array(tensor), dtype); };
    if (quantization) {
      scales = p.biases ? load(*p.scales) : to_array(*p.scales);
      if (p.biases) biases = load(*p.biases);
      mx::eval({weight, *scales, biases.value_or(*scales)});
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
    mx::array y = quantization ? mx::quantized_matmul(x, weight, *scales, biases, /*transpose=*/true, quantization->group,
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

  mx::Dtype dtype;
  /// Of several of one shape, stacked: each row of x [M, chosen, 1, K] by the expert of `indices` [M, chosen].
  mx::array apply(const mx::array& x, const mx::array& indices) const {
    if (!quantization) return mx::gather_mm(x, mx::swapaxes(weight, -1, -2), std::nullopt, indices);
    return mx::gather_qmm(x, weight, *scales, biases, std::nullopt, indices, /*transpose=*/true, quantization->group,
                          quantization->bits, mode_name(quantization->mode));
  }
  static Linear stacked(const std::vector<Projection>& parts, mx::Dtype dtype) {
    std::vector<mx::array> weights, scales, biases;
    Linear all(parts.front(), dtype);
    for (const Projection& part : parts) {
      Linear one(part, dtype);
      weights.push_back(one.weight);
      if (one.scales) scales.push_back(*one.scales);
      if (one.biases) biases.push_back(*one.biases);
    }
    const auto stack = [](const std::vector<mx::array>& arrays) {
      mx::array stack = mx::stack(arrays);
      mx::eval({stack});
      return stack;
    };
    all.weight = stack(weights);
    if (!scales.empty()) all.scales = stack(scales);
    if (!biases.empty()) all.biases = stack(biases);
    return all;
  }

  mx::array weight;
  std::optional<Quantization> quantization;
  std::optional<mx::array> scales, biases, bias;
};

struct Gated final : Ops::Packed {
  Gated(Linear gate, Linear up, Activation activation)
      : gate(std::move(gate)), up(std::move(up)), activation(activation) {}
  Linear gate, up;
  Activation activation;
};

struct Mixture final : Ops::Packed {
  Mixture(const Experts& spec, Linear router, Linear gate, Linear up, Linear down)
      : spec(spec), router(std::move(router)), gate(std::move(gate)), up(std::move(up)), down(std::move(down)) {}
  Experts spec;
  Linear router, gate, up, down;  // but for the router's, of all experts
};

struct Recurring final : Ops::Packed {
  std::vector<Linear> projections;
  kernels::Recurrent cell;
};

/// As fast::rope wants them: 1 / inv_freq; and what a head's dims are multiplied by.
struct Angles {
  mx::array periods;
  std::optional<mx::array> magnitudes;
};

struct Attending final : Ops::Packed {
  Attending(const Attention& spec, Linear q, Angles angles) : spec(spec), q(std::move(q)), angles(std::move(angles)) {}
  Attention spec;
  Linear q;
  std::optional<Linear> k, v;
  Angles angles;
  Ops::Weight q_norm, k_norm;
};

mx::array silu(const mx::array& x) { return mx::multiply(x, mx::sigmoid(x)); }

/// As kernels::AttentionSpec::rotate_keys has it.
mx::array hadamard(const mx::array& x) {
  const int dim = x.shape(-1), block = dim & -dim;
  return mx::flatten(mx::hadamard_transform(mx::unflatten(x, -1, {dim / block, block})), -2, -1);
}

const Linear& single(const Ops::Weight& w) { return static_cast<const Linear&>(*w); }

class MlxOps final : public Ops {
 public:
  MlxOps(float eps, KvDtype dtype)
      : eps_(eps), dtype_(mx::default_device() == mx::Device::gpu ? to_mlx(dtype) : mx::float32) {}

  Weight pack_linear(const Projection& p) override { return std::make_shared<Linear>(p, dtype_); }
  Weight pack_attention(const Attention& spec, const Projection& q, const Projection* k, const Projection* v,
                        Weight q_norm, Weight k_norm) override {
    auto weight = std::make_shared<Attending>(spec, Linear(q, dtype_), angles(spec));
    if (k != nullptr) weight->k.emplace(*k, dtype_);
    if (v != nullptr) weight->v.emplace(*v, dtype_);
    weight->q_norm = std::move(q_norm);
    weight->k_norm = std::move(k_norm);
    return weight;
  }
  Weight pack_recurrent(kernels::Recurrent cell, const std::vector<Projection>& projections) override {
    auto weight = std::make_shared<Recurring>();
    for (const Projection& p : projections) weight->projections.emplace_back(p, dtype_);
    weight->cell = std::move(cell);
    return weight;
  }
  Weight pack_gated(const Projection& gate, const Projection& up, Activation activation) override {
    return std::make_shared<Gated>(Linear(gate, dtype_), Linear(up, dtype_), activation);
  }
  Weight pack_experts(const Experts& spec, const Projection& router, const std::vector<Projection>& gates,
                      const std::vector<Projection>& ups, const std::vector<Projection>& downs) override {
    const auto stacked = [&](const std::vector<Projection>& parts) { return Linear::stacked(parts, dtype_); };
    return std::make_shared<Mixture>(spec, Linear(router, dtype_), stacked(gates), stacked(ups), stacked(downs));
  }
  Weight pack_norm(const TensorView& weight, float plus, bool centred) override {
    mx::array w = mx::astype(to_array(weight), dtype_);
    if (plus != 0) w = mx::add(w, mx::array(plus, dtype_));
    mx::eval({w});
    return std::make_shared<Norm>(std::move(w), centred);
  }

  mx::array embedding(const std::vector<int32_t>& tokens, const Weight& w) override {
    return single(w).rows(mx::array(tokens.data(), {int(tokens.size())}, mx::int32));
  }
  mx::array norm(const mx::array& x, const Weight& w) override { return normed(x, w, true); }
  mx::array attention(const mx::array& x, const Weight& weight, int layer, Batch& batch) override {
    const auto& w = static_cast<const Attending&>(*weight);
    const Attention& spec = w.spec;
    const KvFormat& format = batch.kv_format;
    const mx::array q = normed(w.q.apply(x), w.q_norm, spec.qk_norm == QkNorm::kWhole);
    const std::vector<mx::array> lent = spec.reads_rows_of ? batch.lent.at(layer) : append(x, w, layer, batch);
    if (spec.lends_rows) batch.lent.insert_or_assign(layer, lent);
    std::vector<mx::array> outputs;
    for (size_t i = 0; i < batch.sequences.size(); ++i) {
      const BatchSequence& s = batch.sequences[i];
      mx::array keys = mx::astype(lent[2 * i], dtype_);
      const mx::array values = mx::astype(lent[2 * i + 1], dtype_);
      mx::array queries = normed(heads(q, s, spec.n_heads, spec.key_dim), w.q_norm, spec.qk_norm == QkNorm::kHeads);
      if (format.rotates_keys() && spec.evens_keys()) queries = mx::multiply(queries, factors_of(w));
      queries = rotate(queries, s.position, w);
      if (spec.query_scale) queries = mx::multiply(queries, query_factors(*spec.query_scale, s));
      if (bias_free(spec, format)) {
        const int held = keys.shape(2);
        const mx::array biases = mx::broadcast_to(key_bias(w), {1, spec.n_kv_heads, held, spec.key_dim});
        keys = mx::add(turned(keys, format.rotates_keys()), rotate(biases, s.position + s.n - held, w));
      } else {
        queries = turned(queries, format.rotates_keys());
      }
      const mx::array out = turned(attend(queries, keys, values, s, spec), format.rotates_values());
      outputs.push_back(mx::reshape(mx::transpose(out, {0, 2, 1, 3}), {s.n, spec.output_size()}));
    }
    return outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, 0);
  }
  mx::array recurrent(const mx::array& x, const Weight& weight, size_t offset, Batch& batch) override {
    const auto& w = static_cast<const Recurring&>(*weight);
    std::vector<mx::array> parts;
    for (const Linear& projection : w.projections) parts.push_back(projection.apply(x));
    return mx::astype(recurrent_on_mlx(mx::concatenate(parts, 1), w.cell, offset, batch), dtype_);
  }
  mx::array gate(const mx::array& x, const mx::array& gates) override { return mx::multiply(x, mx::sigmoid(gates)); }
  mx::array linear_add(const mx::array& x, const Weight& w, const mx::array& residual) override {
    return mx::add(residual, single(w).apply(x));
  }
  mx::array linear(const mx::array& x, const Weight& w) override { return single(w).apply(x); }
  mx::array gated(const mx::array& x, const Weight& w) override {
    const auto& gated = static_cast<const Gated&>(*w);
    const mx::array gate = gated.gate.apply(x);
    return mx::multiply(gated.activation == Activation::kSilu ? silu(gate) : gelu(gate), gated.up.apply(x));
  }
  mx::array experts(const mx::array& x, const Weight& w) override {
    using Scores = kernels::Routing::Scores;
    using Weights = kernels::Routing::Weights;
    const auto& mixture = static_cast<const Mixture&>(*w);
    const kernels::Routing& routing = mixture.spec.routing;
    const mx::array logits = mx::astype(mixture.router.apply(x), mx::float32);
    const mx::array scores = routing.scores == Scores::kSoftmax   ? mx::softmax(logits, -1, /*precise=*/true)
                             : routing.scores == Scores::kSigmoid ? mx::sigmoid(logits)
                                                                  : logits;
    const auto of_experts = [](const std::vector<float>& values) {
      return mx::array(values.data(), {int(values.size())}, mx::float32);
    };
    const mx::array ranked = routing.selection_bias.empty() ? scores : mx::add(scores, of_experts(routing.selection_bias));
    const mx::array best = mx::slice(mx::argsort(mx::negative(ranked), -1), {0, 0}, {x.shape(0), routing.chosen});
    const mx::array chosen = mx::sort(best, -1);
    mx::array weights = mx::take_along_axis(scores, chosen, -1);
    if (routing.weights == Weights::kSoftmax) weights = mx::softmax(weights, -1, /*precise=*/true);
    if (routing.weights == Weights::kNormalised) {
      weights = mx::divide(weights, mx::add(mx::sum(weights, -1, /*keepdims=*/true), mx::array(routing.epsilon)));
    }
    weights = mx::multiply(weights, mx::array(routing.scale));
    if (!routing.expert_scale.empty()) {
      weights = mx::multiply(weights, mx::take(of_experts(routing.expert_scale), chosen));
    }
    const mx::array rows = mx::expand_dims(x, {-2, -3});
    const mx::array gate = mixture.gate.apply(rows, chosen), up = mixture.up.apply(rows, chosen);
    const mx::array hidden = mx::multiply(mixture.spec.activation == Activation::kSilu ? silu(gate) : gelu(gate), up);
    const mx::array out = mx::squeeze(mixture.down.apply(hidden, chosen), -2);
    return mx::sum(mx::multiply(out, mx::astype(mx::expand_dims(weights, -1), out.dtype())), -2);
  }
  mx::array head(const mx::array& x, const Weight& w) override { return mx::astype(single(w).apply(x), mx::float32); }

  mx::Device device() const override { return mx::default_device(); }
  std::span<const KvBuffer> reserve(KvAccess&, int) override { return {}; }
  bool advances_per_chunk() const override { return true; }

 private:
  static bool bias_free(const Attention& spec, const KvFormat& format) { return format.bias_free && spec.key_bias(); }
  static mx::array turned(const mx::array& x, bool turn) { return turn ? hadamard(x) : x; }
  /// Appends the new rows to the caches. Of each sequence all keys and all values, as they are kept.
  std::vector<mx::array> append(const mx::array& x, const Attending& w, int layer, const Batch& batch) const {
    const Attention& spec = w.spec;
    const KvFormat& format = batch.kv_format;
    const mx::array projected = w.k->apply(x), k = normed(projected, w.k_norm, spec.qk_norm == QkNorm::kWhole);
    const mx::array v = spec.keys_are_values ? projected : w.v->apply(x);
    std::vector<mx::array> all;
    for (const BatchSequence& s : batch.sequences) {
      mx::array keys = normed(heads(k, s, spec.n_kv_heads, spec.key_dim), w.k_norm, spec.qk_norm == QkNorm::kHeads);
      if (format.rotates_keys() && spec.evens_keys()) keys = mx::divide(keys, factors_of(w));
      if (bias_free(spec, format)) keys = mx::subtract(keys, key_bias(w));
      keys = turned(rotate(keys, s.position, w), format.rotates_keys());
      mx::array values = heads(v, s, spec.n_kv_heads, spec.value_dim);
      if (spec.value_norm) values = mx::fast::rms_norm(values, std::nullopt, eps_);
      const auto [held_keys, held_values] = s.kv->update_and_fetch(layer, keys, turned(values, format.rotates_values()));
      all.push_back(held_keys);
      all.push_back(held_values);
    }
    return all;
  }
  Angles angles(const Attention& spec) const {
    const Rope& rope = *spec.rope;
    std::vector<float> periods;
    for (float f : rope.inv_freq) periods.push_back(1 / f);
    Angles angles{.periods = mx::array(periods.data(), {int(periods.size())}, mx::float32), .magnitudes = std::nullopt};
    if (rope.magnitude != 1) {
      std::vector<float> magnitudes(size_t(spec.key_dim), 1);
      std::fill_n(magnitudes.begin(), rope.dims, rope.magnitude);
      angles.magnitudes = mx::astype(mx::array(magnitudes.data(), {spec.key_dim}, mx::float32), dtype_);
    }
    return angles;
  }
  /// The sequence's rows of `x` [M, H D] as [1, H, n, D].
  static mx::array heads(const mx::array& x, const BatchSequence& s, int n_heads, int dim) {
    const mx::array rows = mx::slice(x, {s.row, 0}, {s.row + s.n, n_heads * dim});
    return mx::transpose(mx::reshape(rows, {1, s.n, n_heads, dim}), {0, 2, 1, 3});
  }
  /// [1, H_kv, 1, D]
  static mx::array key_bias(const Attending& w) {
    return mx::reshape(*w.k->bias, {1, w.spec.n_kv_heads, 1, w.spec.key_dim});
  }
  /// pair_factors, [D].
  mx::array factors_of(const Attending& w) const {
    const auto floats = [](const Weight& norm) {
      const mx::array values = mx::astype(static_cast<const Norm&>(*norm).w, mx::float32);
      mx::eval({values});
      return std::vector<float>(values.data<float>(), values.data<float>() + values.size());
    };
    const std::vector<float> factors = pair_factors(*w.spec.rope, floats(w.q_norm), floats(w.k_norm));
    return mx::astype(mx::array(factors.data(), {w.spec.key_dim}, mx::float32), dtype_);
  }
  mx::array normed(const mx::array& x, const Weight& norm, bool asked) const {
    if (!asked) return x;
    const auto& own = static_cast<const Norm&>(*norm);
    return own.centred ? mx::fast::layer_norm(x, own.w, std::nullopt, eps_) : mx::fast::rms_norm(x, own.w, eps_);
  }
  static mx::array rotate(const mx::array& x, int position, const Attending& w) {
    const Rope& rope = *w.spec.rope;
    const auto& [periods, magnitudes] = w.angles;
    if (rope.dims == 0) return x;
    return mx::fast::rope(magnitudes ? mx::multiply(x, *magnitudes) : x, rope.dims, rope.traditional, std::nullopt, 1.0f,
                          position, periods);
  }
  /// [n, 1]
  mx::array query_factors(const QueryScale& scale, const BatchSequence& s) const {
    std::vector<float> factors;
    for (int t = 0; t < s.n; ++t) factors.push_back(scale.at(s.position + t));
    return mx::astype(mx::array(factors.data(), {s.n, 1}, mx::float32), dtype_);
  }
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const BatchSequence& s,
                   const Attention& spec) const {
    const int window = spec.window, length = s.position + s.n;
    if (spec.softcap == 0 && (window == 0 || length <= window)) {
      return mx::fast::scaled_dot_product_attention(q, k, v, spec.scale, s.n > 1 ? "causal" : "");
    }
    const mx::array at = mx::expand_dims(mx::arange(s.position, length, mx::int32), 1);
    const mx::array key = mx::expand_dims(mx::arange(length - k.shape(2), length, mx::int32), 0);
    mx::array mask = mx::less_equal(key, at);
    if (window != 0) mask = mx::logical_and(mask, mx::greater(key, mx::subtract(at, mx::array(window))));
    if (spec.softcap != 0) return attend_capped(q, k, v, mask, spec);
    return mx::fast::scaled_dot_product_attention(q, k, v, spec.scale, "array", mask);
  }

  /// MLX has no attention with a soft cap, so it is spelled out.
  mx::array attend_capped(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& mask,
                          const Attention& spec) const {
    const int n = q.shape(2);
    const auto grouped = [&](const mx::array& x) { return mx::expand_dims(x, 2); };
    const mx::array queries = mx::reshape(scale(q, spec.scale), {1, spec.n_kv_heads, -1, n, spec.key_dim});
    mx::array scores = mx::matmul(queries, mx::swapaxes(grouped(k), -1, -2));
    scores = soft_cap(scores, spec.softcap);
    scores = mx::where(mask, scores, mx::array(-std::numeric_limits<float>::infinity(), scores.dtype()));
    const mx::array out = mx::matmul(mx::softmax(scores, -1, /*precise=*/true), grouped(v));
    return mx::reshape(out, {1, spec.n_heads, n, spec.value_dim});
  }

  const float eps_;
  const mx::Dtype dtype_;
};

}  // namespace

std::unique_ptr<Ops> make_mlx_ops(float eps, KvDtype dtype) { return std::make_unique<MlxOps>(eps, dtype); }

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

mx::array Ops::multiply(const mx::array& x, const mx::array& y) const { return mx::multiply(x, y, device()); }

mx::array Ops::gelu(const mx::array& x) const {
  const mx::array cube = scale(multiply(x, multiply(x, x)), 0.044715f);
  const mx::array inner = scale(mx::add(x, cube, device()), float(std::sqrt(2 / std::numbers::pi)));
  const mx::array one(1.0f, x.dtype());
  return multiply(scale(x, 0.5f), mx::add(one, mx::tanh(inner, device()), device()));
}

mx::array Ops::relu_squared(const mx::array& x) const {
  const mx::array positive = mx::maximum(x, mx::array(0.0f, x.dtype()), device());
  return multiply(positive, positive);
}

mx::array Ops::soft_cap(const mx::array& x, float cap) const {
  return cap == 0 ? x : scale(mx::tanh(scale(x, 1 / cap), device()), cap);
}

}  // namespace torpor::model
