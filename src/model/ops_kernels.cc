/// The layer vocabulary over Torpor's CPU kernels: f32 activations, weights packed.

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include <mlx/ops.h>

#include "kernels/primitives.h"
#include "model/key_rows.h"
#include "model/ops.h"
#include "model/weight_source.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using kernels::PackedLinear;
using kernels::WeightSource;

/// What is packed is not read again.
void release(std::initializer_list<const Projection*> projections) {
  for (const Projection* p : projections) {
    if (p->memory != nullptr) continue;
    release_pages(p->weight);
    if (p->scales) release_pages(*p->scales);
    if (p->biases) release_pages(*p->biases);
  }
}

struct Linear final : Ops::Packed {
  explicit Linear(std::shared_ptr<const PackedLinear> w) : w(std::move(w)) {}
  std::shared_ptr<const PackedLinear> w;
};

struct Norm final : Ops::Packed {
  Norm(mx::array w, bool centred) : w(std::move(w)), centred(centred) {}
  mx::array w;  // f32
  bool centred;
};

struct Gated final : Ops::Packed {
  Gated(std::shared_ptr<const PackedLinear> w, kernels::Activation activation) : w(std::move(w)), activation(activation) {}
  std::shared_ptr<const PackedLinear> w;
  kernels::Activation activation;
};

struct Mixture final : Ops::Packed {
  std::shared_ptr<const PackedLinear> router;
  std::shared_ptr<const kernels::Moe> experts;
};

struct Recurring final : Ops::Packed {
  std::shared_ptr<const PackedLinear> projection;
  std::shared_ptr<const kernels::Recurrent> cell;
};

/// Of latent attention. `projections` are the queries' and the latents'.
struct LatentParts {
  std::shared_ptr<const PackedLinear> query_features;
  Ops::Weight norm, query_norm;
  std::shared_ptr<const kernels::HeadWeights> into, out;
};

struct Attending final : Ops::Packed {
  Attention spec;
  std::optional<LatentParts> latent;
  // q, k and v side by side; or those that there are, apart, where something comes between.
  std::vector<std::shared_ptr<const PackedLinear>> projections;
  bool apart = false;
  std::vector<float> key_bias;  // as projected, for formats that leave it out of the rows
  Ops::Weight q_norm, k_norm;
  std::vector<float> sinks;
  std::optional<mx::array> ones;  // the weight of the values' norm
  // Made when first needed: the kernel's spec for each format of rows, and for those that rotate keys, norms with
  // pair_factors.
  mutable std::vector<std::pair<KvFormat, std::shared_ptr<const kernels::AttentionSpec>>> of_format;
  mutable std::vector<float> even_q_norm, even_k_norm;
};

const float* values(const Ops::Weight& norm) { return static_cast<const Norm&>(*norm).w.data<float>(); }
const std::shared_ptr<const PackedLinear>& packed(const Ops::Weight& w) { return static_cast<const Linear&>(*w).w; }

class KernelOps final : public Ops {
 public:
  KernelOps(float eps, Activations activations, kernels::WeightMemory& resident, kernels::WeightMemory& experts)
      : eps_(eps), activations_(activations), resident_(resident), experts_(experts) {}

  Weight pack_linear(const Projection& p) override {
    auto weight = std::make_shared<Linear>(PackedLinear::pack({source(p)}, activations_, resident_));
    release({&p});
    return weight;
  }
  Weight pack_attention(const Attention& spec, const Projection& q, const Projection* k, const Projection* v,
                        Weight q_norm, Weight k_norm, std::vector<float> sinks) override {
    if (spec.key_dim != spec.value_dim) {
      throw Error(ErrorCode::kInternal, "The kernels attend to keys and values of one size.");
    }
    auto weight = std::make_shared<Attending>();
    weight->spec = spec;
    weight->apart = spec.qk_norm == QkNorm::kWhole || spec.value_norm || v == nullptr;
    if (weight->apart) {
      for (const Projection* p : {&q, k, v}) {
        if (p != nullptr) weight->projections.push_back(PackedLinear::pack({source(*p)}, activations_, resident_));
      }
    } else {
      weight->projections = {PackedLinear::pack({source(q), source(*k), source(*v)}, activations_, resident_)};
    }
    if (k != nullptr && k->bias) weight->key_bias = key_bias_of(*k->bias, k->neighbour_heads);
    if (spec.value_norm) {
      const std::vector<float> ones(size_t(spec.value_dim), 1);
      weight->ones = mx::array(ones.data(), {spec.value_dim}, mx::float32);
    }
    weight->q_norm = std::move(q_norm);
    weight->k_norm = std::move(k_norm);
    weight->sinks = std::move(sinks);
    release({&q});
    for (const Projection* p : {k, v}) {
      if (p != nullptr) release({p});
    }
    return weight;
  }
  Weight pack_recurrent(kernels::Recurrent cell, const std::vector<Projection>& projections) override {
    std::vector<WeightSource> sources;
    for (const Projection& p : projections) sources.push_back(source(p));
    auto weight = std::make_shared<Recurring>();
    weight->projection = PackedLinear::pack(sources, activations_, resident_);
    weight->cell = std::make_shared<const kernels::Recurrent>(std::move(cell));
    for (const Projection& p : projections) release({&p});
    return weight;
  }
  Weight pack_latent_attention(const Attention& spec, const LatentProjections& projections, Weight norm,
                               Weight query_norm) override {
    const auto packed = [&](const Projection& p) {
      auto weight = PackedLinear::pack({source(p)}, activations_, resident_);
      release({&p});
      return weight;
    };
    const auto heads = [&](const std::vector<Projection>& of_heads) {
      kernels::HeadWeights all;
      for (const Projection& p : of_heads) all.push_back(packed(p));
      return std::make_shared<const kernels::HeadWeights>(std::move(all));
    };
    auto weight = std::make_shared<Attending>();
    weight->spec = spec;
    weight->projections = {packed(projections.query), packed(projections.latents)};
    weight->latent = LatentParts{.query_features = nullptr,
                                 .norm = std::move(norm), .query_norm = std::move(query_norm),
                                 .into = heads(projections.into), .out = heads(projections.out)};
    if (projections.query_features) weight->latent->query_features = packed(*projections.query_features);
    return weight;
  }
  Weight pack_gated(const Projection& gate, const Projection& up, Activation activation) override {
    auto weight = std::make_shared<Gated>(
        PackedLinear::pack_gated(source(gate), source(up), activations_, resident_),
        activation == Activation::kSilu ? kernels::Activation::kSilu : kernels::Activation::kGeluTanh);
    release({&gate, &up});
    return weight;
  }
  Weight pack_experts(const Experts& spec, const ExpertProjections& projections) override {
    using Activation = kernels::ExpertActivation;
    const auto packed = [&](const Projection* gate, const Projection& up, const Projection& down, kernels::WeightMemory& memory) {
      std::shared_ptr<const PackedLinear> first;
      if (gate == nullptr) {
        first = PackedLinear::pack({source(up)}, activations_, memory);
      } else if (spec.activation == Activation::kClampedSwiGlu) {
        first = PackedLinear::pack({source(*gate), source(up)}, activations_, memory);
      } else {
        first = PackedLinear::pack_gated(source(*gate), source(up), activations_, memory);
      }
      kernels::Expert expert{std::move(first), PackedLinear::pack({source(down)}, activations_, memory)};
      release({&up, &down});
      if (gate != nullptr) release({gate});
      return expert;
    };
    const bool gated = spec.activation != Activation::kRelu2;
    const auto& [router, gates, ups, downs, shared, shared_gate] = projections;
    kernels::Moe moe{.routing = spec.routing, .activation = spec.activation, .limit = spec.limit};
    for (size_t e = 0; e < ups.size(); ++e) {
      moe.experts.push_back(packed(gated ? &gates[e] : nullptr, ups[e], downs[e], experts_));
    }
    if (!shared.empty()) moe.shared = packed(gated ? &shared[0] : nullptr, shared[shared.size() - 2], shared.back(), resident_);
    if (shared_gate) moe.shared_gate = PackedLinear::pack({source(*shared_gate)}, Activations::kF32, resident_);
    auto weight = std::make_shared<Mixture>();
    weight->router = PackedLinear::pack({source(router)}, Activations::kF32, resident_);
    weight->experts = std::make_shared<const kernels::Moe>(std::move(moe));
    release({&router});
    return weight;
  }
  Weight pack_norm(const TensorView& weight, float plus, bool centred) override {
    std::vector<float> values = to_floats(weight);
    for (float& value : values) value += plus;
    return std::make_shared<Norm>(mx::array(values.data(), {int(values.size())}, mx::float32), centred);
  }

  mx::array embedding(const std::vector<int32_t>& tokens, const Weight& w) override {
    return kernels::embedding(mx::array(tokens.data(), {int(tokens.size())}, mx::int32), packed(w));
  }
  mx::array norm(const mx::array& x, const Weight& w) override {
    const auto& own = static_cast<const Norm&>(*w);
    if (!own.centred) return kernels::rms_norm(x, own.w, eps_);
    const mx::array mean = mx::mean(x, 1, /*keepdims=*/true, mx::Device::cpu);
    return kernels::rms_norm(mx::subtract(x, mean, mx::Device::cpu), own.w, eps_);
  }
  mx::array attention(const mx::array& x, const Weight& weight, int layer, Batch& batch) override {
    // A layer's keys and its values are one tensor each, or words, scales and biases.
    const size_t parts = batch.kv_format.quantized() ? 3 : 1, first = batch.kv_layout->first_of(layer, 2 * parts);
    const auto offset = [&](size_t which, size_t part) {
      return batch.kv_layout->offset(first + which * parts + part, kSegmentTokens);
    };
    kernels::SequenceRuns at{.key_offset = offset(0, 0), .value_offset = offset(1, 0)};
    if (parts == 3) {
      at.key_scale_offset = offset(0, 1);
      at.key_bias_offset = offset(0, 2);
      at.value_scale_offset = offset(1, 1);
      at.value_bias_offset = offset(1, 2);
    }
    std::vector<kernels::SequenceRuns> sequences;
    for (const BatchSequence& s : batch.sequences) {
      const size_t used = (size_t(s.position) + s.n + kSegmentTokens - 1) / kSegmentTokens;
      at.row = s.row;
      at.n = s.n;
      at.position = s.position;
      at.runs.assign(s.runs.begin(), s.runs.begin() + used);
      sequences.push_back(at);
    }
    const auto& w = static_cast<const Attending&>(*weight);
    const mx::array rows = w.latent ? latent_rows(x, w, batch) : project(x, w, layer, batch);
    const mx::array out = kernels::attention(rows, spec_for(w, batch.kv_format), std::move(sequences));
    return w.latent ? kernels::heads_linear(out, w.latent->out) : out;
  }
  mx::array recurrent(const mx::array& x, const Weight& weight, size_t offset, Batch& batch) override {
    const auto& w = static_cast<const Recurring&>(*weight);
    std::vector<kernels::RecurrentSequence> sequences;
    for (const BatchSequence& s : batch.sequences) {
      const std::byte* state = s.state == nullptr ? nullptr : s.state + offset;
      sequences.push_back({.row = s.row, .n = s.n, .state = reinterpret_cast<const float*>(state),
                           .next = reinterpret_cast<float*>(s.next_state + offset)});
    }
    return kernels::recurrent(kernels::linear(x, w.projection), w.cell, std::move(sequences));
  }
  mx::array gate(const mx::array& x, const mx::array& gates) override { return kernels::gate(x, gates); }
  mx::array linear_add(const mx::array& x, const Weight& w, const mx::array& residual) override {
    return kernels::linear_add(x, packed(w), residual);
  }
  mx::array linear(const mx::array& x, const Weight& w) override { return kernels::linear(x, packed(w)); }
  mx::array gated(const mx::array& x, const Weight& w) override {
    const auto& gated = static_cast<const Gated&>(*w);
    return kernels::gated_linear(x, gated.w, gated.activation);
  }
  mx::array experts(const mx::array& x, const mx::array& routed, const Weight& w) override {
    const auto& mixture = static_cast<const Mixture&>(*w);
    return kernels::moe(x, kernels::linear(routed, mixture.router), mixture.experts);
  }
  mx::array head(const mx::array& x, const Weight& w) override { return kernels::linear(x, packed(w)); }

  mx::Device device() const override { return mx::Device::cpu; }
  std::span<const KvBuffer> reserve(KvAccess& kv, int n) override {
    const std::span<const KvBuffer> runs = kv.reserve(n);
    if (runs.size() * size_t(kSegmentTokens) < size_t(kv.length()) + size_t(n)) {
      throw Error(ErrorCode::kInternal, "A KV cache made less room than was asked for.");
    }
    return runs;
  }
  bool advances_per_chunk() const override { return false; }

 private:
  /// q, k and v side by side: [M, (H_q + 2 H_kv) D].
  mx::array project(const mx::array& x, const Attending& w, int layer, Batch& batch) {
    mx::array rows = kernels::linear(x, w.projections[0]);
    if (w.apart) {
      if (w.spec.qk_norm == QkNorm::kWhole) rows = norm(rows, w.q_norm);
      // A layer that reads another's rows writes them again: the same projections give the same bits.
      const mx::array lent = w.spec.reads_rows_of ? batch.lent.at(layer).front() : keys_and_values(x, w);
      if (w.spec.lends_rows) batch.lent.insert_or_assign(layer, std::vector{lent});
      rows = mx::concatenate({rows, lent}, 1, mx::Device::cpu);
    }
    return w.spec.query_scale ? scale_queries(rows, w.spec, batch) : rows;
  }
  /// [M, 2 H_kv D]
  mx::array keys_and_values(const mx::array& x, const Attending& w) {
    const auto shaped = [](const mx::array& rows, mx::Shape shape) {
      return mx::reshape(rows, std::move(shape), mx::Device::cpu);
    };
    mx::array keys = kernels::linear(x, w.projections[1]);
    mx::array values = w.spec.keys_are_values ? keys : kernels::linear(x, w.projections[2]);
    if (w.spec.qk_norm == QkNorm::kWhole) keys = norm(keys, w.k_norm);
    if (w.spec.value_norm) {
      const mx::array heads = shaped(values, {-1, w.spec.value_dim});
      values = shaped(kernels::rms_norm(heads, *w.ones, eps_), {x.shape(0), w.spec.values_size()});
    }
    return mx::concatenate({keys, values}, 1, mx::Device::cpu);
  }
  /// Queries, absorbed, and the row that all heads share: [M, (H + 1) (latents + rotating dims)].
  mx::array latent_rows(const mx::array& x, const Attending& w, const Batch& batch) {
    const mx::Device cpu = mx::Device::cpu;
    const Attention& spec = w.spec;
    const int m = x.shape(0), heads = spec.n_heads, plain = spec.latent->plain_dim, rest = spec.value_dim;
    const auto normed = [&](const mx::array& rows, const Weight& norm) {
      return kernels::rms_norm(rows, static_cast<const Norm&>(*norm).w, spec.latent->norm_eps);
    };
    const LatentParts& parts = *w.latent;
    mx::array queries = parts.query_features == nullptr
                            ? kernels::linear(x, w.projections[0])
                            : kernels::linear(normed(kernels::linear(x, parts.query_features), parts.query_norm),
                                              w.projections[0]);
    if (spec.query_scale) queries = scale_rows(queries, *spec.query_scale, batch);
    queries = mx::reshape(queries, {m, heads, plain + rest}, cpu);
    mx::array meeting = mx::slice(queries, {0, 0, 0}, {m, heads, plain}, cpu);
    meeting = mx::reshape(meeting, {m, heads * plain}, cpu);
    const mx::array rotating = mx::slice(queries, {0, 0, plain}, {m, heads, plain + rest}, cpu);
    const mx::array absorbed = mx::reshape(kernels::heads_linear(meeting, parts.into), {m, heads, spec.key_dim}, cpu);
    const mx::array whole = mx::reshape(mx::concatenate({absorbed, rotating}, 2, cpu), {m, -1}, cpu);
    const mx::array shared = kernels::linear(x, w.projections[1]);
    const mx::array latents = normed(mx::slice(shared, {0, 0}, {m, spec.key_dim}, cpu), parts.norm);
    const mx::array turning = mx::slice(shared, {0, spec.key_dim}, {m, spec.key_dim + rest}, cpu);
    return mx::concatenate({whole, latents, turning}, 1, cpu);
  }
  /// RoPE is linear, so what scales queries may do so before it.
  static mx::array scale_rows(const mx::array& rows, const QueryScale& scale, const Batch& batch) {
    std::vector<float> factors(batch.tokens.size());
    for (const BatchSequence& s : batch.sequences) {
      for (int t = 0; t < s.n; ++t) factors[size_t(s.row + t)] = scale.at(s.position + t);
    }
    if (std::ranges::all_of(factors, [](float factor) { return factor == 1; })) return rows;
    return mx::multiply(rows, mx::array(factors.data(), {rows.shape(0), 1}, mx::float32), mx::Device::cpu);
  }
  static mx::array scale_queries(const mx::array& rows, const Attention& spec, const Batch& batch) {
    const int m = rows.shape(0), q = spec.query_size();
    const mx::array queries = scale_rows(mx::slice(rows, {0, 0}, {m, q}, mx::Device::cpu), *spec.query_scale, batch);
    return mx::concatenate({queries, mx::slice(rows, {0, q}, {m, rows.shape(1)}, mx::Device::cpu)}, 1, mx::Device::cpu);
  }
  std::shared_ptr<const kernels::AttentionSpec> spec_for(const Attending& w, const KvFormat& format) const {
    for (const auto& [of, known] : w.of_format) {
      if (of == format) return known;
    }
    auto made = std::make_shared<kernels::AttentionSpec>();
    const Rope& rope = *w.spec.rope;
    made->n_heads = w.spec.n_heads;
    made->n_kv_heads = w.spec.n_kv_heads;
    made->head_dim = w.latent ? w.spec.key_dim + w.spec.value_dim : w.spec.key_dim;
    made->latent = w.latent ? w.spec.key_dim : 0;
    made->scale = w.spec.scale;
    made->window = w.spec.window;
    made->softcap = w.spec.softcap;
    made->sinks = w.sinks.empty() ? nullptr : w.sinks.data();
    if (w.spec.qk_norm == QkNorm::kHeads) {
      const bool even = format.rotates_keys() && w.spec.evens_keys();
      if (even) even_norms(rope, w);
      made->q_norm = even ? w.even_q_norm.data() : values(w.q_norm);
      made->k_norm = even ? w.even_k_norm.data() : values(w.k_norm);
    }
    made->norm_eps = eps_;
    made->kv_dtype = format.dtype;
    made->kv_bits = format.bits;
    made->kv_group = format.group;
    made->key_bias = format.bias_free && w.spec.key_bias() ? w.key_bias.data() : nullptr;
    made->rotate_keys = format.rotates_keys();
    made->rotate_values = format.rotates_values();
    made->rope = {
        .dims = rope.dims, .traditional = rope.traditional, .inv_freq = rope.inv_freq, .magnitude = rope.magnitude};
    w.of_format.emplace_back(format, made);
    return made;
  }
  static void even_norms(const Rope& rope, const Attending& w) {
    if (!w.even_k_norm.empty()) return;
    const auto floats = [](const Ops::Weight& norm) {
      const mx::array& values = static_cast<const Norm&>(*norm).w;
      return std::vector<float>(values.data<float>(), values.data<float>() + values.size());
    };
    w.even_q_norm = floats(w.q_norm);
    w.even_k_norm = floats(w.k_norm);
    const std::vector<float> factors = pair_factors(rope, w.even_q_norm, w.even_k_norm);
    for (size_t i = 0; i < factors.size(); ++i) {
      w.even_q_norm[i] *= factors[i];
      w.even_k_norm[i] /= factors[i];
    }
  }

  const float eps_;
  const Activations activations_;
  kernels::WeightMemory &resident_, &experts_;
};

}  // namespace

std::unique_ptr<Ops> make_kernel_ops(float eps, Activations activations, kernels::WeightMemory& resident,
                                     kernels::WeightMemory& experts) {
  return std::make_unique<KernelOps>(eps, activations, resident, experts);
}

}  // namespace torpor::model
