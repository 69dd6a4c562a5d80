#include "torpor/cache.h"

#include "cache/dense.h"
#include "cache/segmented.h"
#include "torpor/error.h"

namespace torpor {

std::unique_ptr<KvCache> KvCache::create(const KvLayout& layout, Backend backend) {
  if (backend == Backend::kKernels) return std::make_unique<SegmentedKvCache>(layout);
  return std::make_unique<DenseKvCache>(layout);
}

std::unique_ptr<KvCache> KvCache::restore(const KvSnapshot& snapshot, Backend backend) {
  snapshot.validate();
  if (!snapshot.state.empty()) {
    throw Error(ErrorCode::kIncompatible, "The agent holds state '" + snapshot.state[0].name +
                                              "', which Torpor's engine does not have; load it with whatever saved it.");
  }
  if (backend == Backend::kKernels) return SegmentedKvCache::restore(snapshot);
  return DenseKvCache::restore(snapshot);
}

void KvCache::truncate(int n_tokens) {
  if (n_tokens < 0 || n_tokens > length_) {
    throw Error(ErrorCode::kInvalidArgument, "Can't cut a KV cache of " + std::to_string(length_) + " tokens to " +
                                                 std::to_string(n_tokens) + ".");
  }
  drop_rows(n_tokens);
  length_ = n_tokens;
  if (int(tokens_.size()) > n_tokens) tokens_.resize(size_t(n_tokens));
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

}  // namespace torpor
