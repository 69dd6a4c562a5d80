#include "kernels/weight_formats.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

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

float e8m0_to_float(uint8_t e) { return std::bit_cast<float>(e == 0 ? 0x00400000u : uint32_t(e) << 23); }

float e4m3_to_float(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80) << 24, magnitude = code & 0x7f;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  return std::bit_cast<float>(sign | magnitude << 20) * 0x1p120f;
}

constexpr float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

/// The u32 of `lane` in line `i`.
std::byte* word_of(std::byte* lines, int lane, int i) { return lines + size_t(i) * kAlignment + size_t(lane) * 4; }

/// `bits` of each byte, from bit `from` up, on each byte's lowest ones.
uint32_t field(uint32_t bytes, int from, int bits) { return (bytes >> from) & (((1u << bits) - 1) * 0x01010101u); }

/// A plane of `width` bits holds 8 / width words of 4 codes in a line.
void write_plane(int width, int from, int group, int lane, const uint8_t* codes, std::byte* lines) {
  const int per_line = 8 / width;
  for (int i = 0; i < group / 4; i += per_line) {
    uint32_t line = 0;
    for (int j = 0; j < per_line; ++j) {
      uint32_t bytes;
      std::memcpy(&bytes, codes + (i + j) * 4, 4);
      line |= field(bytes, from, width) << (j * width);
    }
    std::memcpy(word_of(lines, lane, i / per_line), &line, 4);
  }
}

/// Adds a plane's bits to the codes.
void read_plane(int width, int from, int group, int lane, const std::byte* lines, uint8_t* codes) {
  const int per_line = 8 / width;
  for (int i = 0; i < group / 4; ++i) {
    uint32_t line, bytes;
    std::memcpy(&line, word_of(const_cast<std::byte*>(lines), lane, i / per_line), 4);
    std::memcpy(&bytes, codes + i * 4, 4);
    bytes |= field(line, i % per_line * width, width) << from;
    std::memcpy(codes + i * 4, &bytes, 4);
  }
}

}  // namespace

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

float load_scale(Type type, Type scale_type, const void* scales, size_t i) {
  if (type == Type::kAffine) return load_float(scales, scale_type, i);
  const uint8_t byte = static_cast<const uint8_t*>(scales)[i];
  return type == Type::kNvfp4 ? e4m3_to_float(byte) : e8m0_to_float(byte);
}

void dequantize(Type type, const uint8_t* codes, int group, float scale, float bias, float* out) {
  for (int i = 0; i < group; ++i) {
    if (type == Type::kAffine) {
      out[i] = float(codes[i]) * scale + bias;
    } else {
      out[i] = (type == Type::kMxfp8 ? e4m3_to_float(codes[i]) : kE2m1[codes[i]]) * scale;
    }
  }
}

void check_format(const WeightSource& s) {
  const auto invalid = [](const std::string& what) { throw Error(ErrorCode::kInvalidArgument, what); };
  if (s.type != Type::kAffine) {
    const int bits = s.type == Type::kMxfp8 ? 8 : 4, group = s.type == Type::kNvfp4 ? 16 : 32;
    if (s.bits != bits || s.group != group) {
      invalid("Weights of this format have " + std::to_string(bits) + " bits in groups of " + std::to_string(group) + ".");
    }
  }
  if (s.bits < 2 || s.bits > 8 || s.bits == 7) {
    invalid("Weights of " + std::to_string(s.bits) + " bits are not supported; use 2, 3, 4, 5, 6 or 8.");
  }
  if (s.group != 16 && s.group != 32 && s.group != 64 && s.group != 128) {
    invalid("Groups of " + std::to_string(s.group) + " are not supported; use 16, 32, 64 or 128.");
  }
  if (s.k % s.group != 0) {
    invalid("A quantized weight of " + std::to_string(s.k) + " columns is not whole groups of " + std::to_string(s.group) + ".");
  }
}

void read_codes(const WeightSource& source, size_t g, uint8_t* codes) {
  // A row is a stream of bits; 8 weights fill whole bytes of it.
  const auto* from = static_cast<const std::byte*>(source.weight) + g * size_t(source.group * source.bits / 8);
  const uint64_t mask = (1u << source.bits) - 1;
  for (int i = 0; i < source.group; i += 8, from += source.bits) {
    uint64_t eight = 0;
    std::memcpy(&eight, from, size_t(source.bits));
    for (int j = 0; j < 8; ++j) codes[i + j] = uint8_t((eight >> (j * source.bits)) & mask);
  }
}

void write_planes(const PackedPart& part, int lane, const uint8_t* codes, std::byte* lines) {
  const auto [low, high] = part.planes;
  write_plane(low, 0, part.group, lane, codes, lines);
  if (high != 0) write_plane(high, low, part.group, lane, codes, lines + part.plane_bytes(low));
}

void read_planes(const PackedPart& part, int lane, const std::byte* lines, uint8_t* codes) {
  const auto [low, high] = part.planes;
  std::fill_n(codes, part.group, uint8_t{0});
  read_plane(low, 0, part.group, lane, lines, codes);
  if (high != 0) read_plane(high, low, part.group, lane, lines + part.plane_bytes(low), codes);
}

}  // namespace torpor::kernels
