#pragma once
/// Memory for packed weights. A decoded token reads all of them, so they lie together in large pages where the system has any.

#include <cstddef>
#include <memory>

namespace torpor::kernels {

/// `size` uninitialised bytes, aligned for any vector. Tensors made one after another share blocks, which are given back when
/// the last of them is gone. Any thread.
std::shared_ptr<std::byte> allocate_weights(size_t size);

}  // namespace torpor::kernels
