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
  if (backend == Backend::kKernels) return SegmentedKvCache::restore(snapshot);
  return DenseKvCache::restore(snapshot);
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
