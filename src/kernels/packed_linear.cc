#include "kernels/packed_linear.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "kernels/packed_layout.h"
#include "kernels/thread_pool.h"
#include "kernels/weight_formats.h"
#include "kernels/weight_memory.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

using Type = WeightSource::Type;

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorCode::kInvalidArgument, what); }

void check(const WeightSource& s) {
  if (s.n < 1 || s.k < 1) invalid("A weight must have at least one row and one column.");
  if (s.weight == nullptr) invalid("A weight has no data.");
  if (s.bias != nullptr && !is_float(s.bias_type)) invalid("An additive bias can't be quantized.");
  if (is_float(s.type)) return;
  check_format(s);
  if (!is_float(s.scale_type)) invalid("Scales can't be quantized.");
  if (s.scales == nullptr || (s.type == Type::kAffine && s.biases == nullptr)) invalid("A quantized weight lacks its scales or biases.");
}

bool same_format(const WeightSource& a, const WeightSource& b) {
  if (a.type != b.type) return false;
  return is_float(a.type) || (a.bits == b.bits && a.group == b.group && a.scale_type == b.scale_type);
}

struct RowRef {
  const WeightSource* source = nullptr;
  int row = 0;
};

void write_row(const PackedPart& part, int k, int packed_row, const RowRef& ref) {
  std::byte* panel = part.data.get() + size_t(packed_row / kPanel) * part.panel_bytes;
  const int lane = packed_row % kPanel;
  if (part.group == 0) {
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
  // Of a group: an affine one's scale and bias, floats; else a scale of one byte.
  const size_t size = part.byte_scales > 0 ? 1 : type_size(part.scale_type);
  const int groups = k / part.group, numbers = part.byte_scales > 0 ? 1 : 2;
  uint8_t codes[kLargestGroup] = {};
  for (int g = 0; g < groups; ++g) {
    const size_t of_source = size_t(ref.row) * groups + g;
    for (int i = 0; i < numbers; ++i) {
      std::byte* to = const_cast<std::byte*>(part.scales(panel, g)) + size_t(i * kPanel + lane) * size;
      if (ref.source == nullptr) {
        std::memset(to, 0, size);
      } else {
        const void* from = i == 0 ? ref.source->scales : ref.source->biases;
        std::memcpy(to, static_cast<const std::byte*>(from) + of_source * size, size);
      }
    }
    if (ref.source != nullptr) read_codes(*ref.source, of_source, codes);
    write_planes(part, lane, codes, const_cast<std::byte*>(part.lines(panel, g)));
  }
}

/// Packs rows given in packed order (a RowRef without source is padding); size a multiple of 16.
void pack_part(PackedPart& part, int k, const std::vector<RowRef>& rows) {
  const WeightSource& format = *rows.front().source;
  part.type = format.type;
  part.panels = int(rows.size()) / kPanel;
  if (!is_float(part.type)) {
    part.group = format.group;
    part.planes = planes_of(format.bits, format.group);
    part.scale_type = format.scale_type;
    const size_t groups = size_t(k / part.group);
    part.group_bytes = part.plane_bytes(part.planes.low + part.planes.high);
    if (part.type == Type::kAffine) {
      part.group_bytes += 2 * kPanel * type_size(part.scale_type);
    } else {
      part.byte_scales = (groups * kPanel + kAlignment - 1) / kAlignment * kAlignment;
    }
    part.panel_bytes = part.byte_scales + part.group_bytes * groups;
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
  if (part.group == 0) {
    for (int i = 0; i < k; ++i) out[i] = load_float(panel, part.type, size_t(i) * kPanel + lane);
    return;
  }
  uint8_t codes[kLargestGroup];
  for (int g = 0; g < k / part.group; ++g, out += part.group) {
    const std::byte* scales = part.scales(panel, g);
    const float scale = load_scale(part.type, part.scale_type, scales, size_t(lane));
    const float bias = part.type == Type::kAffine ? load_float(scales, part.scale_type, kPanel + lane) : 0;
    read_planes(part, lane, part.lines(panel, g), codes);
    dequantize(part.type, codes, part.group, scale, bias, out);
  }
}

/// A gate and an up of different formats become f32.
std::vector<float> to_f32(const WeightSource& s) {
  std::vector<float> out(size_t(s.n) * s.k);
  ThreadPool::shared().parallel_for(size_t(s.n), [&](size_t row, int) {
    float* to = out.data() + row * s.k;
    if (is_float(s.type)) {
      for (int i = 0; i < s.k; ++i) to[i] = load_float(s.weight, s.type, row * s.k + i);
      return;
    }
    uint8_t codes[kLargestGroup];
    for (size_t g = row * s.k / s.group; g < (row + 1) * s.k / s.group; ++g, to += s.group) {
      const float bias = s.type == Type::kAffine ? load_float(s.biases, s.scale_type, g) : 0;
      read_codes(s, g, codes);
      dequantize(s.type, codes, s.group, load_scale(s.type, s.scale_type, s.scales, g), bias, to);
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
