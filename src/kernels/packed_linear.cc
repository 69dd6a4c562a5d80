#include "kernels/packed_linear.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/hash.h"
#include "kernels/packed_layout.h"
#include "kernels/thread_pool.h"
#include "kernels/weight_formats.h"
#include "torpor/error.h"

namespace torpor::kernels {
namespace {

using Type = WeightSource::Type;

[[noreturn]] void invalid(const std::string& what) { throw Error(ErrorCode::kInvalidArgument, what); }

void check(const WeightSource& s) {
  if (s.n < 1 || s.k < 1) invalid("A weight must have at least one row and one column.");
  if (s.weight == nullptr) invalid("A weight has no data.");
  if (s.bias != nullptr && !is_float(s.bias_type)) invalid("An additive bias can't be quantized.");
  if (s.neighbour_heads != 0 && (s.neighbour_heads < 0 || s.n % (2 * s.neighbour_heads) != 0)) {
    invalid("A weight of " + std::to_string(s.n) + " rows is not " + std::to_string(s.neighbour_heads) +
            " heads of pairs.");
  }
  if (s.blocks) {
    const GgmlTypeInfo& info = ggml_type_info(*s.blocks);
    if (block_shape(*s.blocks).bits == 0) invalid(std::string("Weights of ") + info.name + " are no blocks.");
    if (s.k % info.columns != 0) {
      invalid("A weight of " + std::to_string(s.k) + " columns is not whole blocks of " + info.name + ".");
    }
    return;
  }
  if (is_float(s.type)) return;
  check_format(s);
  if (!is_float(s.scale_type)) invalid("Scales can't be quantized.");
  if (s.scales == nullptr || (s.type == Type::kAffine && s.biases == nullptr)) invalid("A quantized weight lacks its scales or biases.");
}

bool same_format(const WeightSource& a, const WeightSource& b) {
  if (a.blocks || b.blocks) return a.blocks == b.blocks;
  if (a.type != b.type) return false;
  return is_float(a.type) || (a.bits == b.bits && a.group == b.group && a.scale_type == b.scale_type);
}

struct RowRef {
  const WeightSource* source = nullptr;
  int row = 0;  // in the source
};

/// Where the source has what is row `row` of the packed weight.
RowRef row_ref(const WeightSource& source, int row) {
  if (source.neighbour_heads == 0) return {&source, row};
  const int dim = source.n / source.neighbour_heads, i = row % dim;
  return {&source, row - i + (i < dim / 2 ? 2 * i : 2 * (i - dim / 2) + 1)};
}

/// Of a row's blocks.
const std::byte* blocks_of(const WeightSource& source, int row) {
  const GgmlTypeInfo& info = ggml_type_info(*source.blocks);
  const size_t row_bytes = size_t(source.k / info.columns) * size_t(info.bytes);
  return static_cast<const std::byte*>(source.weight) + size_t(row) * row_bytes;
}

/// Ors the 4 low bits of integer `i` of a row, and those above, to its words in a block's lines.
void write_integer(const PackedPart::IntegerPlanes& planes, std::byte* lines, int lane, int i, uint8_t integer) {
  const auto add = [&](int line, int shift, uint32_t bits) {
    std::byte* at = lines + size_t(line) * kAlignment + size_t(lane) * 4;
    uint32_t word;
    std::memcpy(&word, at, 4);
    word |= bits << shift;
    std::memcpy(at, &word, 4);
  };
  add(i / 8, i % 8 * 4, integer & 15);
  if (planes.high_bits == 0) return;
  const int per_line = 32 / planes.high_bits;
  add(planes.low_lines + i / per_line, i % per_line * planes.high_bits, integer >> 4);
}

uint8_t read_integer(const PackedPart::IntegerPlanes& planes, const std::byte* lines, int lane, int i) {
  const auto word = [&](int line) {
    uint32_t bits;
    std::memcpy(&bits, lines + size_t(line) * kAlignment + size_t(lane) * 4, 4);
    return bits;
  };
  const uint32_t low = word(i / 8) >> (i % 8 * 4) & 15;
  if (planes.high_bits == 0) return uint8_t(low);
  const int per_line = 32 / planes.high_bits;
  const uint32_t high = word(planes.low_lines + i / per_line) >> (i % per_line * planes.high_bits);
  return uint8_t(low | (high & ((1u << planes.high_bits) - 1)) << 4);
}

/// The scales of group `g` of a row, of the block that holds it.
void write_two_level(const PackedPart& part, std::byte* block, int lane, int g, const BlockScales& scales) {
  const PackedPart::IntegerPlanes planes = part.integer_planes();
  std::byte* integers = block + kAlignment;
  const int groups = part.groups_of_block();
  if (g % groups == 0) {
    std::memcpy(block + size_t(lane) * 2, &scales.d, 2);
    std::memcpy(block + size_t(kPanel + lane) * 2, &scales.dmin, 2);
    for (int line = 0; line < planes.low_lines + planes.high_lines; ++line) {
      std::memset(integers + size_t(line) * kAlignment + size_t(lane) * 4, 0, 4);
    }
  }
  write_integer(planes, integers, lane, g % groups, scales.scale);
  if (part.two_level->minima) write_integer(planes, integers, lane, groups + g % groups, scales.min);
}

GroupAffine read_two_level(const PackedPart& part, const std::byte* block, int lane, int g) {
  const PackedPart::IntegerPlanes planes = part.integer_planes();
  const BlockShape& shape = *part.two_level;
  const int groups = part.groups_of_block();
  const float d = load_float(block, Type::kF16, size_t(lane));
  const float dmin = load_float(block, Type::kF16, size_t(kPanel + lane));
  const auto integer = [&](int i) { return int(read_integer(planes, block + kAlignment, lane, i)); };
  const float scale = d * float(integer(g % groups) - shape.scale_zero);
  if (!shape.minima) return {scale, -float(shape.zero) * scale};
  return {scale, -(dmin * float(integer(groups + g % groups)))};
}

/// A row of blocks.
void write_blocks(const PackedPart& part, std::byte* panel, int lane, int k, const RowRef& ref) {
  const GgmlType type = *ref.source->blocks;
  const int per_block = ggml_type_info(type).columns / part.group;
  const std::byte* block = blocks_of(*ref.source, ref.row);
  uint8_t codes[kLargestGroup] = {};
  for (int g = 0; g < k / part.group; ++g) {
    std::byte* scales = const_cast<std::byte*>(part.scales(panel, g));
    const BlockScales of = read_block_scales(type, block, g % per_block);
    if (part.two_level != nullptr) {
      write_two_level(part, scales, lane, g, of);
    } else {  // f16, or a byte
      const size_t size = part.scale_bytes();
      std::memcpy(scales + size_t(lane) * size, &of.d, size);
      if (part.scales_first == 0) std::memcpy(scales + size_t(kPanel + lane) * size, &of.dmin, size);
    }
    read_block_codes(type, block, g % per_block, codes);
    write_planes(part, lane, codes, const_cast<std::byte*>(part.lines(panel, g)));
    if ((g + 1) % per_block == 0) block += ggml_type_info(type).bytes;
  }
}

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
  if (ref.source != nullptr && ref.source->blocks) return write_blocks(part, panel, lane, k, ref);
  // Of a group: an affine one's scale and bias, floats; else a scale of one byte.
  const size_t size = part.scale_bytes();
  const int groups = k / part.group, numbers = part.scales_first > 0 ? 1 : 2;
  uint8_t codes[kLargestGroup] = {};
  for (int g = 0; g < groups; ++g) {
    if (part.two_level != nullptr) write_two_level(part, const_cast<std::byte*>(part.scales(panel, g)), lane, g, {});
    const size_t of_source = size_t(ref.row) * groups + g;
    for (int i = 0; i < numbers && part.two_level == nullptr; ++i) {
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

/// How a part keeps the source's weights.
void set_format(PackedPart& part, const WeightSource& source) {
  part.type = source.type;
  if (source.blocks) {
    const BlockShape& shape = block_shape(*source.blocks);
    part.type = shape.codebook == Codebook::kE2m1 ? Type::kMxfp4 : Type::kAffine;
    part.group = shape.group;
    part.planes = planes_of(shape.bits, shape.group);
    part.scale_type = Type::kF16;
    if (shape.codebook != Codebook::kE2m1) part.codebook = shape.codebook;
    if (shape.scale_bits != 0) part.two_level = &shape;
    if (part.type == Type::kAffine && shape.scale_bits == 0) part.zero = shape.zero;
  } else if (!is_float(part.type)) {
    part.group = source.group;
    part.planes = planes_of(source.bits, source.group);
    part.scale_type = source.scale_type;
  }
}

size_t source_bytes(const WeightSource& s) {
  if (s.blocks) return size_t(s.n) * size_t(s.k / ggml_type_info(*s.blocks).columns) * size_t(ggml_type_info(*s.blocks).bytes);
  return size_t(s.n) * s.k * (is_float(s.type) ? 8 * type_size(s.type) : size_t(s.bits)) / 8;
}

/// Tells what is packed here from what else may be: by formats, shapes, and some bytes of each source.
std::string fingerprint_of(const std::vector<const WeightSource*>& sources, bool gated) {
  constexpr size_t kSample = 64;
  Hasher hasher;
  hasher.update_field(gated ? "gated" : "stacked");
  for (const WeightSource* s : sources) {
    for (const int number : {int(s->type), s->n, s->k, s->bits, s->group, int(s->scale_type), s->neighbour_heads,
                             s->blocks ? int(*s->blocks) : -1}) {
      hasher.update_field(std::to_string(number));
    }
    const size_t bytes = source_bytes(*s);
    const auto* const weight = static_cast<const std::byte*>(s->weight);
    for (const size_t at : {size_t(0), bytes / 2}) hasher.update({weight + at, std::min(kSample, bytes - at)});
  }
  return hasher.hex();
}

/// Packs rows given in packed order (a RowRef without source is padding); size a multiple of 16.
void pack_rows(PackedPart& part, int k, const std::vector<RowRef>& rows, const std::string& fingerprint,
               WeightMemory& memory) {
  part.panels = int(rows.size()) / kPanel;
  if (part.group != 0) {
    const size_t groups = size_t(k / part.group);
    part.group_bytes = part.plane_bytes(part.planes.low + part.planes.high);
    if (part.two_level != nullptr) {
      part.block_bytes = part.two_level_bytes() + part.group_bytes * size_t(part.groups_of_block());
    } else if (part.type == Type::kAffine && part.zero == 0) {
      part.group_bytes += 2 * kPanel * part.scale_bytes();
    } else {
      part.scales_first = (groups * kPanel * part.scale_bytes() + kAlignment - 1) / kAlignment * kAlignment;
    }
    part.panel_bytes = part.two_level != nullptr ? part.block_bytes * size_t(k / kTwoLevelColumns)
                                                 : part.scales_first + part.group_bytes * groups;
  } else {
    part.panel_bytes = size_t(k) * kPanel * type_size(part.type);
  }
  if (std::ranges::any_of(rows, [](const RowRef& r) { return r.source && r.source->bias; })) {
    part.bias = AlignedBuffer<float>(rows.size());
    for (size_t row = 0; row < rows.size(); ++row) {
      const WeightSource* s = rows[row].source;
      part.bias.data()[row] = s && s->bias ? load_float(s->bias, s->bias_type, size_t(rows[row].row)) : 0.0f;
    }
  }
  const size_t bytes = part.panel_bytes * size_t(part.panels);
  const WeightMemory::Place place = memory.take(bytes, fingerprint);
  part.data = place.data;
  if (place.filled) return;
  ThreadPool::shared().parallel_for(size_t(part.panels), [&](size_t panel, int) {
    for (size_t row = panel * kPanel; row < (panel + 1) * kPanel; ++row) write_row(part, k, int(row), rows[row]);
  });
  memory.filled(place, bytes);
}

void pack_part(PackedPart& part, int k, const std::vector<RowRef>& rows, const std::string& fingerprint,
               WeightMemory& memory) {
  set_format(part, *rows.front().source);
  pack_rows(part, k, rows, fingerprint, memory);
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
    GroupAffine of;
    if (part.two_level != nullptr) {
      of = read_two_level(part, scales, lane, g);
    } else {
      of.scale = load_scale(part.type, part.scale_type, scales, size_t(lane));
      if (part.zero != 0) {
        of.bias = -float(part.zero) * of.scale;
      } else if (part.type == Type::kAffine) {
        of.bias = load_float(scales, part.scale_type, size_t(kPanel + lane));
      }
    }
    read_planes(part, lane, part.lines(panel, g), codes);
    if (part.codebook != Codebook::kNone) {
      for (int i = 0; i < part.group; ++i) codes[i] = codebook_levels(part.codebook)[codes[i]];
    }
    dequantize(part.type, codes, part.group, of.scale, of.bias, out);
  }
}

/// A gate and an up of different formats become f32.
std::vector<float> to_f32(const WeightSource& s) {
  std::vector<float> out(size_t(s.n) * s.k);
  ThreadPool::shared().parallel_for(size_t(s.n), [&](size_t row, int) {
    float* to = out.data() + row * s.k;
    if (s.blocks) return dequantize_blocks(*s.blocks, blocks_of(s, int(row)), s.k, to);
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
  out.blocks.reset();
  return out;
}

}  // namespace

PackedLinear::PackedLinear(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PackedLinear::~PackedLinear() = default;

std::shared_ptr<const PackedLinear> PackedLinear::pack(const std::vector<WeightSource>& sources, Activations activations,
                                                       WeightMemory& memory) {
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
    std::vector<const WeightSource*> alike;
    size_t j = i;
    for (; j < sources.size() && same_format(sources[i], sources[j]); ++j) {
      alike.push_back(&sources[j]);
      for (int row = 0; row < sources[j].n; ++row) rows.push_back(row_ref(sources[j], row));
    }
    part.n = int(rows.size());
    rows.resize((rows.size() + kPanel - 1) / kPanel * kPanel);
    pack_part(part, impl->k, rows, fingerprint_of(alike, false), memory);
    impl->n += part.n;
    impl->parts.push_back(std::move(part));
    i = j;
  }
  return std::shared_ptr<const PackedLinear>(new PackedLinear(std::move(impl)));
}

std::shared_ptr<const PackedLinear> PackedLinear::pack_gated(const WeightSource& gate, const WeightSource& up,
                                                             Activations activations, WeightMemory& memory) {
  check(gate);
  check(up);
  if (gate.n != up.n || gate.k != up.k) invalid("Gate and up projections must have the same shape.");
  if (!same_format(gate, up)) {
    const std::vector<float> gate_values = to_f32(gate), up_values = to_f32(up);
    return pack_gated(as_f32(gate, gate_values), as_f32(up, up_values), activations, memory);
  }
  auto impl = std::make_unique<Impl>();
  impl->n = gate.n;
  impl->k = gate.k;
  impl->gated = true;
  impl->activations = activations;
  std::vector<RowRef> rows;
  for (int first = 0; first < gate.n; first += kGatedPanel) {
    for (const WeightSource* s : {&gate, &up}) {
      for (int row = first; row < first + kGatedPanel; ++row) rows.push_back(row < gate.n ? row_ref(*s, row) : RowRef{});
    }
  }
  PackedPart part;
  part.n = gate.n;
  pack_part(part, impl->k, rows, fingerprint_of({&gate, &up}, true), memory);
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
