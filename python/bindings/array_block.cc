#include "array_block.h"

#include <algorithm>
#include <memory>
#include <new>

#include <mlx/allocator.h>
#include <mlx/device.h>

#include "base/large_pages.h"
#include "base/mutex.h"

namespace mx = mlx::core;

namespace torpor::python {
namespace {

/// Below that a part of a large page would be too much of the whole to leave empty.
constexpr size_t kMinBlock = 8 * kLargePage;
/// Between arrays: room for the header that MLX's CPU allocator has before its bytes, in a line of the cache.
constexpr size_t kAlignment = 64;

struct Block {
  std::shared_ptr<std::byte> memory;
  size_t size = 0;
};

/// The largest block let go of: who swaps agents in and out need not wait for zeroed pages each time.
class Spare {
 public:
  Block take(size_t size) {
    {
      const MutexLock lock(mutex_);
      if (spare_.size >= size) return std::exchange(spare_, {});
    }
    return {allocate_large_pages(size), size};
  }
  void give(Block block) noexcept {
    forget_contents({block.memory.get(), block.size});
    const MutexLock lock(mutex_);
    if (block.size > spare_.size) std::swap(spare_, block);
  }

 private:
  Mutex mutex_;
  Block spare_ TORPOR_GUARDED_BY(mutex_);
};

std::shared_ptr<std::byte> take_block(size_t size) {
  static Spare& spare = *new Spare;  // arrays may outlive the statics
  Block block = spare.take((size + kLargePage - 1) / kLargePage * kLargePage);
  std::byte* memory = block.memory.get();
  return {memory, [block = std::move(block)](std::byte*) mutable { spare.give(std::move(block)); }};
}

size_t bytes_of(const ArrayShape& array) {
  size_t bytes = mx::size_of(array.dtype);
  for (const auto n : array.shape) bytes *= size_t(n);
  return bytes;
}

/// With its header.
size_t room_of(const ArrayShape& array) {
  return (bytes_of(array) + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
}

}  // namespace

ArrayBlock::ArrayBlock(std::vector<ArrayShape> shapes) : shapes_(std::move(shapes)) {
  size_t total = 0;
  for (const ArrayShape& array : shapes_) total += room_of(array);
  if (total >= kMinBlock && !mx::is_available(mx::Device::gpu)) {
    block_ = take_block(total);
    std::byte* at = block_.get();
    for (const ArrayShape& array : shapes_) {
      places_.push_back(at + kAlignment);
      at += room_of(array);
    }
    return;
  }
  for (const ArrayShape& array : shapes_) {
    data_.push_back(mx::allocator::malloc(bytes_of(array)));
    if (data_.back().buffer().ptr() == nullptr) throw std::bad_alloc();
    mx::allocator::Buffer buffer = data_.back().buffer();
    places_.push_back(static_cast<std::byte*>(buffer.raw_ptr()));
  }
}

std::vector<mx::array> ArrayBlock::arrays() {
  std::vector<mx::array> arrays;
  for (size_t i = 0; i < shapes_.size(); ++i) {
    if (block_ == nullptr) {
      arrays.emplace_back(std::move(data_[i]), shapes_[i].shape, shapes_[i].dtype);
      continue;
    }
    // MLX can't wrap memory on a CPU: this is what its allocator makes there, a size and then the bytes.
    const std::span<std::byte> bytes(places_[i], bytes_of(shapes_[i]));
    auto* header = reinterpret_cast<size_t*>(bytes.data()) - 1;
    *header = bytes.size();
    mx::allocator::Data data(mx::allocator::Buffer(header),
                             [block = block_, bytes](mx::allocator::Buffer) { forget_contents(bytes); });
    arrays.emplace_back(std::move(data), shapes_[i].shape, shapes_[i].dtype);
  }
  return arrays;
}

}  // namespace torpor::python
