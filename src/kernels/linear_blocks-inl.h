// Linear layers with 16-bit activations, many rows and weights as bytes: what AMX and Arm's dot products multiply.
// Compiled once per target, as part of linear.cc; only targets whose CPUs may have one of them get it.

#if defined(TORPOR_KERNELS_LINEAR_BLOCKS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef TORPOR_KERNELS_LINEAR_BLOCKS_INL
#undef TORPOR_KERNELS_LINEAR_BLOCKS_INL
#else
#define TORPOR_KERNELS_LINEAR_BLOCKS_INL
#endif

#include <hwy/highway.h>

#include "kernels/linear_bytes-inl.h"

// Arm's dot products, and products of matrices, where the assembler takes them: Clang's does if all functions may have
// them, as dot products on a Mac.
#undef TORPOR_HAVE_DOT
#undef TORPOR_HAVE_I8MM
#if HWY_ARCH_ARM_A64 && HWY_TARGET < HWY_EMU128 && (defined(__ARM_FEATURE_DOTPROD) || !defined(__clang__))
#define TORPOR_HAVE_DOT 1
#else
#define TORPOR_HAVE_DOT 0
#endif
#if TORPOR_HAVE_DOT && (defined(__ARM_FEATURE_MATMUL_INT8) || !defined(__clang__))
#define TORPOR_HAVE_I8MM 1
#else
#define TORPOR_HAVE_I8MM 0
#endif

#if TORPOR_HAVE_VNNI || TORPOR_HAVE_DOT
HWY_BEFORE_NAMESPACE();
namespace torpor::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if TORPOR_HAVE_DOT
// The low byte of each lane.
HWY_INLINE void StoreLowBytes(VU v, uint8_t* to) {
  const hn::Rebind<uint8_t, DU> d8;
  hn::StoreU(hn::TruncateTo(d8, v), d8, to);
}
#endif

// ---- Rows of x: x16 = 256 * high + low, in blocks of 16 rows ----
//
// A block is, per group, [16 rows][group] high bytes (signed), the same of low bytes, [16] scales, [16] sums.

// One row of a block. `out` is where the block begins.
void QuantizeRowBytes(const PackedPart& part, int k, const float* HWY_RESTRICT x, uint8_t* HWY_RESTRICT out, int row) {
  for (int g = 0; g < k / part.group; ++g, x += part.group) {
    HWY_ALIGN int32_t rounded[kLargestGroup];
    const RoundedGroup of = RoundGroup(part.group, x, rounded);
    uint8_t *high = out + row * part.group, *low = high + kByteTileRows * part.group;
    for (int i = 0; i < part.group; i += kLanes) {
      const VU v = hn::BitCast(DU(), hn::Load(DI(), rounded + i));
      StoreLowBytes(hn::ShiftRight<8>(v), high + i);
      StoreLowBytes(v, low + i);
    }
    auto* scales = reinterpret_cast<float*>(out + 2 * kByteTileRows * part.group);
    scales[row] = of.scale;
    scales[kByteTileRows + row] = of.sum;
    out += byte_tile_group_bytes(part.group);
  }
}

const uint8_t* PrepareBytes(ThreadPool& pool, const PackedPart& part, int k, const float* x, int rows) {
  const size_t block = size_t(k / part.group) * byte_tile_group_bytes(part.group);
  const int blocks = (rows + kByteTileRows - 1) / kByteTileRows;
  auto* out = reinterpret_cast<uint8_t*>(prepared_memory(size_t(blocks) * block / sizeof(float)));
  // Rows that are not there are multiplied too, and their sums left alone.
  if (rows % kByteTileRows != 0) std::memset(out + (blocks - 1) * block, 0, block);
  const int size = rows_per_task(rows, pool.size());
  auto body = [&](size_t task, int) {
    const int last = std::min(rows, int(task + 1) * size);
    for (int row = int(task) * size; row < last; ++row) {
      QuantizeRowBytes(part, k, x + size_t(row) * k, out + row / kByteTileRows * block, row % kByteTileRows);
    }
  };
  pool.parallel_for(size_t((rows + size - 1) / size), std::ref(body));
  return out;
}

// ---- One panel's columns [k0, k1) as bytes: per group [group / 4][16 outputs][4 columns], then [16] scales, [16] biases ----

template <class Kind>
void UnpackBytes(const PackedPart& part, const std::byte* panel, int k0, int k1, uint32_t* out) {
  const int bits = part.word_bits(), lines = part.group * bits / 32;
  const VU nibbles = hn::Set(DU(), 0x0f0f0f0fu);
  for (int g = k0 / part.group; g < k1 / part.group; ++g) {
    const std::byte* line = part.lines(panel, g);
    for (int i = 0; i < lines; ++i, line += kAlignment, out += 8 / bits * kPanel) {
      for (int v = 0; v < kVectors; ++v) {
        const VU words = LoadLine(line, v);
        uint32_t* to = out + v * kLanes;
        hn::Store(bits == 4 ? hn::And(words, nibbles) : words, DU(), to);
        if (bits == 4) hn::Store(hn::And(hn::ShiftRight<4>(words), nibbles), DU(), to + kPanel);
      }
    }
    StoreScales<Kind>(part.scales(panel, g), part.zero, reinterpret_cast<float*>(out));
    out += 2 * kPanel;
  }
}

void UnpackBytes(const PackedPart& part, const std::byte* panel, int k0, int k1, uint32_t* out) {
  if (!part.read_in_place()) {
    for (int g = k0 / part.group; g < k1 / part.group; ++g) {
      uint32_t* scales = out + part.group / 4 * kPanel;
      GroupAsBytes(part, panel, g, 0, out, reinterpret_cast<float*>(scales));
      out = scales + 2 * kPanel;
    }
    return;
  }
  if (part.zero != 0) return UnpackBytes<ScalesAroundZero>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kF32) UnpackBytes<F32Scales>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kF16) UnpackBytes<F16Scales>(part, panel, k0, k1, out);
  if (part.scale_type == Type::kBF16) UnpackBytes<Bf16Scales>(part, panel, k0, k1, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace torpor::kernels
HWY_AFTER_NAMESPACE();
#endif  // TORPOR_HAVE_VNNI || TORPOR_HAVE_DOT

#endif  // per-target guard
