#include "cache/dense.h"

#include <cstring>
#include <string_view>

#include <mlx/mlx.h>
#include <mlx/primitives.h>

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

/// Words of 4 bits, scales and biases of `rows`, which are rotated. Of several ranges about the middle of each group,
/// that whose error is least, as the CPU kernels do it.
std::vector<mx::array> quantize_rotated(const mx::array& rows, int group, mx::Dtype dtype) {
  const auto number = [](float value) { return mx::array(value); };
  const mx::array x = mx::unflatten(mx::astype(rows, mx::float32), -1, {-1, group});
  const mx::array low = mx::min(x, -1, true), high = mx::max(x, -1, true);
  const mx::array middle = mx::multiply(mx::add(low, high), number(0.5f));
  const mx::array reach = mx::multiply(mx::subtract(high, low), number(0.5f));
  const auto as_stored = [&](const mx::array& a) { return mx::astype(mx::astype(a, dtype), mx::float32); };
  std::vector<mx::array> best;  // levels, scales, biases, errors
  for (int part = 16; part >= 12; --part) {
    const mx::array half = mx::multiply(reach, number(float(part) / 16));
    const mx::array scale = mx::maximum(as_stored(mx::multiply(half, number(2.0f / 15))), number(1e-7f));
    const mx::array bias = as_stored(mx::subtract(middle, half));
    const mx::array level = mx::clip(mx::round(mx::divide(mx::subtract(x, bias), scale)), number(0), number(15));
    const mx::array error = mx::sum(mx::square(mx::subtract(mx::add(mx::multiply(level, scale), bias), x)), -1, true);
    const std::vector<mx::array> found = {level, scale, bias, error};
    if (best.empty()) {
      best = found;
      continue;
    }
    const mx::array better = mx::less(error, best[3]);
    for (size_t i = 0; i < best.size(); ++i) best[i] = mx::where(better, found[i], best[i]);
  }
  const mx::array levels = mx::unflatten(mx::flatten(mx::astype(best[0], mx::uint32), -2, -1), -1, {-1, 8});
  const mx::array shifts = mx::multiply(mx::arange(8, mx::uint32), mx::array(uint32_t(4)));
  return {mx::sum(mx::left_shift(levels, shifts), -1), mx::squeeze(best[1], -1), mx::squeeze(best[2], -1)};
}

int round_up(int n) { return (n + kSegmentTokens - 1) / kSegmentTokens * kSegmentTokens; }

}  // namespace

std::span<const KvBuffer> DenseKvCache::reserve(int) {
  throw Error(ErrorCode::kInternal,
              "A dense KV cache was given to the CPU kernels; it serves MLX's own attention only.");
}

void DenseKvCache::add_tensor(mx::array tensor, int first) {
  tensors_.push_back(std::move(tensor));
  storage_.push_back(std::make_shared<char>());
  first_.push_back(first);
}

void DenseKvCache::make_tensors() {
  if (!tensors_.empty()) return;
  for (const KvTensorSpec& spec : layout_.tensors)
    add_tensor(mx::zeros({1, spec.n_kv_heads, 0, spec.dim}, to_mlx(spec.dtype)), 0);
}

int DenseKvCache::capacity_for(size_t t, int rows) const {
  return round_up(length_ + rows) - (tensors_.empty() ? 0 : first_[t]);  // first_ is where a segment begins
}

size_t DenseKvCache::row_growth(int rows) const {
  size_t bytes = 0;
  for (size_t t = 0; t < layout_.tensors.size() && rows > 0; ++t) {
    // An array that a clone has too is copied by whoever appends first.
    const int held = tensors_.empty() ? 0 : tensors_[t].shape(2),
              kept = held > 0 && storage_[t].use_count() > 1 ? 0 : held;
    bytes += layout_.tensors[t].bytes_per_token() * size_t(std::max(held, capacity_for(t, rows)) - kept);
  }
  return bytes;
}

void DenseKvCache::grow_rows(int rows) {
  if (rows <= 0) return;
  make_tensors();
  for (size_t t = 0; t < tensors_.size(); ++t) grow_tensor(t, rows);
}

void DenseKvCache::grow_tensor(size_t t, int rows) {
  const KvTensorSpec& spec = layout_.tensors[t];
  const int held = tensors_[t].shape(2), capacity = capacity_for(t, rows);
  const bool shared = storage_[t].use_count() > 1;
  if (!shared && held >= capacity) return;
  if (shared) storage_[t] = std::make_shared<char>();
  if (held < capacity) {
    const mx::array room = mx::zeros({1, spec.n_kv_heads, capacity - held, spec.dim}, to_mlx(spec.dtype));
    tensors_[t] = mx::concatenate({tensors_[t], room}, 2);
  }
  recount(t, t + 1);
}

mx::array DenseKvCache::append(size_t tensor, const mx::array& rows) {
  const KvTensorSpec& spec = layout_.tensors[tensor];
  if (spec.dtype != KvDtype::kU32) return append_part(tensor, rows);
  const int dim = rows.shape(3), bits = spec.dim * 32 / dim, group = dim / layout_.tensors[tensor + 1].dim;
  const bool rotated = format_.rotated && bits == 4;
  const std::vector<mx::array> quantized =
      rotated ? quantize_rotated(rows, group, to_mlx(format_.dtype)) : mx::quantize(rows, group, bits);
  const mx::array words = append_part(tensor, quantized[0]);
  const mx::array scales = append_part(tensor + 1, quantized[1]), biases = append_part(tensor + 2, quantized[2]);
  return mx::dequantize(words, mx::astype(scales, rows.dtype()), mx::astype(biases, rows.dtype()), group, bits);
}

mx::array DenseKvCache::append_part(size_t tensor, const mx::array& rows) {
  const KvTensorSpec& spec = layout_.tensors[tensor];
  grow_tensor(tensor, rows.shape(2));
  const int begin = length_ - first_[tensor], end = begin + rows.shape(2);
  tensors_[tensor] = mx::slice_update(tensors_[tensor], mx::astype(rows, to_mlx(spec.dtype)), mx::Shape{0, 0, begin, 0},
                                      mx::Shape{1, spec.n_kv_heads, end, spec.dim});
  return mx::slice(tensors_[tensor], {0, 0, 0, 0}, {1, spec.n_kv_heads, end, spec.dim});
}

std::pair<mx::array, mx::array> DenseKvCache::update_and_fetch(int layer, const mx::array& k, const mx::array& v) {
  make_tensors();
  const size_t parts = layout_.tensors.front().dtype == KvDtype::kU32 ? 3 : 1;
  const size_t first = layout_.first_of(layer, 2 * parts);
  mx::array keys = append(first, k);
  mx::array values = append(first + parts, v);
  return {std::move(keys), std::move(values)};
}

// An array that was evaluated has the rows held in their places, whatever is behind them. One that was not is a graph
// over an earlier one of as many dims, its first input; or it is new rows alone, where none were held.
void DenseKvCache::abandon() {
  for (size_t t = 0; t < tensors_.size(); ++t) {
    while (tensors_[t].status() == mx::array::Status::unscheduled) {
      const std::string_view made_by = tensors_[t].has_primitive() ? tensors_[t].primitive().name() : "";
      const int dim = layout_.tensors[t].dim;
      if ((made_by == "SliceUpdate" || made_by == "Concatenate") && tensors_[t].inputs().front().shape(-1) == dim) {
        tensors_[t] = mx::array(tensors_[t].inputs().front());
      } else {
        tensors_[t] = mx::zeros({1, layout_.tensors[t].n_kv_heads, 0, dim}, tensors_[t].dtype());
        break;  // computed with the next pass: memory may be short now
      }
    }
  }
  recount();
}

std::unique_ptr<DenseKvCache> DenseKvCache::restore(const KvSnapshot& snapshot, const KvFormat& format) {
  auto cache = std::make_unique<DenseKvCache>(snapshot.layout, format, snapshot.state_layout, snapshot.tokens,
                                             snapshot.states);
  if (cache->length_ == 0) return cache;
  // Memory that is no mapping would be held twice. But rows that were not read can't be copied.
  for (const auto& run : snapshot.sealed) {
    cache->sealed_.push_back(run->mapped() || !covers(run->checked(), {}) ? run : nullptr);
  }
  for (size_t t = 0; t < snapshot.layout.tensors.size(); ++t) {
    const KvTensorSpec& spec = snapshot.layout.tensors[t];
    const int begin = cache->first_needed(t), capacity = round_up(cache->length_) - begin;
    mx::array tensor = mx::zeros({1, spec.n_kv_heads, capacity, spec.dim}, to_mlx(spec.dtype));
    tensor.eval();
    auto* to = reinterpret_cast<std::byte*>(tensor.data<uint8_t>());
    const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
    int first = begin;
    for (size_t i = size_t(begin / kSegmentTokens); i < snapshot.n_runs(); ++i) {
      const int n = snapshot.run_tokens(i), from_rows = snapshot.run_capacity(i);
      const std::byte* from = snapshot.run_bytes(i).data() + snapshot.layout.offset(t, from_rows);
      for (int head = 0; head < spec.n_kv_heads; ++head) {
        std::memcpy(to + (size_t(head) * capacity + (first - begin)) * row, from + size_t(head) * from_rows * row,
                    size_t(n) * row);
      }
      first += n;
    }
    cache->add_tensor(std::move(tensor), begin);
  }
  return cache;
}

std::unique_ptr<KvCache> DenseKvCache::clone() const {
  // Arrays are values: the first append of either copy makes its own buffer.
  auto copy = std::make_unique<DenseKvCache>(layout_, format_, state_layout(), tokens_);
  copy->tensors_ = tensors_;
  copy->storage_ = storage_;
  copy->first_ = first_;
  copy->sealed_ = sealed_;
  share_with(*copy);
  return copy;
}

int DenseKvCache::first_needed(size_t t) const {
  size_t run = 0;
  while (run < sealed_.size() && sealed_[run] != nullptr &&
         !KvLayout::attended(layout_.tensors[t], int64_t(run) * kSegmentTokens, kSegmentTokens, length_)) {
    ++run;
  }
  return int(run) * kSegmentTokens;
}

bool DenseKvCache::can_keep_rows(int n_tokens) const {
  for (size_t t = 0; t < tensors_.size(); ++t) {
    if (first_[t] > std::max(0, n_tokens - layout_.tensors[t].window)) return false;
  }
  return true;
}

// Rows past the length are overwritten by the next append.
void DenseKvCache::drop_rows(int n_tokens) {
  if (const size_t sealed = size_t(n_tokens / kSegmentTokens); sealed_.size() > sealed) sealed_.resize(sealed);
}

void DenseKvCache::replace_run(int i, std::shared_ptr<const SealedRun> run) {
  if (sealed_.size() <= size_t(i)) sealed_.resize(size_t(i) + 1);
  sealed_[size_t(i)] = std::move(run);
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const int first = first_needed(t), behind = first - first_[t];
    if (behind <= 0) continue;
    const mx::array& tensor = tensors_[t];
    tensors_[t] = mx::contiguous(mx::slice(tensor, {0, 0, behind, 0}, tensor.shape()));
    mx::eval({tensors_[t]});
    storage_[t] = std::make_shared<char>();
    first_[t] = first;
  }
  recount();
}

// Not by the array, which every append replaces, nor by its memory, which is there only once it is evaluated.
KvCache::HeldBuffer DenseKvCache::buffer(size_t i) const { return {storage_[i].get(), tensors_[i].nbytes(), false}; }

KvSnapshot DenseKvCache::snapshot(const Identity& identity, bool) const {
  KvSnapshot snapshot{.identity = identity, .layout = layout_, .tokens = tokens_, .state_layout = state_layout(),
                      .states = {states().begin(), states().end()}};
  if (length_ > 0) mx::eval(tensors_);
  for (int first = 0; first < length_; first += kSegmentTokens) {
    if (const size_t i = size_t(first / kSegmentTokens); i < sealed_.size() && sealed_[i] != nullptr) {
      snapshot.sealed.push_back(sealed_[i]);
      continue;
    }
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
        std::memcpy(to + size_t(head) * n * row, from + head * head_stride + size_t(first - first_[t]) * row,
                    size_t(n) * row);
      }
    }
    snapshot.add_run(n, {buffer.get(), size}, buffer);
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
        first_[t] + tensor.shape(2) < length_ || tensor.shape(3) != spec.dim) {
      return {false, "the shape of " + spec.name + " is not [1, " + std::to_string(spec.n_kv_heads) + ", " +
                         std::to_string(length_ - first_[t]) + " or more, " + std::to_string(spec.dim) + "]"};
    }
    if (tensor.dtype() != to_mlx(spec.dtype)) {
      return {false, spec.name + " is not of dtype " + kv_dtype_name(spec.dtype)};
    }
  }
  return {};
}

}  // namespace torpor
