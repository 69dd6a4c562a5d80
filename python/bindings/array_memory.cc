#include "array_memory.h"

#include <algorithm>
#include <cstdint>
#include <new>
#include <span>

#include "base/large_pages.h"

namespace mx = mlx::core;

namespace torpor::python {
namespace {

/// Rows are copied four times as fast to a line of the cache. MLX's allocator on a CPU gives memory that begins 8 bytes
/// behind a multiple of 16.
constexpr size_t kLine = 64;
/// Allocations of one mapping each lie so far apart at most: what rounds them to pages.
constexpr ptrdiff_t kApart = 64 << 10;

size_t bytes_of(const ArrayShape& array) {
  size_t bytes = mx::size_of(array.dtype);
  for (const auto n : array.shape) bytes *= size_t(n);
  return bytes;
}

/// Allocations follow each other: a large page under the end of one and the beginning of the next serves both.
void share_large_pages(std::vector<std::span<std::byte>> blocks) {
  std::ranges::sort(blocks, {}, [](const auto& block) { return block.data(); });
  std::span<std::byte> run;
  for (const auto& block : blocks) {
    std::byte* const end = run.data() + run.size();
    if (!run.empty() && block.data() - end <= kApart) {
      run = {run.data(), block.data() + block.size()};
    } else {
      expect_large_pages(run);
      run = block;
    }
  }
  expect_large_pages(run);
}

}  // namespace

ArrayMemory::ArrayMemory(std::vector<ArrayShape> shapes) : shapes_(std::move(shapes)) {
  std::vector<std::span<std::byte>> blocks;
  for (const ArrayShape& array : shapes_) {
    const size_t size = bytes_of(array) + kLine;
    data_.push_back(mx::allocator::malloc(size));
    mx::allocator::Buffer buffer = data_.back().buffer();
    if (buffer.ptr() == nullptr) throw std::bad_alloc();
    auto* const memory = static_cast<std::byte*>(buffer.raw_ptr());
    blocks.emplace_back(memory, size);
    places_.push_back(memory + (kLine - reinterpret_cast<uintptr_t>(memory) % kLine) % kLine);
  }
  share_large_pages(std::move(blocks));
}

std::vector<mx::array> ArrayMemory::arrays() {
  std::vector<mx::array> arrays;
  arrays.reserve(shapes_.size());
  for (size_t i = 0; i < shapes_.size(); ++i) {
    mx::array& array = arrays.emplace_back(std::move(data_[i]), shapes_[i].shape, shapes_[i].dtype);
    const int64_t before = (places_[i] - array.data<std::byte>()) / int64_t(array.itemsize());
    array.copy_shared_buffer(array, array.strides(), array.flags(), array.data_size(), before);
  }
  return arrays;
}

}  // namespace torpor::python
