/// Quantized rows as other programs read them.

#include <bit>
#include <cmath>
#include <cstring>

#include "exchange/prompt_cache.h"
#include "store/export.h"
#include "torpor/exchange.h"

namespace torpor {
namespace {

float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = uint32_t(half & 0x8000u) << 16;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f));
}

uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds beyond 65504
  // Adding a power of two leaves the value in its last bits, rounded to the steps that a half has there.
  const uint32_t exponent = std::max(magnitude, 0x38800000u) & 0x7f800000u;
  const float step = std::bit_cast<float>(exponent + (13u << 23));
  const float rounded = std::bit_cast<float>(magnitude) + step - step;
  const uint32_t scaled = std::bit_cast<uint32_t>(rounded * 0x1p-112f);
  return uint16_t(sign | scaled >> 13);
}

}  // namespace

float load_float(const std::byte* from, KvDtype dtype) {
  if (dtype == KvDtype::kF32) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return dtype == KvDtype::kF16 ? half_to_float(bits) : std::bit_cast<float>(uint32_t(bits) << 16);
}

namespace {

void store(float value, KvDtype dtype, std::byte* to) {
  if (dtype == KvDtype::kF32) {
    std::memcpy(to, &value, sizeof value);
    return;
  }
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t half = dtype == KvDtype::kF16 ? float_to_half(value)
                        : std::isnan(value)    ? uint16_t(bits >> 16 | 0x40)
                                               : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  std::memcpy(to, &half, sizeof half);
}

/// A row times the matrix that it was multiplied by (docs/format.md), which is its own inverse.
void turn_back(std::span<float> row) {
  const size_t size = row.size() & (~row.size() + 1);
  for (size_t h = 1; h < size; h *= 2) {
    for (size_t i = 0; i < row.size(); ++i) {
      if ((i & h) != 0) continue;
      const float a = row[i], b = row[i + h];
      row[i] = a + b;
      row[i + h] = a - b;
    }
  }
  for (float& value : row) value /= std::sqrt(float(size));
}

}  // namespace

KvSnapshot float_rows(const KvSnapshot& snapshot, const KvFormat& format, const RestoreAgentKeys& restore) {
  const auto& packed = snapshot.layout.tensors;
  KvSnapshot floats{.identity = snapshot.identity, .lineage = snapshot.lineage, .conversation = snapshot.conversation,
                    .tokens = snapshot.tokens, .state_layout = snapshot.state_layout, .states = snapshot.states};
  floats.identity.kv = KvFormat(format.dtype).name();
  for (size_t t = 0; t < packed.size(); t += 3) {
    KvTensorSpec tensor = packed[t];
    tensor.dtype = format.dtype;
    tensor.dim = packed[t + 1].dim * format.group;
    floats.layout.tensors.push_back(tensor);
  }
  const std::vector<std::shared_ptr<std::byte>> buffers = allocate_runs(floats);
  const size_t element = kv_dtype_size(format.dtype);
  for (size_t t = 0; t < floats.layout.tensors.size(); ++t) {
    const KvTensorSpec& tensor = floats.layout.tensors[t];
    const bool keys = t % 2 == 0;
    const int bits = keys ? format.bits.keys : format.bits.values;
    const size_t dim = size_t(tensor.dim), per_word = 32 / size_t(bits), groups = dim / size_t(format.group);
    std::vector<float> rows(dim * size_t(tensor.n_kv_heads));
    for (size_t run = 0; run < floats.n_runs(); ++run) {
      const int n = floats.run_tokens(run);
      const auto part = [&](size_t i) { return snapshot.run_bytes(run).data() + snapshot.layout.offset(3 * t + i, n); };
      std::byte* const to = buffers[run].get() + floats.layout.offset(t, n);
      for (int token = 0; token < n; ++token) {
        const auto row_of = [&](int head) { return size_t(head) * size_t(n) + size_t(token); };
        for (int head = 0; head < tensor.n_kv_heads; ++head) {
          const size_t at = row_of(head);
          const std::span<float> row = std::span(rows).subspan(size_t(head) * dim, dim);
          for (size_t i = 0; i < dim; ++i) {
            uint32_t word;
            std::memcpy(&word, part(0) + (at * dim + i) / per_word * sizeof word, sizeof word);
            const uint32_t level = word >> i % per_word * size_t(bits) & ((1u << bits) - 1);
            const size_t group = (at * groups + i / size_t(format.group)) * element;
            row[i] = std::fma(load_float(part(1) + group, format.dtype), float(level),
                              load_float(part(2) + group, format.dtype));
          }
          if (keys ? format.rotates_keys() : format.rotates_values()) turn_back(row);
        }
        if (keys && restore) restore(int(t / 2), int64_t(run) * kSegmentTokens + token, rows);
        for (size_t i = 0; i < rows.size(); ++i) {
          store(rows[i], format.dtype, to + (row_of(int(i / dim)) * dim + i % dim) * element);
        }
      }
    }
  }
  return floats;
}

}  // namespace torpor
