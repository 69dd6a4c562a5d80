#include "base/large_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <new>
#include <string>

#include "base/parallel.h"

namespace torpor {

namespace {

/// The large pages that lie in `memory` whole.
[[maybe_unused]] std::span<std::byte> whole_pages(std::span<std::byte> memory) {
  const auto begin = reinterpret_cast<uintptr_t>(memory.data()), end = begin + memory.size();
  const uintptr_t first = (begin + kLargePage - 1) / kLargePage * kLargePage, last = end / kLargePage * kLargePage;
  return first < last ? memory.subspan(first - begin, last - first) : std::span<std::byte>();
}

}  // namespace

void expect_large_pages([[maybe_unused]] std::span<std::byte> memory) {
#ifdef MADV_HUGEPAGE
  if (const auto pages = whole_pages(memory); !pages.empty()) ::madvise(pages.data(), pages.size(), MADV_HUGEPAGE);
#endif
}

void prefer_large_pages([[maybe_unused]] std::span<std::byte> buffer) {
#ifdef MADV_HUGEPAGE
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which Debian 12's headers lack
  const auto pages = whole_pages(buffer);
  if (pages.empty()) return;
  expect_large_pages(pages);
  // Where an allocator has used the memory there are small pages already, and large ones do not come by themselves.
  parallel_for(pages.size() / kLargePage, reader_threads(),
               [&](size_t page) { ::madvise(pages.data() + page * kLargePage, kLargePage, kCollapse); });
#endif
}

uint64_t physical_memory() { return uint64_t(::sysconf(_SC_PHYS_PAGES)) * uint64_t(::sysconf(_SC_PAGESIZE)); }

uint64_t available_memory() {
  std::ifstream in("/proc/meminfo");
  for (std::string key, rest; in >> key; std::getline(in, rest)) {
    if (uint64_t kib = 0; key == "MemAvailable:" && in >> kib) return kib * 1024;
  }
  return physical_memory();
}

std::shared_ptr<std::byte> allocate_large_pages(size_t size) {
  constexpr std::align_val_t alignment{kLargePage};
  std::shared_ptr<std::byte> memory(static_cast<std::byte*>(::operator new(size, alignment)),
                                    [](std::byte* p) { ::operator delete(p, alignment); });
  expect_large_pages({memory.get(), size});
  return memory;
}

void forget_contents([[maybe_unused]] std::span<std::byte> memory) noexcept {
#ifdef MADV_FREE
  if (const auto pages = whole_pages(memory); !pages.empty()) ::madvise(pages.data(), pages.size(), MADV_FREE);
#endif
}

}  // namespace torpor
