#include "cache/mlx_buffer.h"

#include <mlx/allocator.h>

#include "torpor/error.h"

namespace torpor {
namespace {

// MLX's allocators may be used, and their buffers freed, from any thread.
struct FreeBuffer {
  mx::allocator::Buffer buffer;
  void operator()(const void*) { mx::allocator::allocator().free(buffer); }
};

}  // namespace

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
  return {static_cast<std::byte*>(buffer.raw_ptr()), FreeBuffer{buffer}};
}

std::optional<mx::array> array_over(const std::shared_ptr<const void>& owner, size_t size) {
  const FreeBuffer* deleter = std::get_deleter<FreeBuffer>(owner);
  if (deleter == nullptr) return std::nullopt;
  // The array's own deleter frees nothing: it only lets go of its share.
  mx::allocator::Data data(deleter->buffer, [owner](mx::allocator::Buffer) {});
  return mx::array(std::move(data), mx::Shape{int(size)}, mx::uint8);
}

std::byte* bytes_of(const mx::array& array) {
  return reinterpret_cast<std::byte*>(const_cast<uint8_t*>(array.data<uint8_t>()));
}

std::shared_ptr<const void> owner_of(const mx::array& array) { return array.data_shared_ptr(); }

}  // namespace torpor
