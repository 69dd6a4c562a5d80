#pragma once
/// Fresh memory costs more in page faults than what is read into it; 2 MiB pages make that one fault in 512.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace torpor {

/// Asks for large pages where `memory` has no pages yet: they come as it is written. A hint, as the next one.
void expect_large_pages(std::span<std::byte> memory);

/// Asks for large pages under a buffer that is about to be filled. A hint: memory it does not suit ignores it.
void prefer_large_pages(std::span<std::byte> buffer);

inline constexpr size_t kLargePage = size_t(2) << 20;

/// Bytes of memory that the machine has.
uint64_t physical_memory();
/// Of these, bytes that programs could take now without others being swapped out; all where the system does not say.
uint64_t available_memory();

/// Uninitialised memory that begins with a large page; `size` is a multiple of kLargePage. Pages come when they are
/// first touched: what never is takes no memory. Throws std::bad_alloc.
std::shared_ptr<std::byte> allocate_large_pages(size_t size);
/// The contents of `memory` are not needed any more. Until it is written again the system may take back large pages
/// that lie in it whole.
void forget_contents(std::span<std::byte> memory) noexcept;

}  // namespace torpor
