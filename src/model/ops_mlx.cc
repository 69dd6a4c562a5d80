/// The layer vocabulary over MLX's own operations. Activations have the checkpoint's dtype on a GPU and are f32 on a
/// CPU, where MLX has no vector code for half types.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include <mlx/fast.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "model/block_arrays.h"
#include "model/key_rows.h"
#include "model/mlx_linear.h"
#include "model/ops.h"
#include "model/recurrent_mlx.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using on_mlx::Linear;
using on_mlx::silu;
using on_mlx::to_array;

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

struct Gated final : Ops::Packed {
  Gated(Linear gate, Linear up, Activation activation)
      : gate(std::move(gate)), up(std::move(up)), activation(activation) {}
  Linear gate, up;
  Activation activation;
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

/// Of latent attention; Attending's q and k are the projections to queries and to latents.
struct LatentParts {
  std::optional<Linear> query_features;
  mx::array norm;
  std::optional<mx::array> query_norm;
  Linear into, out;  // of all heads, stacked
};

struct Attending final : Ops::Packed {
  Attending(const Attention& spec, Linear q, Angles angles) : spec(spec), q(std::move(q)), angles(std::move(angles)) {}
  Attention spec;
  Linear q;
  std::optional<Linear> k, v;
  Angles angles;
  Ops::Weight q_norm, k_norm;
  std::optional<mx::array> sinks;
  std::optional<LatentParts> latent;
};

/// As kernels::AttentionSpec::rotate_keys has it.
mx::array hadamard(const mx::array& x) {
  const int dim = x.shape(-1), block = dim & -dim;
  return mx::flatten(mx::hadamard_transform(mx::unflatten(x, -1, {dim / block, block})), -2, -1);
}

using Block = std::span<const BatchSequence>;

/// Entry `i` of `x`, an array with one for each sequence of a block.
mx::array entry(const mx::array& x, size_t i) {
  return x.shape(0) == 1 ? x : mx::slice(x, {int(i), 0, 0, 0}, {int(i) + 1, x.shape(1), x.shape(2), x.shape(3)});
}

mx::array joined(std::vector<mx::array> parts) {
  return parts.size() == 1 ? parts[0] : mx::concatenate(std::move(parts), 0);
}

/// [B], as fast::rope takes them.
mx::array positions_of(const Block& block) {
  std::vector<int32_t> positions;
  for (const BatchSequence& s : block) positions.push_back(s.position);
  return mx::array(positions.data(), {int(positions.size())}, mx::int32);
}

const Linear& single(const Ops::Weight& w) { return static_cast<const Linear&>(*w); }

class MlxOps final : public Ops {
 public:
  MlxOps(float eps, KvDtype dtype)
      : eps_(eps), dtype_(mx::default_device() == mx::Device::gpu ? to_mlx(dtype) : mx::float32) {}

  Weight pack_linear(const Projection& p) override { return std::make_shared<Linear>(p, dtype_); }
  Weight pack_attention(const Attention& spec, const Projection& q, const Projection* k, const Projection* v,
                        Weight q_norm, Weight k_norm, std::vector<float> sinks) override {
    auto weight = std::make_shared<Attending>(spec, Linear(q, dtype_), angles(spec));
    if (k != nullptr) weight->k.emplace(*k, dtype_);
    if (v != nullptr) weight->v.emplace(*v, dtype_);
    weight->q_norm = std::move(q_norm);
    weight->k_norm = std::move(k_norm);
    if (!sinks.empty()) weight->sinks = mx::astype(mx::array(sinks.data(), {int(sinks.size())}, mx::float32), dtype_);
    return weight;
  }
  Weight pack_recurrent(kernels::Recurrent cell, const std::vector<Projection>& projections) override {
    auto weight = std::make_shared<Recurring>();
    for (const Projection& p : projections) weight->projections.emplace_back(p, dtype_);
    weight->cell = std::move(cell);
    return weight;
  }
  Weight pack_latent_attention(const Attention& spec, const LatentProjections& projections, Weight norm,
                               Weight query_norm) override {
    const auto weight_of = [](const Weight& norm) { return static_cast<const Norm&>(*norm).w; };
    auto weight = std::make_shared<Attending>(spec, Linear(projections.query, dtype_), angles(spec));
    weight->k.emplace(projections.latents, dtype_);
    weight->latent = LatentParts{.query_features = std::nullopt, .norm = weight_of(norm), .query_norm = std::nullopt,
                                 .into = Linear::stacked(projections.into, dtype_),
                                 .out = Linear::stacked(projections.out, dtype_)};
    if (projections.query_features) weight->latent->query_features.emplace(*projections.query_features, dtype_);
    if (query_norm != nullptr) weight->latent->query_norm = weight_of(query_norm);
    return weight;
  }
  Weight pack_gated(const Projection& gate, const Projection& up, Activation activation) override {
    return std::make_shared<Gated>(Linear(gate, dtype_), Linear(up, dtype_), activation);
  }
  Weight pack_experts(const Experts& spec, const ExpertProjections& projections) override {
    return on_mlx::pack_experts(spec, projections, dtype_);
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
    if (w.latent) return latent_attention(x, w, layer, batch);
    const Attention& spec = w.spec;
    const KvFormat& format = batch.kv_format;
    const mx::array q = normed(w.q.apply(x), w.q_norm, spec.qk_norm == QkNorm::kWhole);
    const std::vector<mx::array> lent = spec.reads_rows_of ? batch.lent.at(layer) : append(x, w, layer, batch);
    if (spec.lends_rows) batch.lent.insert_or_assign(layer, lent);
    std::vector<mx::array> outputs;
    auto held = lent.begin();
    for (const Block& block : blocks_of(batch)) {
      mx::array queries = normed(heads(q, block, spec.n_heads, spec.key_dim), w.q_norm, spec.qk_norm == QkNorm::kHeads);
      if (format.rotates_keys() && spec.evens_keys()) queries = mx::multiply(queries, factors_of(w));
      queries = rotate(queries, positions_of(block), w);
      if (spec.query_scale) queries = mx::multiply(queries, query_factors(*spec.query_scale, block));
      if (!bias_free(spec, format)) queries = turned(queries, format.rotates_keys());
      std::vector<mx::array> attended;
      for (size_t i = 0; i < block.size(); ++i) {
        mx::array keys = mx::astype(*held++, dtype_);
        const mx::array values = mx::astype(*held++, dtype_);
        if (bias_free(spec, format)) keys = biased(keys, block[i], w, format);
        attended.push_back(attend(entry(queries, i), keys, values, block[i], w));
      }
      outputs.push_back(rows_of(turned(joined(std::move(attended)), format.rotates_values()), spec));
    }
    return joined(std::move(outputs));
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
  mx::array experts(const mx::array& x, const mx::array& routed, const Weight& w) override {
    return on_mlx::experts(*this, x, routed, w);
  }
  mx::array head(const mx::array& x, const Weight& w) override { return mx::astype(single(w).apply(x), mx::float32); }

  mx::Device device() const override { return mx::default_device(); }
  std::span<const KvBuffer> reserve(KvAccess&, int) override { return {}; }
  bool advances_per_chunk() const override { return true; }

 private:
  static bool bias_free(const Attention& spec, const KvFormat& format) { return format.bias_free && spec.key_bias(); }
  static mx::array turned(const mx::array& x, bool turn) { return turn ? hadamard(x) : x; }
  mx::array latent_attention(const mx::array& x, const Attending& w, int layer, const Batch& batch) const {
    const Attention& spec = w.spec;
    const int plain = spec.latent->plain_dim, rest = spec.value_dim;
    const bool turn = batch.kv_format.rotates_keys(), turn_rest = batch.kv_format.rotates_values();
    const auto part = [](const mx::array& rows, int first, int last) {
      return mx::slice(rows, {0, 0, 0, first}, {rows.shape(0), rows.shape(1), rows.shape(2), last});
    };
    const auto& [query_features, norm, query_norm, into, out] = *w.latent;
    const mx::array features =
        query_features ? mx::fast::rms_norm(query_features->apply(x), query_norm, spec.latent->norm_eps) : x;
    const mx::array q = w.q.apply(features), shared = w.k->apply(x);
    std::vector<mx::array> outputs;
    for (const Block& block : blocks_of(batch)) {
      const mx::array positions = positions_of(block);
      mx::array queries = heads(q, block, spec.n_heads, plain + rest);
      if (spec.query_scale) queries = mx::multiply(queries, query_factors(*spec.query_scale, block));
      const mx::array row = heads(shared, block, 1, spec.key_dim + rest);
      const mx::array normed = mx::fast::rms_norm(part(row, 0, spec.key_dim), norm, spec.latent->norm_eps);
      const mx::array latents = turned(normed, turn);
      const mx::array rotating = turned(rotate(part(row, spec.key_dim, spec.key_dim + rest), positions, w), turn_rest);
      const mx::array absorbed = turned(into.apply_each(part(queries, 0, plain)), turn);
      const mx::array turning = turned(rotate(part(queries, plain, plain + rest), positions, w), turn_rest);
      const mx::array whole = mx::concatenate({absorbed, turning}, -1);
      std::vector<mx::array> attended;
      for (size_t i = 0; i < block.size(); ++i) {
        const auto [held, held_rest] = block[i].kv->update_and_fetch(layer, entry(latents, i), entry(rotating, i));
        const mx::array values = mx::astype(held, dtype_);
        const mx::array keys = mx::concatenate({values, mx::astype(held_rest, dtype_)}, -1);
        attended.push_back(attend(entry(whole, i), keys, values, block[i], w));
      }
      outputs.push_back(rows_of(out.apply_each(turned(joined(std::move(attended)), turn)), spec));
    }
    return joined(std::move(outputs));
  }
  /// Appends the new rows to the caches. Of each sequence all keys and all values, as they are kept.
  std::vector<mx::array> append(const mx::array& x, const Attending& w, int layer, const Batch& batch) const {
    const Attention& spec = w.spec;
    const KvFormat& format = batch.kv_format;
    const mx::array projected = w.k->apply(x), k = normed(projected, w.k_norm, spec.qk_norm == QkNorm::kWhole);
    const mx::array v = spec.keys_are_values ? projected : w.v->apply(x);
    std::vector<mx::array> all;
    for (const Block& block : blocks_of(batch)) {
      mx::array keys = normed(heads(k, block, spec.n_kv_heads, spec.key_dim), w.k_norm, spec.qk_norm == QkNorm::kHeads);
      if (format.rotates_keys() && spec.evens_keys()) keys = mx::divide(keys, factors_of(w));
      if (bias_free(spec, format)) keys = mx::subtract(keys, key_bias(w));
      keys = turned(rotate(keys, positions_of(block), w), format.rotates_keys());
      mx::array values = heads(v, block, spec.n_kv_heads, spec.value_dim);
      if (spec.value_norm) values = mx::fast::rms_norm(values, std::nullopt, eps_);
      values = turned(values, format.rotates_values());
      for (size_t i = 0; i < block.size(); ++i) {
        const auto [held_keys, held_values] = block[i].kv->update_and_fetch(layer, entry(keys, i), entry(values, i));
        all.push_back(held_keys);
        all.push_back(held_values);
      }
    }
    return all;
  }
  Angles angles(const Attention& spec) const {
    const Rope& rope = *spec.rope;
    std::vector<float> periods;
    for (float f : rope.inv_freq) periods.push_back(1 / f);
    Angles angles{.periods = mx::array(periods.data(), {int(periods.size())}, mx::float32), .magnitudes = std::nullopt};
    if (rope.magnitude != 1) {
      const int dims = spec.latent ? spec.value_dim : spec.key_dim;
      std::vector<float> magnitudes(size_t(dims), 1);
      std::fill_n(magnitudes.begin(), rope.dims, rope.magnitude);
      angles.magnitudes = mx::astype(mx::array(magnitudes.data(), {dims}, mx::float32), dtype_);
    }
    return angles;
  }
  /// The block's rows of `x` [M, H D] as [B, H, n, D].
  static mx::array heads(const mx::array& x, const Block& block, int n_heads, int dim) {
    const int first = block.front().row, n = block.front().n, entries = int(block.size());
    const mx::array rows = mx::slice(x, {first, 0}, {first + entries * n, n_heads * dim});
    return mx::transpose(mx::reshape(rows, {entries, n, n_heads, dim}), {0, 2, 1, 3});
  }
  /// The opposite, of what attention gives.
  static mx::array rows_of(const mx::array& x, const Attention& spec) {
    return mx::reshape(mx::transpose(x, {0, 2, 1, 3}), {x.shape(0) * x.shape(2), spec.output_size()});
  }
  /// A sequence's keys, kept without their projection's bias, with it.
  mx::array biased(const mx::array& keys, const BatchSequence& s, const Attending& w, const KvFormat& format) const {
    const int held = keys.shape(2);
    const mx::array biases = mx::broadcast_to(key_bias(w), {1, w.spec.n_kv_heads, held, w.spec.key_dim});
    return mx::add(turned(keys, format.rotates_keys()), rotate(biases, mx::array(s.position + s.n - held), w));
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
  /// `positions`: of the first row of each of x's entries.
  static mx::array rotate(const mx::array& x, const mx::array& positions, const Attending& w) {
    const Rope& rope = *w.spec.rope;
    const auto& [periods, magnitudes] = w.angles;
    if (rope.dims == 0) return x;
    return mx::fast::rope(magnitudes ? mx::multiply(x, *magnitudes) : x, rope.dims, rope.traditional, std::nullopt, 1.0f,
                          positions, periods);
  }
  /// [B, 1, n, 1]
  mx::array query_factors(const QueryScale& scale, const Block& block) const {
    std::vector<float> factors;
    for (const BatchSequence& s : block) {
      for (int t = 0; t < s.n; ++t) factors.push_back(scale.at(s.position + t));
    }
    return mx::astype(mx::array(factors.data(), {int(block.size()), 1, block.front().n, 1}, mx::float32), dtype_);
  }
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const BatchSequence& s,
                   const Attending& w) const {
    const Attention& spec = w.spec;
    const int window = spec.window, length = s.position + s.n;
    if (spec.softcap == 0 && (window == 0 || length <= window)) {
      return mx::fast::scaled_dot_product_attention(q, k, v, spec.scale, s.n > 1 ? "causal" : "", std::nullopt,
                                                    w.sinks);
    }
    const mx::array at = mx::expand_dims(mx::arange(s.position, length, mx::int32), 1);
    const mx::array key = mx::expand_dims(mx::arange(length - k.shape(2), length, mx::int32), 0);
    mx::array mask = mx::less_equal(key, at);
    if (window != 0) mask = mx::logical_and(mask, mx::greater(key, mx::subtract(at, mx::array(window))));
    if (spec.softcap != 0) return attend_capped(q, k, v, mask, spec);
    return mx::fast::scaled_dot_product_attention(q, k, v, spec.scale, "array", mask, w.sinks);
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

std::vector<Block> blocks_of(const Batch& batch) {
  std::vector<Block> blocks;
  for (Block rest = batch.sequences; !rest.empty(); rest = rest.subspan(blocks.back().size())) {
    const auto longer = std::ranges::find_if(rest, [](const BatchSequence& s) { return s.n > 1; });
    blocks.push_back(rest.first(size_t(std::max<ptrdiff_t>(longer - rest.begin(), 1))));
  }
  return blocks;
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
