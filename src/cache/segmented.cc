#include "cache/segmented.h"

#include <cstring>

#include "torpor/error.h"

namespace torpor {

KvBuffer SegmentedKvCache::new_run() const {
  make_room(run_bytes());
  const std::shared_ptr<std::byte> buffer = mlx_buffer(run_bytes());
  return {buffer.get(), run_bytes(), buffer};
}

void SegmentedKvCache::copy_rows(const std::byte* from, int from_tokens, std::byte* to, int to_tokens, int n) const {
  for (const KvTensorSpec& tensor : layout_.tensors) {
    const size_t row = size_t(tensor.dim) * kv_dtype_size(tensor.dtype);
    for (int head = 0; head < tensor.n_kv_heads; ++head) {
      std::memcpy(to + size_t(head) * to_tokens * row, from + size_t(head) * from_tokens * row, size_t(n) * row);
    }
    from += tensor.bytes_per_token() * size_t(from_tokens);
    to += tensor.bytes_per_token() * size_t(to_tokens);
  }
}

std::unique_ptr<SegmentedKvCache> SegmentedKvCache::restore(const KvSnapshot& snapshot) {
  auto cache = std::make_unique<SegmentedKvCache>(snapshot.layout, snapshot.tokens);
  for (const KvRun& run : snapshot.runs) {
    // A full run is adopted as it is, for nobody writes it any more. The tail moves into a buffer with room to grow.
    if (run.n_tokens == kSegmentTokens) {
      cache->runs_.push_back({const_cast<std::byte*>(run.bytes.data()), run.bytes.size(), run.owner, run.mapped});
    } else {
      KvBuffer buffer = cache->new_run();
      cache->copy_rows(run.bytes.data(), run.n_tokens, buffer.data, kSegmentTokens, run.n_tokens);
      cache->runs_.push_back(std::move(buffer));
    }
  }
  return cache;
}

std::span<const KvBuffer> SegmentedKvCache::reserve(int n) {
  if (open_shared_) own_run(length_ / kSegmentTokens, length_ % kSegmentTokens);
  const size_t needed = (size_t(length_) + n + kSegmentTokens - 1) / kSegmentTokens;
  while (runs_.size() < needed) runs_.push_back(new_run());
  return {runs_.data(), needed};
}

std::pair<mx::array, mx::array> SegmentedKvCache::update_and_fetch(int, const mx::array&, const mx::array&) {
  throw Error(ErrorCode::kInternal, "A segmented KV cache was given to MLX's own attention; it serves the CPU kernels only.");
}

void SegmentedKvCache::own_run(int i, int open) {
  KvBuffer buffer = new_run();
  copy_rows(runs_[size_t(i)].data, kSegmentTokens, buffer.data, kSegmentTokens, open);
  runs_[size_t(i)] = std::move(buffer);
  open_shared_ = false;
}

bool SegmentedKvCache::can_truncate(int n_tokens) const {
  if (n_tokens > length_) return false;
  // Of a mapped run only those rows are certain to have been checked that could be attended all along.
  for (size_t i = 0; i < runs_.size(); ++i) {
    if (!runs_[i].mapped) continue;
    const int64_t first = int64_t(i) * kSegmentTokens;
    for (const KvTensorSpec& tensor : layout_.tensors) {
      if (first < n_tokens && KvLayout::attended(tensor, first, kSegmentTokens, n_tokens) &&
          !KvLayout::attended(tensor, first, kSegmentTokens, length_)) {
        return false;
      }
    }
  }
  return true;
}

std::unique_ptr<KvCache> SegmentedKvCache::clone() const {
  auto copy = std::make_unique<SegmentedKvCache>(layout_, tokens_);
  copy->length_ = length_;
  const int held = (length_ + kSegmentTokens - 1) / kSegmentTokens;
  copy->runs_.assign(runs_.begin(), runs_.begin() + held);
  copy->make_room_ = make_room_;
  copy->open_shared_ = open_shared_ = length_ % kSegmentTokens != 0;
  return copy;
}

void SegmentedKvCache::drop_rows(int n_tokens) {
  const int sealed_before = length_ / kSegmentTokens;
  const int keep = n_tokens / kSegmentTokens;
  const int open = n_tokens % kSegmentTokens;
  // A cut inside a sealed run, which others may share: the rows that stay move to a buffer of our own.
  if (open > 0 && keep < sealed_before) own_run(keep, open);
  runs_.erase(runs_.begin() + keep + (open > 0 ? 1 : 0), runs_.end());
  if (open == 0) open_shared_ = false;
}

size_t SegmentedKvCache::attended_bytes(size_t i) const {
  size_t bytes = 0;
  for (const KvTensorSpec& tensor : layout_.tensors) {
    if (KvLayout::attended(tensor, int64_t(i) * kSegmentTokens, kSegmentTokens, length_)) {
      bytes += tensor.bytes_per_token() * kSegmentTokens;
    }
  }
  return bytes;
}

std::vector<KvCache::HeldBuffer> SegmentedKvCache::buffers() const {
  std::vector<HeldBuffer> held;
  for (size_t i = 0; i < runs_.size(); ++i) {
    held.push_back({runs_[i].data, runs_[i].mapped ? attended_bytes(i) : run_bytes(), runs_[i].mapped});
  }
  return held;
}

void SegmentedKvCache::replace_run(int i, const KvRun& run) {
  if (i < 0 || (i + 1) * kSegmentTokens > length_ || run.n_tokens != kSegmentTokens || run.bytes.size() != run_bytes()) {
    throw Error(ErrorCode::kInternal, "Run " + std::to_string(i) + " of a KV cache can't be replaced: it is not sealed.");
  }
  runs_[size_t(i)] = {const_cast<std::byte*>(run.bytes.data()), run.bytes.size(), run.owner, run.mapped};
}

KvSnapshot SegmentedKvCache::snapshot(const Identity& identity) const {
  KvSnapshot snapshot{identity, layout_, tokens_, {}};
  const int sealed = length_ / kSegmentTokens;
  for (int i = 0; i < sealed; ++i) {
    snapshot.runs.push_back({kSegmentTokens, {runs_[i].data, run_bytes()}, runs_[i].owner, runs_[i].mapped});
  }
  if (const int open = length_ % kSegmentTokens; open > 0) {
    const size_t size = layout_.offset(layout_.tensors.size(), open);
    const std::shared_ptr<std::byte> tail = allocate_heap_buffer(size);
    copy_rows(runs_[sealed].data, kSegmentTokens, tail.get(), open, open);
    snapshot.runs.push_back({open, {tail.get(), size}, tail});
  }
  snapshot.validate();
  return snapshot;
}

CacheValidation SegmentedKvCache::validate_buffers() const {
  if (runs_.size() * kSegmentTokens < size_t(length_)) {
    return {false, std::to_string(runs_.size()) + " segments can't hold " + std::to_string(length_) + " tokens"};
  }
  for (size_t i = 0; i < runs_.size(); ++i) {
    if (runs_[i].size != run_bytes()) {
      return {false, "segment " + std::to_string(i) + " has " + std::to_string(runs_[i].size) +
                         " bytes, its layout needs " + std::to_string(run_bytes())};
    }
  }
  return {};
}

}  // namespace torpor
