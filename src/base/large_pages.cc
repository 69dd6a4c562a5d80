#include "base/large_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>

#include "base/parallel.h"

namespace torpor {

void prefer_large_pages([[maybe_unused]] std::vector<std::span<std::byte>> buffers) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096, kLargePage = uintptr_t(2) << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which Debian 12's headers lack
  std::sort(buffers.begin(), buffers.end(), [](const auto& a, const auto& b) { return a.data() < b.data(); });
  for (size_t i = 0; i < buffers.size();) {
    const auto begin = reinterpret_cast<uintptr_t>(buffers[i].data());
    uintptr_t end = begin;
    // What an allocator keeps for itself between two buffers is less than a page.
    for (; i < buffers.size() && (end == begin || reinterpret_cast<uintptr_t>(buffers[i].data()) - end < 2 * kPage); ++i) {
      end = reinterpret_cast<uintptr_t>(buffers[i].data() + buffers[i].size());
    }
    const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage, last = end / kLargePage * kLargePage;
    if (first >= last) continue;
    ::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    // Where the allocator has written a header there is a small page already, and a large one does not come by itself.
    parallel_for((last - first) / kLargePage, reader_threads(), [&](size_t page) {
      ::madvise(reinterpret_cast<void*>(first + page * kLargePage), kLargePage, kCollapse);
    });
  }
#endif
}

}  // namespace torpor
