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
/// products read it without a shuffle. Lines of 2 bits and of 1 bit are made alike, of 16 and 32 consecutive k. Widths
/// between are two planes: all lines of the weights' low bits, then those of their high bits (`Planes`). Kernels read
/// 4 and 8 bits in place. Others they read as bytes, which weight_formats-inl.h makes of a few columns at a time.
/// Rows past the end are zero. A panel whose groups have no biases of their own has all its scales first:
///
///     [groups][16 scales], up to a whole line, then per group its lines
///
/// Those are weights of mxfp4, mxfp8 and nvfp4, whose scales are a byte each (nibbles are E2M1 codes, bytes E4M3 ones),
/// and GGUF's around a zero (Q4_0, Q5_0, Q8_0, IQ4_NL), whose bias is that many times the scale.
///
/// A panel of GGUF's blocks of 256 columns keeps their two levels of scales. Per block it is
///
///     [16 d][16 dmin]  f16, then lines of the groups' integers, then the groups' lines
///
/// where a row's integers, those of the scales and then those of the minima, are again two planes: the low 4 bits, 8
/// to a u32, then the bits above (`integer_planes`). Codes of such a panel, or of one with scales of f16, may stand for
/// the levels of a codebook (gguf_blocks.h).

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels/gguf_blocks.h"
#include "kernels/packed_linear.h"

namespace torpor::kernels {

inline constexpr int kPanel = 16;
/// Outputs of a gated panel: lanes [0, 8) are rows of gate, lanes [8, 16) the same rows of up.
inline constexpr int kGatedPanel = 8;
inline constexpr size_t kAlignment = 64;
/// Columns of the largest group.
inline constexpr int kLargestGroup = 128;
/// Columns of a block whose scales have two levels.
inline constexpr int kTwoLevelColumns = 256;

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

/// Of one float.
inline size_t type_size(WeightSource::Type type) { return type == WeightSource::Type::kF32 ? 4 : 2; }

/// How many bits of a weight lie in lines of their own: its low ones, and the rest above them.
struct Planes {
  int low = 0, high = 0;
};
/// In groups of 16 a line of single bits would be half empty, so 1, 3 and 5 bits take the room of 2, 4 and 6 there.
inline Planes planes_of(int bits, int group) {
  if (group == 16 && bits < 8) bits += bits % 2;
  if (bits == 3) return {2, 1};
  if (bits == 5 || bits == 6) return {4, bits - 4};
  return {bits, 0};
}

/// Consecutive panels of one format.
struct PackedPart {
  using Type = WeightSource::Type;
  Type type = Type::kF32;
  int group = 0;   ///< of quantized weights; 0 = float weights
  Planes planes;
  Type scale_type = Type::kF32;  ///< of affine weights
  int zero = 0;    ///< of affine weights without biases of their own: one is -zero * scale. 0: they lie beside scales
  Codebook codebook = Codebook::kNone;    ///< of affine weights
  const BlockShape* two_level = nullptr;  ///< of affine weights whose scales have two levels
  int first = 0;   ///< output column of the first panel
  int n = 0;       ///< output columns
  int panels = 0;
  size_t group_bytes = 0;  ///< of quantized weights: scales, biases and lines; lines alone where scales lie elsewhere
  size_t block_bytes = 0;  ///< of two levels: a block's scales and lines
  size_t scales_first = 0;  ///< of groups without biases of their own: the bytes before the first line
  size_t panel_bytes = 0;
  std::shared_ptr<std::byte> data;  ///< [panels][panel_bytes]
  AlignedBuffer<float> bias;  ///< [panels * 16] additive, or empty

  const std::byte* panel(int i) const { return data.get() + size_t(i) * panel_bytes; }
  /// Whether kernels read the weights where they lie: floats, 4 and 8 bits. Else they read bytes made of them.
  bool read_in_place() const {
    if (group == 0) return true;
    return type == Type::kAffine && planes.low >= 4 && planes.high == 0 && codebook == Codebook::kNone && !two_level;
  }
  /// Whether a weight is an integer times its group's scale, plus a bias.
  bool integers() const { return group > 0 && type != Type::kMxfp8; }
  /// What codes stand for, those of floats of 4 bits too.
  Codebook codebook_of_codes() const { return type == Type::kAffine || type == Type::kMxfp8 ? codebook : Codebook::kE2m1; }
  /// The bits of an integer in the words that kernels read.
  int word_bits() const { return read_in_place() ? planes.low : 8; }
  /// Group `g` of a panel. Of two levels the scales are those of its block.
  const std::byte* scales(const std::byte* panel, int g) const {
    if (two_level != nullptr) return panel + size_t(g / groups_of_block()) * block_bytes;
    return panel + size_t(g) * scales_step();
  }
  /// From one group's scales to the next's, of one level.
  size_t scales_step() const { return scales_first > 0 ? kPanel * scale_bytes() : group_bytes; }
  /// Of one scale.
  size_t scale_bytes() const { return type == Type::kAffine ? type_size(scale_type) : 1; }
  const std::byte* lines(const std::byte* panel, int g) const {
    if (two_level != nullptr) {
      return scales(panel, g) + two_level_bytes() + size_t(g % groups_of_block()) * group_bytes;
    }
    return panel + size_t(g) * group_bytes + (scales_first > 0 ? scales_first : 2 * kPanel * scale_bytes());
  }
  /// Of two levels.
  int groups_of_block() const { return kTwoLevelColumns >> std::countr_zero(unsigned(group)); }
  struct IntegerPlanes {
    int high_bits, low_lines, high_lines;
  };
  IntegerPlanes integer_planes() const {
    const int count = groups_of_block() * (two_level->minima ? 2 : 1), high = two_level->scale_bits - 4;
    return {high, (count + 7) / 8, (count * high + 31) / 32};
  }
  /// A block's bytes before its first group.
  size_t two_level_bytes() const {
    const IntegerPlanes integers = integer_planes();
    return size_t(1 + integers.low_lines + integers.high_lines) * kAlignment;
  }
  /// A group's lines of one plane.
  size_t plane_bytes(int width) const { return size_t(group * width / 32) * kAlignment; }
};

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
