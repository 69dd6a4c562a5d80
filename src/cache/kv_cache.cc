#include "torpor/cache.h"

#include <algorithm>

#include <mlx/allocator.h>

#include "cache/dense.h"
#include "cache/ledger.h"
#include "cache/segmented.h"
#include "torpor/error.h"

namespace torpor {

struct KvCache::Shares {
  std::vector<KvLedger::Share> of_buffers, of_states;
};

KvCache::KvCache(KvLayout layout, const KvFormat& format, StateLayout state_layout, std::vector<int32_t> tokens,
                 std::vector<std::shared_ptr<const StateCheckpoint>> states)
    : layout_(std::move(layout)), format_(format), tokens_(std::move(tokens)), length_(int(tokens_.size())),
      state_layout_(std::move(state_layout)), states_(std::move(states)), shares_(std::make_unique<Shares>()) {}

KvCache::~KvCache() = default;

std::unique_ptr<KvCache> KvCache::create(const KvLayout& layout, const KvFormat& format, Backend backend,
                                         const StateLayout& state_layout) {
  if (backend == Backend::kKernels) return std::make_unique<SegmentedKvCache>(layout, format, state_layout);
  return std::make_unique<DenseKvCache>(layout, format, state_layout);
}

std::unique_ptr<KvCache> KvCache::restore(const KvSnapshot& snapshot, Backend backend) {
  snapshot.validate();
  if (!snapshot.state.empty()) {
    throw Error(ErrorCode::kIncompatible, "The agent holds state '" + snapshot.state[0].name +
                                              "', which Torpor's engine does not have; load it with whatever saved it.")
        .with_field("state", "", snapshot.state[0].name);
  }
  // A name that no format has is refused by the model: the layout is of another.
  const KvFormat format = KvFormat::parse(snapshot.identity.kv).value_or(KvFormat());
  if (backend == Backend::kKernels) return SegmentedKvCache::restore(snapshot, format);
  return DenseKvCache::restore(snapshot, format);
}

void KvCache::truncate(int n_tokens) {
  if (n_tokens < 0 || n_tokens > length_) {
    throw Error(ErrorCode::kInvalidArgument, "Can't cut a KV cache of " + std::to_string(length_) + " tokens to " +
                                                 std::to_string(n_tokens) + ".");
  }
  if (resumable(n_tokens) != n_tokens) {
    throw Error(ErrorCode::kInvalidArgument, "Can't cut a KV cache to " + std::to_string(n_tokens) +
                                                 " tokens: no state of that position is held; cut it to " +
                                                 std::to_string(resumable(n_tokens)) + " and compute the rest again.");
  }
  drop_rows(n_tokens);
  cut_states(n_tokens);
  length_ = n_tokens;
  if (int(tokens_.size()) > n_tokens) tokens_.resize(size_t(n_tokens));
  recount();
}

bool KvCache::can_truncate(int n_tokens) const {
  return n_tokens <= length_ && resumable(n_tokens) == n_tokens && can_keep_rows(n_tokens);
}

size_t KvCache::growth(int rows) const {
  return row_growth(rows) + (rows > 0 && spare_ == nullptr ? state_layout_.bytes() : 0);
}

void KvCache::grow(int rows) {
  grow_rows(rows);
  if (rows > 0) take_spare();
}

std::vector<KvCache::HeldBuffer> KvCache::buffers() const {
  std::vector<HeldBuffer> held;
  for (size_t i = 0; i < n_buffers(); ++i) held.push_back(buffer(i));
  for (const void* state : state_buffers()) held.push_back({state, state_layout_.bytes(), false});
  return held;
}

void KvCache::count_in(std::shared_ptr<KvLedger> ledger) {
  shares_->of_buffers.clear();
  shares_->of_states.clear();
  ledger_ = std::move(ledger);
  recount();
  recount_states();
}

void KvCache::share_with(KvCache& copy) const {
  copy.length_ = length_;
  copy.states_ = states_;
  copy.live_kept_ = live_kept_;
  copy.live_buffer_ = live_buffer_;
  copy.count_in(ledger_);
}

void KvCache::recount(size_t first, size_t end) {
  if (ledger_ == nullptr) return;
  std::vector<KvLedger::Share>& shares = shares_->of_buffers;
  const size_t n = n_buffers();
  shares.resize(n);
  for (size_t i = first; i < std::min(n, end); ++i) {
    const HeldBuffer held = buffer(i);
    if (!shares[i].is(held.data, held.bytes, held.mapped)) shares[i] = {ledger_, held.data, held.bytes, held.mapped};
  }
}

void KvCache::recount_states() {
  if (ledger_ == nullptr) return;
  // What was counted is let go of last, so that nothing is counted as gone in between.
  std::vector<KvLedger::Share> shares;
  for (const void* state : state_buffers()) shares.emplace_back(ledger_, state, state_layout_.bytes(), false);
  shares_->of_states = std::move(shares);
}

size_t KvCache::nbytes() const {
  size_t bytes = 0;
  for (const HeldBuffer& buffer : buffers()) bytes += buffer.bytes;
  return bytes;
}

CacheValidation KvCache::validate() const {
  if (int(tokens_.size()) != length_) {
    return {false, "it has rows for " + std::to_string(length_) + " tokens but " + std::to_string(tokens_.size()) +
                       " token ids"};
  }
  if (!state_layout_.empty() && (states_.empty() ? 0 : states_.back()->position()) != length_) {
    return {false, "it has no state after its " + std::to_string(length_) + " tokens"};
  }
  return validate_buffers();
}

int get_cache_size(const KvCache& cache) { return cache.length(); }

size_t get_cache_memory(const KvCache& cache) { return cache.nbytes(); }

CacheValidation validate_cache_structure(const KvCache& cache, const KvLayout* expected) {
  if (expected != nullptr) {
    const auto& have = cache.layout().tensors;
    const auto& want = expected->tensors;
    if (have.size() != want.size()) {
      return {false, "it has " + std::to_string(have.size()) + " tensors, the model has " +
                         std::to_string(want.size())};
    }
    for (size_t i = 0; i < have.size(); ++i) {
      if (have[i].name != want[i].name) {
        return {false, "its tensor " + std::to_string(i) + " is " + have[i].name + ", the model's is " + want[i].name};
      }
      if (have[i].dtype != want[i].dtype) {
        return {false, have[i].name + " is " + kv_dtype_name(have[i].dtype) + ", expected " +
                           kv_dtype_name(want[i].dtype)};
      }
      if (have[i].n_kv_heads != want[i].n_kv_heads || have[i].dim != want[i].dim) {
        return {false, have[i].name + " has " + std::to_string(have[i].n_kv_heads) + " heads of " +
                           std::to_string(have[i].dim) + ", expected " + std::to_string(want[i].n_kv_heads) +
                           " of " + std::to_string(want[i].dim)};
      }
    }
  }
  return cache.validate();
}

std::shared_ptr<std::byte> mlx_buffer(size_t size) {
  mx::allocator::Buffer buffer{nullptr};
  try {
    buffer = mx::allocator::allocator().malloc(size);
  } catch (const std::exception&) {
  }
  if (buffer.ptr() == nullptr) {
    throw Error(ErrorCode::kResourceExhausted,
                "Out of memory for a KV buffer of " + std::to_string(size) + " bytes; let other agents sleep first.");
  }
  // MLX's allocators may be used, and their buffers freed, from any thread.
  return {static_cast<std::byte*>(buffer.raw_ptr()), [buffer](std::byte*) { mx::allocator::allocator().free(buffer); }};
}

}  // namespace torpor
