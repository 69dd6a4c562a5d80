#pragma once
/// Memory for the arrays of a cache that is about to be loaded.

#include <cstddef>
#include <memory>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/array.h>

namespace torpor::python {

struct ArrayShape {
  mlx::core::Shape shape;
  mlx::core::Dtype dtype;
};

/// Memory for row-contiguous arrays of these shapes, to be written before the arrays are made. On a CPU they lie
/// together in large pages, which come as they are written. The next block gets the pages when all of these arrays are
/// gone. MLX does not count them among its memory.
class ArrayBlock {
 public:
  /// Throws std::bad_alloc.
  explicit ArrayBlock(std::vector<ArrayShape> shapes);
  /// Uninitialised. Any thread.
  std::byte* bytes(size_t i) const { return places_[i]; }
  /// The arrays, evaluated; to be called once, when their bytes are written.
  std::vector<mlx::core::array> arrays();

 private:
  std::vector<ArrayShape> shapes_;
  std::vector<std::byte*> places_;
  std::vector<mlx::core::allocator::Data> data_;  ///< of each array, where they do not lie together
  std::shared_ptr<std::byte> block_;              ///< of all, where they do
};

}  // namespace torpor::python
