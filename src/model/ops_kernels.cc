/// The layer vocabulary over Torpor's CPU kernels: f32 activations, weights packed.

#include <algorithm>
#include <cmath>
#include <map>

#include <mlx/ops.h>

#include "kernels/primitives.h"
#include "model/ops.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using kernels::PackedLinear;
using kernels::WeightSource;

WeightSource::Type source_type(const TensorView& tensor) {
  if (tensor.dtype == "F32") return WeightSource::Type::kF32;
  if (tensor.dtype == "F16") return WeightSource::Type::kF16;
  return WeightSource::Type::kBF16;
}

WeightSource source(const Projection& p) {
  WeightSource source;
  source.n = p.n;
  source.k = p.k;
  source.weight = p.weight->data;
  if (p.quantization) {
    source.type = WeightSource::Type::kAffine;
    source.bits = p.quantization->bits;
    source.group = p.quantization->group;
    source.scale_type = source_type(*p.scales);
    source.scales = p.scales->data;
    source.biases = p.biases->data;
  } else {
    source.type = source_type(*p.weight);
  }
  if (p.bias != nullptr) {
    source.bias = p.bias->data;
    source.bias_type = source_type(*p.bias);
  }
  return source;
}

struct Linear final : Ops::Packed {
  explicit Linear(std::shared_ptr<const PackedLinear> w) : w(std::move(w)) {}
  std::shared_ptr<const PackedLinear> w;
};

struct Norm final : Ops::Packed {
  explicit Norm(mx::array w) : w(std::move(w)) {}
  mx::array w;  // f32
};

const std::shared_ptr<const PackedLinear>& linear(const Ops::Weight& w) { return static_cast<const Linear&>(*w).w; }

class KernelOps final : public Ops {
 public:
  explicit KernelOps(const ModelConfig& config) : config_(config) {}

  Weight pack_linear(const Projection& p) override { return std::make_shared<Linear>(PackedLinear::pack({source(p)})); }
  Weight pack_qkv(const Projection& q, const Projection& k, const Projection& v) override {
    return std::make_shared<Linear>(PackedLinear::pack({source(q), source(k), source(v)}));
  }
  Weight pack_gated(const Projection& gate, const Projection& up) override {
    return std::make_shared<Linear>(PackedLinear::pack_gated(source(gate), source(up)));
  }
  Weight pack_norm(const TensorView& weight) override {
    const int n = int(weight.shape[0]);
    std::vector<float> values(static_cast<size_t>(n));
    const auto convert = [&](const auto* from) { std::copy(from, from + n, values.begin()); };
    switch (source_type(weight)) {
      case WeightSource::Type::kF32: convert(reinterpret_cast<const float*>(weight.data)); break;
      case WeightSource::Type::kF16: convert(reinterpret_cast<const mx::float16_t*>(weight.data)); break;
      default: convert(reinterpret_cast<const mx::bfloat16_t*>(weight.data));
    }
    return std::make_shared<Norm>(mx::array(values.data(), {n}, mx::float32));
  }

  mx::array embedding(const std::vector<int32_t>& tokens, const Weight& w) override {
    return kernels::embedding(mx::array(tokens.data(), {int(tokens.size())}, mx::int32), linear(w));
  }
  mx::array rms_norm(const mx::array& x, const Weight& w) override {
    return kernels::rms_norm(x, static_cast<const Norm&>(*w).w, config_.rms_norm_eps);
  }
  mx::array attention(const mx::array& x, const Weight& qkv, int layer, const Batch& batch) override {
    const KvLayout& layout = *batch.kv_layout;
    std::vector<kernels::SequenceRuns> sequences;
    for (const BatchSequence& s : batch.sequences) {
      const size_t used = (size_t(s.position) + s.n + kSegmentTokens - 1) / kSegmentTokens;
      sequences.push_back({.row = s.row, .n = s.n, .position = s.position,
                           .runs = {s.runs.begin(), s.runs.begin() + used},
                           .key_offset = layout.offset(size_t(2 * layer), kSegmentTokens),
                           .value_offset = layout.offset(size_t(2 * layer + 1), kSegmentTokens)});
    }
    return kernels::attention(kernels::linear(x, linear(qkv)), attention_spec(layer, layout.tensors.front().dtype), std::move(sequences));
  }
  mx::array linear_add(const mx::array& x, const Weight& w, const mx::array& residual) override {
    return kernels::linear_add(x, linear(w), residual);
  }
  mx::array gated(const mx::array& x, const Weight& w) override {
    return kernels::gated_linear(x, linear(w), kernels::Activation::kSilu);
  }
  mx::array head(const mx::array& x, const Weight& w) override { return kernels::linear(x, linear(w)); }

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
  /// One spec serves all layers of equal window and dtype.
  std::shared_ptr<const kernels::AttentionSpec> attention_spec(int layer, KvDtype dtype) {
    const int window = config_.windows[size_t(layer)];
    auto& spec = specs_[{window, dtype}];
    if (spec == nullptr) {
      auto made = std::make_shared<kernels::AttentionSpec>();
      made->n_heads = config_.n_heads;
      made->n_kv_heads = config_.n_kv_heads;
      made->head_dim = config_.head_dim;
      made->scale = 1 / std::sqrt(float(config_.head_dim));
      made->window = window;
      made->kv_dtype = dtype;
      made->rope = {.dims = config_.rope.dims, .traditional = config_.rope.traditional, .inv_freq = config_.rope.inv_freq};
      spec = std::move(made);
    }
    return spec;
  }

  const ModelConfig config_;
  std::map<std::pair<int, KvDtype>, std::shared_ptr<const kernels::AttentionSpec>> specs_;
};

}  // namespace

std::unique_ptr<Ops> make_kernel_ops(const ModelConfig& config) {
  return std::make_unique<KernelOps>(config);
}

}  // namespace torpor::model
