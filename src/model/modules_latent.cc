/// The modules of latent attention: as mlx-lm keeps them, absorbed, or as they were trained.

#include <cstring>

#include "model/modules.h"
#include "model/weight_source.h"

namespace torpor::model {
namespace {

/// [k, n] of [n, k], in f32: a quantized matrix has its groups along k.
Projection transposed(const Projection& p) {
  const auto packed = kernels::PackedLinear::pack({source(p)});
  std::vector<float> row(size_t(p.k));
  const size_t size = size_t(p.n) * size_t(p.k);
  const std::shared_ptr<std::byte[]> memory(new std::byte[size * sizeof(float)]);
  for (int i = 0; i < p.n; ++i) {
    packed->dequantize_row(i, row.data());
    for (int j = 0; j < p.k; ++j) {
      std::memcpy(memory.get() + (size_t(j) * size_t(p.n) + size_t(i)) * sizeof(float), &row[size_t(j)], sizeof(float));
    }
  }
  const TensorView weight{.name = p.weight.name, .dtype = "F32", .shape = {p.k, p.n}, .data = memory.get(),
                          .nbytes = size * sizeof(float)};
  return {.n = p.k, .k = p.n, .weight = weight, .memory = {memory, memory.get()}};
}

}  // namespace

Ops::Weight Modules::latent_attention(int index) const {
  const ModelConfig& c = checkpoint_.config;
  const Attention& spec = c.layers[size_t(index)].attention;
  const Latent& latent = *spec.latent;
  const std::string name = layer_name(index) + ".self_attn.", at = c.weight_prefix + name;
  const int heads = spec.n_heads, rank = spec.key_dim, plain = latent.plain_dim, out = latent.output_dim;
  const int queries = heads * (plain + spec.value_dim);
  LatentProjections parts;
  parts.latents = projection(name + "kv_a_proj_with_mqa", rank + spec.value_dim, c.hidden_size, latent.bias);
  Ops::Weight query_norm;
  if (latent.query_rank != 0) {
    parts.query_features = projection(name + "q_a_proj", latent.query_rank, c.hidden_size, latent.bias);
    parts.query = projection(name + "q_b_proj", queries, latent.query_rank);
    query_norm = norm(name + "q_a_layernorm", latent.query_rank);
  } else {
    parts.query = projection(name + "q_proj", queries, c.hidden_size);
  }
  if (checkpoint_.weights.find(at + "embed_q.weight") != nullptr) {
    parts.into = find_stacked(checkpoint_.weights, c, at + "embed_q", heads, rank, plain, false);
    parts.out = find_stacked(checkpoint_.weights, c, at + "unembed_out", heads, out, rank, false);
  } else {
    // Of each head, what makes a key of a latent, and then what makes a value.
    const Projection both = projection(name + "kv_b_proj", heads * (plain + out), rank);
    for (int h = 0; h < heads; ++h) {
      parts.into.push_back(transposed(rows_of(both, h * (plain + out), plain)));
      parts.out.push_back(rows_of(both, h * (plain + out) + plain, out));
    }
  }
  return ops_.pack_latent_attention(spec, parts, norm(name + "kv_a_layernorm", rank), query_norm);
}

}  // namespace torpor::model
