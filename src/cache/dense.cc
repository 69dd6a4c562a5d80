#include "cache/dense.h"

#include <cstring>

#include <mlx/mlx.h>

#include "torpor/error.h"

namespace torpor {
namespace {

mx::Dtype to_mlx(KvDtype dtype) {
  switch (dtype) {
    case KvDtype::kF32: return mx::float32;
    case KvDtype::kF16: return mx::float16;
    case KvDtype::kBF16: return mx::bfloat16;
    case KvDtype::kU32: return mx::uint32;
  }
  throw Error(ErrorCode::kInternal, "A KV tensor has a dtype MLX does not know.");
}

int round_up(int n) { return (n + kSegmentTokens - 1) / kSegmentTokens * kSegmentTokens; }

}  // namespace

std::span<const KvBuffer> DenseKvCache::reserve(int) {
  throw Error(ErrorCode::kInternal, "A dense KV cache was given to the CPU kernels; it serves MLX's own attention only.");
}

mx::array DenseKvCache::append(size_t tensor, const mx::array& rows) {
  const KvTensorSpec& spec = layout_.tensors[tensor];
  const int end = length_ + rows.shape(2);
  if (tensors_[tensor].shape(2) < end) {
    make_room(spec.bytes_per_token() * size_t(round_up(end) - tensors_[tensor].shape(2)));
    const mx::array room =
        mx::zeros({1, spec.n_kv_heads, round_up(end) - tensors_[tensor].shape(2), spec.dim}, to_mlx(spec.dtype));
    tensors_[tensor] = mx::concatenate({tensors_[tensor], room}, 2);
  }
  tensors_[tensor] = mx::slice_update(tensors_[tensor], mx::astype(rows, to_mlx(spec.dtype)), mx::Shape{0, 0, length_, 0},
                                      mx::Shape{1, spec.n_kv_heads, end, spec.dim});
  return mx::slice(tensors_[tensor], {0, 0, 0, 0}, {1, spec.n_kv_heads, end, spec.dim});
}

std::pair<mx::array, mx::array> DenseKvCache::update_and_fetch(int layer, const mx::array& k, const mx::array& v) {
  if (tensors_.empty()) {
    for (const KvTensorSpec& spec : layout_.tensors) {
      tensors_.push_back(mx::zeros({1, spec.n_kv_heads, 0, spec.dim}, to_mlx(spec.dtype)));
    }
  }
  mx::array keys = append(size_t(2 * layer), k);
  mx::array values = append(size_t(2 * layer + 1), v);
  return {std::move(keys), std::move(values)};
}

std::unique_ptr<DenseKvCache> DenseKvCache::restore(const KvSnapshot& snapshot) {
  auto cache = std::make_unique<DenseKvCache>(snapshot.layout, snapshot.tokens);
  if (cache->length_ == 0) return cache;
  const int capacity = round_up(cache->length_);
  for (size_t t = 0; t < snapshot.layout.tensors.size(); ++t) {
    const KvTensorSpec& spec = snapshot.layout.tensors[t];
    mx::array tensor = mx::zeros({1, spec.n_kv_heads, capacity, spec.dim}, to_mlx(spec.dtype));
    tensor.eval();
    auto* to = reinterpret_cast<std::byte*>(tensor.data<uint8_t>());
    const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
    int first = 0;
    for (const KvRun& run : snapshot.runs) {
      const std::byte* from = run.bytes.data() + snapshot.layout.offset(t, run.n_tokens);
      for (int head = 0; head < spec.n_kv_heads; ++head) {
        std::memcpy(to + (size_t(head) * capacity + first) * row, from + size_t(head) * run.n_tokens * row,
                    size_t(run.n_tokens) * row);
      }
      first += run.n_tokens;
    }
    cache->tensors_.push_back(std::move(tensor));
  }
  return cache;
}

std::unique_ptr<KvCache> DenseKvCache::clone() const {
  // Arrays are values: the first append of either copy makes its own buffer.
  auto copy = std::make_unique<DenseKvCache>(layout_, tokens_);
  copy->length_ = length_;
  copy->tensors_ = tensors_;
  return copy;
}

// Rows past the length are overwritten by the next append.
void DenseKvCache::drop_rows(int) {}

std::vector<KvCache::HeldBuffer> DenseKvCache::buffers() const {
  // By the array's identity: nothing is evaluated in the middle of a forward pass.
  std::vector<HeldBuffer> held;
  for (const mx::array& tensor : tensors_) held.push_back({reinterpret_cast<const void*>(tensor.id()), tensor.nbytes(), false});
  return held;
}

KvSnapshot DenseKvCache::snapshot(const Identity& identity) const {
  KvSnapshot snapshot{identity, layout_, tokens_, {}};
  if (length_ > 0) mx::eval(tensors_);
  for (int first = 0; first < length_; first += kSegmentTokens) {
    const int n = std::min(kSegmentTokens, length_ - first);
    const size_t size = layout_.offset(layout_.tensors.size(), n);
    const std::shared_ptr<std::byte> buffer = allocate_heap_buffer(size);
    for (size_t t = 0; t < tensors_.size(); ++t) {
      const KvTensorSpec& spec = layout_.tensors[t];
      const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
      const auto* from = reinterpret_cast<const std::byte*>(tensors_[t].data<uint8_t>());
      const auto head_stride = size_t(tensors_[t].strides(1)) * kv_dtype_size(spec.dtype);
      std::byte* to = buffer.get() + layout_.offset(t, n);
      for (int head = 0; head < spec.n_kv_heads; ++head) {
        std::memcpy(to + size_t(head) * n * row, from + head * head_stride + size_t(first) * row, size_t(n) * row);
      }
    }
    snapshot.runs.push_back({n, {buffer.get(), size}, buffer});
  }
  snapshot.validate();
  return snapshot;
}

CacheValidation DenseKvCache::validate_buffers() const {
  if (length_ > 0 && tensors_.size() != layout_.tensors.size()) {
    return {false, "it has " + std::to_string(tensors_.size()) + " tensors, its layout " +
                       std::to_string(layout_.tensors.size())};
  }
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const KvTensorSpec& spec = layout_.tensors[t];
    const mx::array& tensor = tensors_[t];
    if (tensor.ndim() != 4 || tensor.shape(0) != 1 || tensor.shape(1) != spec.n_kv_heads ||
        tensor.shape(2) < length_ || tensor.shape(3) != spec.dim) {
      return {false, "the shape of " + spec.name + " is not [1, " + std::to_string(spec.n_kv_heads) + ", " +
                         std::to_string(length_) + " or more, " + std::to_string(spec.dim) + "]"};
    }
    if (tensor.dtype() != to_mlx(spec.dtype)) {
      return {false, spec.name + " is not of dtype " + kv_dtype_name(spec.dtype)};
    }
  }
  return {};
}

}  // namespace torpor
