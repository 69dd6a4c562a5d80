#pragma once
/// Fresh memory costs more in page faults than what is read into it; 2 MiB pages make that one fault in 512.

#include <cstddef>
#include <span>
#include <vector>

namespace torpor {

/// Asks for large pages under buffers that are about to be filled. Buffers that lie next to each other, as an allocator hands
/// them out, are taken together, so that those smaller than a page count too. A hint: memory it does not suit ignores it.
void prefer_large_pages(std::vector<std::span<std::byte>> buffers);

}  // namespace torpor
