#pragma once
/// Memory for the arrays of a cache that is about to be loaded.

#include <cstddef>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/array.h>

namespace torpor::python {

struct ArrayShape {
  mlx::core::Shape shape;
  mlx::core::Dtype dtype;
};

/// Memory for row-contiguous arrays of these shapes, to be written before the arrays are made. It is MLX's own, and
/// belongs to its array alone: MLX writes further rows into it, and copies none. Arrays that follow each other in
/// memory share large pages, which come as they are written.
class ArrayMemory {
 public:
  /// Throws std::bad_alloc.
  explicit ArrayMemory(std::vector<ArrayShape> shapes);
  /// Uninitialised; begins with a line of the cache. Any thread.
  std::byte* bytes(size_t i) const { return places_[i]; }
  /// The arrays, evaluated; to be called once, when their bytes are written.
  std::vector<mlx::core::array> arrays();

 private:
  std::vector<ArrayShape> shapes_;
  std::vector<mlx::core::allocator::Data> data_;
  std::vector<std::byte*> places_;
};

}  // namespace torpor::python
