#include "kernels/weight_memory.h"

#include <algorithm>
#include <mutex>

#include "base/large_pages.h"
#include "kernels/packed_layout.h"

namespace torpor::kernels {
namespace {

constexpr size_t kBlock = size_t{32} << 20;

class PlainMemory final : public WeightMemory {
 public:
  Place take(size_t size, const std::string&) override { return {allocate_weights(size), false}; }
  void filled(const Place&, size_t) override {}
};

}  // namespace

WeightMemory& WeightMemory::plain() {
  static PlainMemory memory;
  return memory;
}

std::shared_ptr<std::byte> allocate_weights(size_t size) {
  static std::mutex mutex;
  static std::weak_ptr<std::byte> current;  // its tensors keep it
  static size_t used = 0, capacity = 0;
  size = (size + kAlignment - 1) / kAlignment * kAlignment;
  const std::lock_guard lock(mutex);
  std::shared_ptr<std::byte> block = current.lock();
  if (block == nullptr || size > capacity - used) {
    capacity = std::max(kBlock, (size + kLargePage - 1) / kLargePage * kLargePage);
    block = allocate_large_pages(capacity);
    current = block;
    used = 0;
  }
  std::byte* data = block.get() + used;
  used += size;
  return {std::move(block), data};
}

}  // namespace torpor::kernels
