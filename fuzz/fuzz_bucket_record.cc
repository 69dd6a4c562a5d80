/// The records of a bucket: heads, leases, the sweep's and the seal's, and manifests. Any bytes are refused with one
/// sentence, or are a record as Torpor writes it. What follows the checksum may be anything: the target makes it.

#include <cstdint>
#include <string>
#include <string_view>

#include "base/hash.h"
#include "remote/records.h"
#include "require.h"
#include "torpor/error.h"

namespace {

using namespace torpor::remote;

/// What is read is written as the same bytes.
template <typename Again>
void try_reading(std::string_view text, Again again) {
  try {
    require(again() == text);
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption || error.code() == torpor::ErrorCode::kIncompatible);
  }
}

void try_all(std::string_view text) {
  try_reading(text, [&] { return encode(decode_head(text, "agents/ada/head")); });
  try_reading(text, [&] { return encode(decode_sweep(text, kSweepKey)); });
  try_reading(text, [&] { return encode(decode_lease(text, "nodes/w1-77")); });
  try_reading(text, [&] { return encode(decode_seal(text, kSealKey)); });
}

void try_manifest(const std::string& text) {
  try_reading(text, [&] {
    return encode_manifest(decode_manifest(text, "k")) + text.substr(manifest_bytes(text, text.size(), "k"));
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string rest(reinterpret_cast<const char*>(data), size);
  const std::string beginning = "{\"checksum\":\"";
  const std::string sealed = beginning + torpor::hash_hex(beginning + std::string(32, '0') + rest) + rest;
  try_all(rest);
  try_all(sealed);
  std::string length;
  for (int i = 0; i < 8; ++i) length.push_back(char(sealed.size() >> (8 * i) & 0xff));
  try_manifest(rest);
  try_manifest(length + sealed);
  try_manifest(length + sealed + "agent file");
  if (const auto name = parse_pool_key(rest)) require(pool_key(*name) == rest);
  if (const auto name = parse_save_name(rest)) require(save_name(*name) == rest);
  return 0;
}
