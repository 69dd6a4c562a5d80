#include "kernels/packed_linear.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <utility>

#include "kernels/packed_layout.h"
#include "kernels/thread_pool.h"
#include "kernels/weight_memory.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

using Type = WeightSource::Type;

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in f32
    const float value = float(mantissa) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

float load_float(const void* base, Type type, size_t i) {
  const auto* bytes = static_cast<const std::byte*>(base);
  if (type == Type::kF32) {
    float value;
    std::memcpy(&value, bytes + i * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, bytes + i * 2, 2);
  return type == Type::kF16 ? half_to_float(half) : std::bit_cast<float>(uint32_t(half) << 16);
}

uint32_t load_u32(const void* base, size_t i) {
  uint32_t value;
  std::memcpy(&value, static_cast<const std::byte*>(base) + i * 4, 4);
  return value;
}

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorCode::kInvalidArgument, what); }

void check(const WeightSource& s) {
  if (s.n < 1 || s.k < 1) invalid("A weight must have at least one row and one column.");
  if (s.weight == nullptr) invalid("A weight has no data.");
  if (s.bias != nullptr && s.bias_type == Type::kAffine) invalid("An additive bias can't be quantized.");
  if (s.type != Type::kAffine) return;
  if (s.bits != 4 && s.bits != 8) invalid("Weights of " + std::to_string(s.bits) + " bits are not supported; use 4 or 8.");
  if (s.group != 32 && s.group != 64 && s.group != 128) {
    invalid("Groups of " + std::to_string(s.group) + " are not supported; use 32, 64 or 128.");
  }
  if (s.k % s.group != 0) {
    invalid("A quantized weight of " + std::to_string(s.k) + " columns is not whole groups of " + std::to_string(s.group) + ".");
  }
  if (s.scale_type == Type::kAffine) invalid("Scales can't be quantized.");
  if (s.scales == nullptr || s.biases == nullptr) invalid("A quantized weight lacks its scales or biases.");
}

bool same_format(const WeightSource& a, const WeightSource& b) {
  if (a.type != b.type) return false;
  return a.type != Type::kAffine || (a.bits == b.bits && a.group == b.group && a.scale_type == b.scale_type);
}

// n0..n7 (n0 lowest) -> bytes n0|n4<<4, n1|n5<<4, n2|n6<<4, n3|n7<<4.
uint32_t reorder_nibbles(uint32_t w) {
  auto spread = [](uint32_t x) {
    x = (x | (x << 8)) & 0x00ff00ffu;
    return (x | (x << 4)) & 0x0f0f0f0fu;
  };
  return spread(w & 0xffff) | (spread(w >> 16) << 4);
}

struct RowRef {
  const WeightSource* source = nullptr;
  int row = 0;
};

void write_row(const PackedPart& part, int k, int packed_row, const RowRef& ref) {
  std::byte* panel = part.data.get() + size_t(packed_row / kPanel) * part.panel_bytes;
  const int lane = packed_row % kPanel;
  if (part.type != Type::kAffine) {
    const size_t size = type_size(part.type);
    const auto* from = ref.source ? static_cast<const std::byte*>(ref.source->weight) + size_t(ref.row) * k * size : nullptr;
    for (int i = 0; i < k; ++i) {
      std::byte* to = panel + (size_t(i) * kPanel + lane) * size;
      if (from != nullptr) {
        std::memcpy(to, from + i * size, size);
      } else {
        std::memset(to, 0, size);
      }
    }
    return;
  }
  const size_t size = type_size(part.scale_type);
  const int groups = k / part.group, lines = part.group * part.bits / 32;
  for (int g = 0; g < groups; ++g) {
    std::byte* to = panel + size_t(g) * part.group_bytes;
    std::byte* scale = to + lane * size;
    std::byte* bias = to + (kPanel + lane) * size;
    std::byte* line = to + 2 * kPanel * size + lane * 4;
    if (ref.source == nullptr) {
      std::memset(scale, 0, size);
      std::memset(bias, 0, size);
      for (int i = 0; i < lines; ++i) std::memset(line + size_t(i) * kAlignment, 0, 4);
      continue;
    }
    const size_t group_index = size_t(ref.row) * groups + g;
    std::memcpy(scale, static_cast<const std::byte*>(ref.source->scales) + group_index * size, size);
    std::memcpy(bias, static_cast<const std::byte*>(ref.source->biases) + group_index * size, size);
    for (int i = 0; i < lines; ++i) {
      uint32_t word = load_u32(ref.source->weight, group_index * lines + i);
      if (part.bits == 4) word = reorder_nibbles(word);
      std::memcpy(line + size_t(i) * kAlignment, &word, 4);
    }
  }
}

/// Packs rows given in packed order (a RowRef without source is padding); size a multiple of 16.
void pack_part(PackedPart& part, int k, const std::vector<RowRef>& rows) {
  const WeightSource& format = *rows.front().source;
  part.type = format.type;
  part.panels = int(rows.size()) / kPanel;
  if (part.type == Type::kAffine) {
    part.bits = format.bits;
    part.group = format.group;
    part.scale_type = format.scale_type;
    part.group_bytes = 2 * kPanel * type_size(part.scale_type) + size_t(part.group) * part.bits / 8 * kPanel;
    part.panel_bytes = part.group_bytes * size_t(k / part.group);
  } else {
    part.panel_bytes = size_t(k) * kPanel * type_size(part.type);
  }
  part.data = allocate_weights(part.panel_bytes * size_t(part.panels));
  const bool with_bias = std::any_of(rows.begin(), rows.end(), [](const RowRef& r) { return r.source && r.source->bias; });
  if (with_bias) part.bias = AlignedBuffer<float>(rows.size());
  ThreadPool::shared().parallel_for(size_t(part.panels), [&](size_t panel, int) {
    for (size_t row = panel * kPanel; row < (panel + 1) * kPanel; ++row) {
      write_row(part, k, int(row), rows[row]);
      if (with_bias) {
        const WeightSource* s = rows[row].source;
        part.bias.data()[row] = s && s->bias ? load_float(s->bias, s->bias_type, size_t(rows[row].row)) : 0.0f;
      }
    }
  });
}

void read_row(const PackedPart& part, int k, int packed_row, float* out) {
  const std::byte* panel = part.panel(packed_row / kPanel);
  const int lane = packed_row % kPanel;
  if (part.type != Type::kAffine) {
    for (int i = 0; i < k; ++i) out[i] = load_float(panel, part.type, size_t(i) * kPanel + lane);
    return;
  }
  const int lines = part.group * part.bits / 32;
  for (int g = 0; g < k / part.group; ++g, panel += part.group_bytes) {
    const float scale = load_float(panel, part.scale_type, lane);
    const float bias = load_float(panel, part.scale_type, kPanel + lane);
    const std::byte* line = panel + 2 * kPanel * type_size(part.scale_type);
    for (int i = 0; i < lines; ++i, line += kAlignment) {
      const uint32_t word = load_u32(line, lane);
      if (part.bits == 8) {
        for (int j = 0; j < 4; ++j) *out++ = float((word >> (8 * j)) & 0xff) * scale + bias;
      } else {
        for (int j = 0; j < 4; ++j) *out++ = float((word >> (8 * j)) & 0xf) * scale + bias;
        for (int j = 0; j < 4; ++j) *out++ = float((word >> (8 * j + 4)) & 0xf) * scale + bias;
      }
    }
  }
}

/// A gate and an up of different formats become f32.
std::vector<float> to_f32(const WeightSource& s) {
  std::vector<float> out(size_t(s.n) * s.k);
  ThreadPool::shared().parallel_for(size_t(s.n), [&](size_t row, int) {
    for (int i = 0; i < s.k; ++i) {
      float& to = out[row * s.k + i];
      const size_t at = row * s.k + i;
      if (s.type != Type::kAffine) {
        to = load_float(s.weight, s.type, at);
      } else {
        const uint32_t word = load_u32(s.weight, at * s.bits / 32);
        const uint32_t q = (word >> (at * s.bits % 32)) & ((1u << s.bits) - 1);
        to = float(q) * load_float(s.scales, s.scale_type, at / s.group) + load_float(s.biases, s.scale_type, at / s.group);
      }
    }
  });
  return out;
}

WeightSource as_f32(const WeightSource& s, const std::vector<float>& values) {
  WeightSource out = s;
  out.type = Type::kF32;
  out.weight = values.data();
  out.bits = out.group = 0;
  out.scales = out.biases = nullptr;
  return out;
}

}  // namespace

PackedLinear::PackedLinear(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PackedLinear::~PackedLinear() = default;

std::shared_ptr<const PackedLinear> PackedLinear::pack(const std::vector<WeightSource>& sources, Activations activations) {
  if (sources.empty()) invalid("No weights to pack.");
  auto impl = std::make_unique<Impl>();
  impl->k = sources.front().k;
  impl->activations = activations;
  for (const WeightSource& s : sources) {
    check(s);
    if (s.k != impl->k) invalid("Weights packed together must have the same number of columns.");
  }
  for (size_t i = 0; i < sources.size();) {
    PackedPart part;
    part.first = impl->n;
    std::vector<RowRef> rows;
    size_t j = i;
    for (; j < sources.size() && same_format(sources[i], sources[j]); ++j) {
      for (int row = 0; row < sources[j].n; ++row) rows.push_back({&sources[j], row});
    }
    part.n = int(rows.size());
    rows.resize((rows.size() + kPanel - 1) / kPanel * kPanel);
    pack_part(part, impl->k, rows);
    impl->n += part.n;
    impl->parts.push_back(std::move(part));
    i = j;
  }
  return std::shared_ptr<const PackedLinear>(new PackedLinear(std::move(impl)));
}

std::shared_ptr<const PackedLinear> PackedLinear::pack_gated(const WeightSource& gate, const WeightSource& up,
                                                             Activations activations) {
  check(gate);
  check(up);
  if (gate.n != up.n || gate.k != up.k) invalid("Gate and up projections must have the same shape.");
  if (!same_format(gate, up)) {
    const std::vector<float> gate_values = to_f32(gate), up_values = to_f32(up);
    return pack_gated(as_f32(gate, gate_values), as_f32(up, up_values), activations);
  }
  auto impl = std::make_unique<Impl>();
  impl->n = gate.n;
  impl->k = gate.k;
  impl->gated = true;
  impl->activations = activations;
  std::vector<RowRef> rows;
  for (int first = 0; first < gate.n; first += kGatedPanel) {
    for (const WeightSource* s : {&gate, &up}) {
      for (int row = first; row < first + kGatedPanel; ++row) rows.push_back(row < gate.n ? RowRef{s, row} : RowRef{});
    }
  }
  PackedPart part;
  part.n = gate.n;
  pack_part(part, impl->k, rows);
  impl->parts.push_back(std::move(part));
  return std::shared_ptr<const PackedLinear>(new PackedLinear(std::move(impl)));
}

int PackedLinear::n() const noexcept { return impl_->n; }
int PackedLinear::k() const noexcept { return impl_->k; }

size_t PackedLinear::nbytes() const noexcept {
  size_t total = 0;
  for (const PackedPart& part : impl_->parts) total += part.panel_bytes * size_t(part.panels) + part.bias.size() * sizeof(float);
  return total;
}

void PackedLinear::dequantize_row(int row, float* out) const {
  if (impl_->gated) invalid("A gated weight has no rows of its own.");
  if (row < 0 || row >= impl_->n) {
    invalid("Row " + std::to_string(row) + " is outside a weight of " + std::to_string(impl_->n) + " rows.");
  }
  for (const PackedPart& part : impl_->parts) {
    if (row >= part.first + part.n) continue;
    read_row(part, impl_->k, row - part.first, out);
    return;
  }
}

}  // namespace torpor::kernels
