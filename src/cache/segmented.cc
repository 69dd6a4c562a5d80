#include "cache/segmented.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/large_pages.h"
#include "torpor/error.h"

namespace torpor {

KvBuffer SegmentedKvCache::new_run() const {
  const std::shared_ptr<std::byte> buffer = mlx_buffer(run_bytes());
  // A decoded token reads all runs, and memory in pages of 4 KiB is read more slowly. A few tokens touch each large
  // page of a run, so agents that never fill one go without.
  if (!runs_.empty()) prefer_large_pages({buffer.get(), run_bytes()});
  return {buffer.get(), run_bytes(), buffer};
}

KvBuffer SegmentedKvCache::buffer_of(const std::shared_ptr<const SealedRun>& run) {
  // Nobody writes a sealed run: the kernels take buffers that they may write to, and write to the open one only.
  return {const_cast<std::byte*>(run->bytes().data()), run->bytes().size(), run, run->mapped()};
}

void SegmentedKvCache::copy_rows(const std::byte* from, size_t size, int from_tokens, std::byte* to, int to_tokens,
                                 int n) const {
  const std::byte* const end = from + size;
  for (const KvTensorSpec& tensor : layout_.tensors) {
    if (from == end) return;
    const size_t row = size_t(tensor.dim) * kv_dtype_size(tensor.dtype);
    for (int head = 0; head < tensor.n_kv_heads; ++head) {
      std::memcpy(to + size_t(head) * to_tokens * row, from + size_t(head) * from_tokens * row, size_t(n) * row);
    }
    from += tensor.bytes_per_token() * size_t(from_tokens);
    to += tensor.bytes_per_token() * size_t(to_tokens);
  }
}

std::unique_ptr<SegmentedKvCache> SegmentedKvCache::restore(const KvSnapshot& snapshot, const KvFormat& format) {
  auto cache = std::make_unique<SegmentedKvCache>(snapshot.layout, format, snapshot.state_layout, snapshot.tokens,
                                                 snapshot.states);
  cache->sealed_ = snapshot.sealed;
  for (const auto& run : snapshot.sealed) cache->runs_.push_back(buffer_of(run));
  if (const KvTail& tail = snapshot.tail; tail.run != nullptr) {
    // Whoever keeps the snapshot keeps its rows: the first append then makes another buffer.
    cache->runs_.push_back({tail.run.get(), tail.bytes.size(), tail.run});
  } else if (tail.n_tokens > 0) {
    KvBuffer buffer = cache->new_run();
    cache->copy_rows(tail.bytes.data(), tail.bytes.size(), tail.n_tokens, buffer.data, kSegmentTokens, tail.n_tokens);
    cache->runs_.push_back(std::move(buffer));
  }
  return cache;
}

bool SegmentedKvCache::open_shared() const {
  const size_t open = size_t(length_ / kSegmentTokens);
  return length_ % kSegmentTokens != 0 && runs_[open].owner.use_count() > 1;
}

size_t SegmentedKvCache::row_growth(int rows) const {
  const size_t needed = size_t(length_ + rows + kSegmentTokens - 1) / kSegmentTokens;
  const size_t added = needed > runs_.size() ? needed - runs_.size() : 0;
  const size_t runs = added + (rows > 0 && open_shared() ? 1 : 0);
  return runs == 0 ? 0 : runs * run_bytes();
}

void SegmentedKvCache::grow_rows(int rows) {
  if (rows > 0 && open_shared()) {
    const int open = length_ / kSegmentTokens;
    own_run(open, length_ % kSegmentTokens);
    recount(size_t(open), size_t(open) + 1);
  }
  const size_t held = runs_.size(), needed = size_t(length_ + rows + kSegmentTokens - 1) / kSegmentTokens;
  while (runs_.size() < needed) runs_.push_back(new_run());
  if (runs_.size() > held) recount(held);
}

std::span<const KvBuffer> SegmentedKvCache::reserve(int n) {
  grow(n);
  return {runs_.data(), size_t(length_ + n + kSegmentTokens - 1) / kSegmentTokens};
}

std::pair<mx::array, mx::array> SegmentedKvCache::update_and_fetch(int, const mx::array&, const mx::array&) {
  throw Error(ErrorCode::kInternal,
              "A segmented KV cache was given to MLX's own attention; it serves the CPU kernels only.");
}

void SegmentedKvCache::advance(int n) {
  const int before = length_;
  KvCache::advance(n);
  while (sealed_.size() < size_t(length_ / kSegmentTokens)) {
    const KvBuffer& full = runs_[sealed_.size()];
    sealed_.push_back(std::make_shared<const SealedRun>(std::span<const std::byte>(full.data, full.size), full.owner));
  }
  // What a window has just left behind of mapped runs no longer counts.
  int last = 0;
  for (const KvTensorSpec& tensor : layout_.tensors) {
    if (tensor.window == std::exchange(last, tensor.window) || tensor.window == 0) continue;
    const auto first_attended = [&](int length) {
      return size_t(std::max(0, length - tensor.window) / kSegmentTokens);
    };
    if (first_attended(before) < first_attended(length_)) recount(first_attended(before), first_attended(length_));
  }
}

void SegmentedKvCache::own_run(int i, int open) {
  KvBuffer buffer = new_run();
  copy_rows(runs_[size_t(i)].data, runs_[size_t(i)].size, kSegmentTokens, buffer.data, kSegmentTokens, open);
  runs_[size_t(i)] = std::move(buffer);
}

bool SegmentedKvCache::can_keep_rows(int n_tokens) const {
  for (size_t i = 0; i < sealed_.size() && int(i) * kSegmentTokens < n_tokens; ++i) {
    const TensorMask& checked = sealed_[i]->checked();
    for (size_t t = 0; t < checked.size(); ++t) {
      if (!checked[t] && KvLayout::attended(layout_.tensors[t], int64_t(i) * kSegmentTokens, kSegmentTokens, n_tokens))
        return false;
    }
  }
  return true;
}

size_t SegmentedKvCache::cut_cost(int n_tokens) const {
  const int keep = n_tokens / kSegmentTokens, open = n_tokens % kSegmentTokens;
  size_t bytes = open != 0 && size_t(keep) < sealed_.size() ? run_bytes() : 0;
  // What windows had left behind of mapped runs counts again.
  for (size_t i = 0; i < size_t(keep); ++i) {
    if (runs_[i].mapped) bytes += attended_bytes(i, n_tokens) - attended_bytes(i, length_);
  }
  return bytes;
}

int SegmentedKvCache::spare_rows() const {
  if (!state_layout().empty()) return 0;
  const auto left_in_run = [](int row) { return kSegmentTokens - 1 - row % kSegmentTokens; };
  int rows = left_in_run(length_);
  for (const KvTensorSpec& tensor : layout_.tensors) {
    if (tensor.window > 0 && length_ >= tensor.window) rows = std::min(rows, left_in_run(length_ - tensor.window));
  }
  return rows;
}

std::unique_ptr<KvCache> SegmentedKvCache::clone() const {
  auto copy = std::make_unique<SegmentedKvCache>(layout_, format_, state_layout(), tokens_);
  const int held = (length_ + kSegmentTokens - 1) / kSegmentTokens;
  copy->runs_.assign(runs_.begin(), runs_.begin() + held);
  copy->sealed_ = sealed_;
  share_with(*copy);
  return copy;
}

void SegmentedKvCache::drop_rows(int n_tokens) {
  const int keep = n_tokens / kSegmentTokens;
  const int open = n_tokens % kSegmentTokens;
  // A cut inside a sealed run, which others may share: the rows that stay move to a buffer of our own.
  if (open > 0 && size_t(keep) < sealed_.size()) own_run(keep, open);
  sealed_.resize(std::min(sealed_.size(), size_t(keep)));
  runs_.erase(runs_.begin() + keep + (open > 0 ? 1 : 0), runs_.end());
}

size_t SegmentedKvCache::attended_bytes(size_t i, int length) const {
  size_t bytes = 0;
  for (const KvTensorSpec& tensor : layout_.tensors) {
    if (KvLayout::attended(tensor, int64_t(i) * kSegmentTokens, kSegmentTokens, length)) {
      bytes += tensor.bytes_per_token() * kSegmentTokens;
    }
  }
  return bytes;
}

KvCache::HeldBuffer SegmentedKvCache::buffer(size_t i) const {
  return {runs_[i].data, runs_[i].mapped ? attended_bytes(i, length_) : runs_[i].size, runs_[i].mapped};
}

void SegmentedKvCache::replace_run(int i, std::shared_ptr<const SealedRun> run) {
  const size_t size = run->bytes().size();
  if (i < 0 || size_t(i) >= sealed_.size() || (size != run_bytes() && size != layout_.together_bytes())) {
    throw Error(ErrorCode::kInternal,
                "Run " + std::to_string(i) + " of a KV cache can't be replaced: it is not sealed.");
  }
  runs_[size_t(i)] = buffer_of(run);
  sealed_[size_t(i)] = std::move(run);
  recount(size_t(i), size_t(i) + 1);
}

KvSnapshot SegmentedKvCache::snapshot(const Identity& identity, bool copy_tail) const {
  KvSnapshot snapshot{.identity = identity, .layout = layout_, .tokens = tokens_, .sealed = sealed_,
                      .state_layout = state_layout(), .states = {states().begin(), states().end()}};
  const int open = length_ % kSegmentTokens;
  if (open > 0 && !copy_tail) {
    const KvBuffer& run = runs_[sealed_.size()];
    const std::shared_ptr<std::byte> shared(std::const_pointer_cast<void>(run.owner), run.data);
    snapshot.tail = {open, {run.data, run.size}, shared, shared};
  } else if (open > 0) {
    const size_t size = layout_.offset(layout_.tensors.size(), open);
    const std::shared_ptr<std::byte> tail = allocate_heap_buffer(size);
    copy_rows(runs_[sealed_.size()].data, run_bytes(), kSegmentTokens, tail.get(), open, open);
    snapshot.tail = {open, {tail.get(), size}, tail};
  }
  snapshot.validate();
  return snapshot;
}

CacheValidation SegmentedKvCache::validate_buffers() const {
  if (runs_.size() * kSegmentTokens < size_t(length_)) {
    return {false, std::to_string(runs_.size()) + " segments can't hold " + std::to_string(length_) + " tokens"};
  }
  for (size_t i = 0; i < runs_.size(); ++i) {
    if (runs_[i].size != run_bytes() && (i >= sealed_.size() || runs_[i].size != layout_.together_bytes())) {
      return {false, "segment " + std::to_string(i) + " has " + std::to_string(runs_[i].size) +
                         " bytes, its layout needs " + std::to_string(run_bytes())};
    }
  }
  return {};
}

}  // namespace torpor
