#include "model/projection.h"

#include <cstring>
#include <limits>
#include <utility>

#include <mlx/types/half_types.h>

#include "torpor/error.h"

namespace torpor::model {
namespace {

using Mode = Quantization::Mode;

/// As mlx-lm has it: what the config says of this module, else what the shapes say.
Quantization quantization_of(const ModelConfig& config, const std::string& name, int k, const TensorView& weight,
                             const TensorView& scales) {
  const auto columns = [](const TensorView& tensor) { return tensor.shape.size() < 2 ? 0 : tensor.shape.back(); };
  const int64_t words = columns(weight), groups = columns(scales);
  if (weight.dtype != "U32" || words == 0 || groups == 0 || k % groups != 0 || words * 32 % k != 0) {
    throw Error(ErrorCode::kCorruption, "The quantized weight " + name + " has shape " + shape_text(weight.shape) +
                                            " and scales " + shape_text(scales.shape) +
                                            ", which do not fit each other.");
  }
  Quantization q{Mode::kAffine, int(words * 32 / k), int(k / groups)};
  const auto unsupported = [&](const std::string& what) {
    throw Error(ErrorCode::kInvalidArgument, "unsupported quantization of " + name + ": " + what);
  };
  // Scales of one byte are those of floats of few bits, each of which has one size.
  if (scales.dtype == "U8") {
    if (q.bits == 4 && q.group == 32) {
      q.mode = Mode::kMxfp4;
    } else if (q.bits == 8 && q.group == 32) {
      q.mode = Mode::kMxfp8;
    } else if (q.bits == 4 && q.group == 16) {
      q.mode = Mode::kNvfp4;
    } else {
      unsupported(std::to_string(q.bits) + " bits in groups of " + std::to_string(q.group) +
                  " with scales of one byte, supported: mxfp4, mxfp8, nvfp4.");
    }
  } else if (q.bits < 2 || q.bits > 8 || q.bits == 7 || (q.group != 32 && q.group != 64 && q.group != 128)) {
    unsupported(std::to_string(q.bits) + " bits in groups of " + std::to_string(q.group) +
                ", supported: 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128.");
  }
  if (const auto it = config.quantization.find(name); it != config.quantization.end() && it->second != q) {
    throw Error(ErrorCode::kCorruption, "The quantized weight " + name + " is not packed as config.json says.");
  }
  return q;
}

/// A matrix [n, columns], of `count` stacked ones one below the other.
TensorView matrix(const Weights& weights, const std::string& name, int count, int n, int64_t columns) {
  if (count == 0) {
    // llama.cpp writes a single row as a list.
    const TensorView* found = weights.find(name);
    const bool list = n == 1 && found != nullptr && found->shape == std::vector<int64_t>{columns};
    TensorView tensor = weights.get(name, list ? found->shape : std::vector<int64_t>{n, columns});
    tensor.shape = {n, columns};
    return tensor;
  }
  TensorView tensor = weights.get(name, {count, n / count, columns});
  tensor.shape = {n, columns};
  return tensor;
}

/// `n` rows, of all that are stacked; `count` is 0 where they are not.
Projection find(const Weights& weights, const ModelConfig& config, const std::string& name, int count, int n, int k,
                bool with_bias) {
  Projection p;
  p.n = n;
  p.k = k;
  if (const TensorView* scales = weights.find(name + ".scales"); scales != nullptr && config.quantized) {
    const TensorView* weight = weights.find(name + ".weight");
    if (weight == nullptr) matrix(weights, name + ".weight", count, n, k);  // says that it is missing
    p.quantization = quantization_of(config, name, k, *weight, *scales);
    const int64_t groups = k / p.quantization->group;
    p.weight = matrix(weights, name + ".weight", count, n, int64_t(k) * p.quantization->bits / 32);
    p.scales = matrix(weights, name + ".scales", count, n, groups);
    if (p.quantization->mode == Mode::kAffine) {
      p.biases = matrix(weights, name + ".biases", count, n, groups);
      require_float(*p.scales);
      if (p.biases->dtype != p.scales->dtype) {
        throw Error(ErrorCode::kCorruption, "The scales and biases of " + name + " differ in dtype.");
      }
    } else if (weights.find(name + ".global_scale") != nullptr) {
      throw Error(ErrorCode::kInvalidArgument, "unsupported quantization of " + name + ": it has a global_scale.");
    }
  } else {
    p.weight = matrix(weights, name + ".weight", count, n, k);
    const GgmlTypeInfo* type = find_ggml_type(p.weight.dtype);
    if (type != nullptr && type->columns > 1) {
      p.blocks = type->type;
    } else {
      require_float(p.weight);
    }
  }
  if (with_bias) {
    p.bias = weights.get(name + ".bias", count == 0 ? std::vector<int64_t>{n} : std::vector<int64_t>{count, n / count});
    p.bias->shape = {n};
    require_float(*p.bias);
  }
  return p;
}

}  // namespace

Projection find_projection(const Weights& weights, const ModelConfig& config, const std::string& name, int n, int k,
                           bool with_bias) {
  return find(weights, config, name, 0, n, k, with_bias);
}

std::vector<Projection> find_stacked(const Weights& weights, const ModelConfig& config, const std::string& name, int count,
                                     int n, int k, bool with_bias) {
  if (int64_t(count) * n > std::numeric_limits<int>::max()) {
    throw Error(ErrorCode::kInvalidArgument, "The experts' weight " + name + " has more rows than can be counted.");
  }
  const Projection all = find(weights, config, name, count, count * n, k, with_bias);
  std::vector<Projection> parts;
  for (int i = 0; i < count; ++i) parts.push_back(rows_of(all, i * n, n));
  return parts;
}

Projection rows_of(const Projection& p, int first, int n) {
  const auto cut = [&](TensorView tensor) {
    const size_t row = tensor.nbytes / size_t(p.n);
    tensor.data += size_t(first) * row;
    tensor.nbytes = size_t(n) * row;
    tensor.shape[0] = n;
    return tensor;
  };
  const auto cut_if = [&](const std::optional<TensorView>& tensor) {
    return tensor ? std::optional(cut(*tensor)) : std::nullopt;
  };
  return {.n = n, .k = p.k, .weight = cut(p.weight), .quantization = p.quantization, .scales = cut_if(p.scales),
          .biases = cut_if(p.biases), .bias = cut_if(p.bias), .blocks = p.blocks, .memory = p.memory};
}

Projection gathered_rows_of(const Projection& p, std::span<const RowRange> ranges) {
  Projection out = p;
  out.n = 0;
  for (const RowRange& range : ranges) out.n += range.n;
  const auto row_bytes = [&](const TensorView& tensor) { return tensor.nbytes / size_t(p.n); };
  std::vector<TensorView*> tensors{&out.weight};
  for (auto* tensor : {&out.scales, &out.biases, &out.bias}) {
    if (*tensor) tensors.push_back(&**tensor);
  }
  size_t size = 0;
  for (const TensorView* tensor : tensors) size += row_bytes(*tensor) * size_t(out.n);
  const std::shared_ptr<std::byte[]> memory(new std::byte[size]);
  std::byte* to = memory.get();
  for (TensorView* tensor : tensors) {
    const size_t row = row_bytes(*tensor);
    const std::byte* const from = std::exchange(tensor->data, to);
    for (const RowRange& range : ranges) {
      std::memcpy(to, from + size_t(range.first) * row, size_t(range.n) * row);
      to += size_t(range.n) * row;
    }
    tensor->nbytes = size_t(out.n) * row;
    tensor->shape[0] = out.n;
  }
  out.memory = {memory, memory.get()};
  return out;
}

void require_float(const TensorView& tensor) {
  if (tensor.dtype != "F32" && tensor.dtype != "F16" && tensor.dtype != "BF16") {
    throw Error(ErrorCode::kInvalidArgument,
                "unsupported dtype " + tensor.dtype + " of " + tensor.name + ", supported: F32, F16, BF16.");
  }
}

std::vector<float> to_floats(const TensorView& tensor) {
  const auto convert = [&](auto element) {
    std::vector<float> values(tensor.nbytes / sizeof(element));
    for (size_t i = 0; i < values.size(); ++i) {
      std::memcpy(&element, tensor.data + i * sizeof(element), sizeof(element));
      values[i] = float(element);
    }
    return values;
  };
  if (tensor.dtype == "F32") return convert(float());
  if (tensor.dtype == "F16") return convert(mlx::core::float16_t());
  if (tensor.dtype == "BF16") return convert(mlx::core::bfloat16_t());
  throw Error(ErrorCode::kInvalidArgument,
              "unsupported dtype " + tensor.dtype + " of " + tensor.name + ", supported: F32, F16, BF16.");
}

const TensorView& find_norm(const Weights& weights, const std::string& name, int k) {
  const TensorView& weight = weights.get(name + ".weight", {k});
  require_float(weight);
  return weight;
}

const std::string& activation_dtype(const Projection& embedding) {
  static const std::string bf16 = "BF16";  // as mx.dequantize has it where scales are bytes
  static const std::string f16 = "F16";    // as llama.cpp keeps its cache
  if (embedding.blocks) return f16;
  if (!embedding.quantization) return embedding.weight.dtype;
  return embedding.quantization->mode == Mode::kAffine ? embedding.scales->dtype : bf16;
}

}  // namespace torpor::model
