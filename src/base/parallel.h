#pragma once
/// Work that is split over threads for the length of one call.

#include <cstddef>
#include <functional>

namespace torpor {

/// fn(0) ... fn(count - 1) on up to `max_threads` threads, this one included. Rethrows the first exception, after all
/// threads have ended; once there is one no further index is begun.
void parallel_for(size_t count, size_t max_threads, const std::function<void(size_t)>& fn);
/// Flushes that are asked for at a time: what is flushed together a disk writes together.
inline constexpr size_t kFlushThreads = 4;
/// Threads that memory and the page cache are worth: as many as cores, at most 8.
size_t reader_threads();

}  // namespace torpor
