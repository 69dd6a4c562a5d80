#pragma once
/// Memory whose end is a page's end, behind which no access is allowed: as of a mapped file that fills its last page.

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/weight_memory.h"

namespace torpor::testing {

/// `size` bytes that end there.
inline std::shared_ptr<std::byte> guarded_memory(size_t size) {
  const auto page = size_t(sysconf(_SC_PAGESIZE)), whole = (size + page - 1) / page * page;
  void* const at = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::runtime_error("no memory to guard");
  auto* const begin = static_cast<std::byte*>(at);
  if (mprotect(begin + whole, page, PROT_NONE) != 0) throw std::runtime_error("no page to guard with");
  const std::shared_ptr<std::byte> all(begin, [=](std::byte* p) { munmap(p, whole + page); });
  return {all, begin + whole - size};
}

/// Elements that are guarded.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t size) : memory_(guarded_memory(size * sizeof(T))), size_(size) {}
  explicit Guarded(std::span<const T> from) : Guarded(from.size()) {
    if (!from.empty()) std::memcpy(memory_.get(), from.data(), from.size_bytes());
  }
  T* data() { return reinterpret_cast<T*>(memory_.get()); }
  std::span<const T> elements() { return {data(), size_}; }

 private:
  std::shared_ptr<std::byte> memory_;
  size_t size_;
};

/// Packed weights, each of whose parts is guarded.
class GuardedWeights final : public kernels::WeightMemory {
 public:
  Place take(size_t size, const std::string&) override { return {guarded_memory(size), false}; }
  void filled(const Place&, size_t) override {}
};

}  // namespace torpor::testing
