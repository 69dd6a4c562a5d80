#pragma once
/// A checkpoint's projection as the kernels pack it.

#include "kernels/packed_linear.h"
#include "model/projection.h"

namespace torpor::model {

inline kernels::WeightSource::Type source_type(const TensorView& tensor) {
  if (tensor.dtype == "F32") return kernels::WeightSource::Type::kF32;
  if (tensor.dtype == "F16") return kernels::WeightSource::Type::kF16;
  return kernels::WeightSource::Type::kBF16;
}

inline kernels::WeightSource::Type source_type(Quantization::Mode mode) {
  switch (mode) {
    case Quantization::Mode::kMxfp4: return kernels::WeightSource::Type::kMxfp4;
    case Quantization::Mode::kMxfp8: return kernels::WeightSource::Type::kMxfp8;
    case Quantization::Mode::kNvfp4: return kernels::WeightSource::Type::kNvfp4;
    default: return kernels::WeightSource::Type::kAffine;
  }
}

inline kernels::WeightSource source(const Projection& p) {
  kernels::WeightSource source;
  source.n = p.n;
  source.k = p.k;
  source.weight = p.weight.data;
  source.blocks = p.blocks;
  source.neighbour_heads = p.neighbour_heads;
  if (p.blocks) {
    // What they are, blocks say.
  } else if (p.quantization) {
    source.type = source_type(p.quantization->mode);
    source.bits = p.quantization->bits;
    source.group = p.quantization->group;
    source.scales = p.scales->data;
    if (p.biases) {
      source.scale_type = source_type(*p.scales);
      source.biases = p.biases->data;
    }
  } else {
    source.type = source_type(p.weight);
  }
  if (p.bias) {
    source.bias = p.bias->data;
    source.bias_type = source_type(*p.bias);
  }
  return source;
}

}  // namespace torpor::model
