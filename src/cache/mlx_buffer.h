#pragma once
/// Bytes that MLX's allocator owns, seen from both sides: as shared memory that a snapshot or a file read can use, and
/// as an mx::array that a graph can use. Neither side copies.

#include <memory>
#include <optional>

#include <mlx/array.h>

#include "torpor/cache.h"

namespace torpor {

/// A u8 array `[size]` over a buffer of mlx_buffer(); the array keeps the buffer alive. nullopt when `owner` is other
/// memory.
std::optional<mx::array> array_over(const std::shared_ptr<const void>& owner, size_t size);

/// The writable bytes of an evaluated array.
std::byte* bytes_of(const mx::array& array);

/// A handle that keeps an evaluated array's buffer alive for a snapshot.
std::shared_ptr<const void> owner_of(const mx::array& array);

}  // namespace torpor
