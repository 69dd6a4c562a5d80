#include "agents/eviction.h"

#include <algorithm>

namespace torpor {
namespace {

class Lru final : public EvictionPolicy {
 public:
  size_t choose(std::span<const Evictable> candidates) const override {
    const auto older = [](const Evictable& a, const Evictable& b) { return a.last_used < b.last_used; };
    return size_t(std::min_element(candidates.begin(), candidates.end(), older) - candidates.begin());
  }
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru() { return std::make_unique<Lru>(); }

}  // namespace torpor
