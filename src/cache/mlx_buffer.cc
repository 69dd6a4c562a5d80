#include <mlx/allocator.h>

#include "torpor/cache.h"
#include "torpor/error.h"

namespace torpor {

std::shared_ptr<std::byte> mlx_buffer(size_t size) {
  mx::allocator::Buffer buffer{nullptr};
  try {
    buffer = mx::allocator::allocator().malloc(size);
  } catch (const std::exception&) {
  }
  if (buffer.ptr() == nullptr) {
    throw Error(ErrorCode::kResourceExhausted,
                "Out of memory for a KV buffer of " + std::to_string(size) + " bytes; let other agents sleep first.");
  }
  // MLX's allocators may be used, and their buffers freed, from any thread.
  return {static_cast<std::byte*>(buffer.raw_ptr()), [buffer](std::byte*) { mx::allocator::allocator().free(buffer); }};
}

}  // namespace torpor
