#include "kernels/weight_memory.h"

#include <algorithm>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels/packed_layout.h"

namespace torpor::kernels {
namespace {

constexpr size_t kLargePage = size_t{2} << 20, kBlock = size_t{32} << 20;

std::shared_ptr<std::byte> allocate_block(size_t size) {
  constexpr std::align_val_t alignment{kLargePage};
  std::shared_ptr<std::byte> block(static_cast<std::byte*>(::operator new(size, alignment)),
                                   [](std::byte* p) { ::operator delete(p, alignment); });
#ifdef MADV_HUGEPAGE
  // Not prefer_large_pages, which would provide the whole block now: what is never written is to take no memory.
  ::madvise(block.get(), size, MADV_HUGEPAGE);
#endif
  return block;
}

}  // namespace

std::shared_ptr<std::byte> allocate_weights(size_t size) {
  static std::mutex mutex;
  static std::weak_ptr<std::byte> current;  // its tensors keep it
  static size_t used = 0, capacity = 0;
  size = (size + kAlignment - 1) / kAlignment * kAlignment;
  const std::lock_guard lock(mutex);
  std::shared_ptr<std::byte> block = current.lock();
  if (block == nullptr || size > capacity - used) {
    capacity = std::max(kBlock, (size + kLargePage - 1) / kLargePage * kLargePage);
    block = allocate_block(capacity);
    current = block;
    used = 0;
  }
  std::byte* data = block.get() + used;
  used += size;
  return {std::move(block), data};
}

}  // namespace torpor::kernels
