#pragma once
/// Memory for packed weights. A decoded token reads all of them, so they lie together in large pages where the system has any.

#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace torpor::kernels {

/// Where packed weights lie. Weights that were packed by an earlier process may come out of it filled. One thread packs
/// at a time.
class WeightMemory {
 public:
  struct Place {
    std::shared_ptr<std::byte> data;  ///< aligned for any vector
    bool filled = false;              ///< it holds what is to be packed
  };
  virtual ~WeightMemory() = default;
  /// `size` bytes for weights that are made of sources with this fingerprint.
  virtual Place take(size_t size, const std::string& fingerprint) = 0;
  /// Of a place that was not filled: now it is, and its bytes never change again.
  virtual void filled(const Place& place, size_t size) = 0;

  /// Memory of this process alone, always unfilled.
  static WeightMemory& plain();
};

/// `size` uninitialised bytes, aligned for any vector. Tensors made one after another share blocks, which are given back when
/// the last of them is gone. Any thread.
std::shared_ptr<std::byte> allocate_weights(size_t size);

}  // namespace torpor::kernels
