#pragma once
/// How packed weights lie in memory. Private to the kernels.
///
/// Rows come in panels of 16, so that a vector of one k holds 16 outputs' weights. A panel of float weights is
/// `[K][16]` of the checkpoint's own type. A panel of quantized weights is, per group along K,
///
///     [16 scales][16 biases][lines of 64 bytes: 16 rows x one u32]
///
/// where a row's u32 holds 4 consecutive k as bytes (8 bits), or 8 consecutive k as nibbles (4 bits), the low
/// nibbles of its bytes k..k+3 and the high ones k+4..k+7: both shifts-and-masks to f32 and byte-wise integer dot
/// products read it without a shuffle. Rows past the end are zero.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels/packed_linear.h"

namespace torpor::kernels {

inline constexpr int kPanel = 16;
/// Outputs of a gated panel: lanes [0, 8) are rows of gate, lanes [8, 16) the same rows of up.
inline constexpr int kGatedPanel = 8;
inline constexpr size_t kAlignment = 64;

/// Uninitialised memory aligned for any vector.
template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{kAlignment}))), size_(size) {}
  T* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

/// Consecutive panels of one format.
struct PackedPart {
  WeightSource::Type type = WeightSource::Type::kF32;
  int bits = 0, group = 0;
  WeightSource::Type scale_type = WeightSource::Type::kF32;
  int first = 0;   ///< output column of the first panel
  int n = 0;       ///< output columns
  int panels = 0;
  size_t group_bytes = 0;  ///< of quantized weights: scales, biases and lines
  size_t panel_bytes = 0;
  std::shared_ptr<std::byte> data;  ///< [panels][panel_bytes]
  AlignedBuffer<float> bias;  ///< [panels * 16] additive, or empty

  const std::byte* panel(int i) const { return data.get() + size_t(i) * panel_bytes; }
};

inline size_t type_size(WeightSource::Type type) { return type == WeightSource::Type::kF32 ? 4 : 2; }

/// The panels and rows of one task, of a part's `panels` and `rows` rows. Tasks are few, for taking one costs something
/// too. But they are at least 4 a thread where there is that much to share. Panels come in multiples of `at_once`, a
/// power of two; where that is too coarse, of a half of it and so on. Rows come in multiples of `tile`.
struct LinearTask {
  int panels, rows;
};
inline LinearTask linear_task(int panels, int at_once, int rows, int tile, int threads) {
  const auto up = [](int n, int to) { return (n + to - 1) / to; };
  const int least = 4 * threads, tiles = up(rows, tile);
  while (at_once > 1 && panels < at_once * least) at_once /= 2;
  const int size = std::max(1, panels / std::max(32, least) / at_once) * at_once;
  const int pieces = up(least, up(panels, size));
  return {size, std::max(1, tiles / pieces) * tile};
}

struct PackedLinear::Impl {
  int n = 0, k = 0;
  bool gated = false;
  Activations activations = Activations::kF32;
  std::vector<PackedPart> parts;
};

}  // namespace torpor::kernels
