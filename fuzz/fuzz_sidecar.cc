/// Sidecars: what follows the checksum may be anything. It is refused, or gives numbers that can be added up, and is read
/// again as it is written again.

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/hash.h"
#include "require.h"
#include "store/sidecar.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // As the seeds say (scripts/make-fuzz-corpus).
  torpor::FileStat file;
  file.size = 1000;
  file.mtime_ns = 5;
  file.inode = 7;
  const std::string beginning = "{\n  \"sidecar_checksum\": \"";
  const std::string rest(reinterpret_cast<const char*>(data), size);
  const std::string text = beginning + torpor::hash_hex(beginning + std::string(32, '0') + rest) + rest;
  require(torpor::is_sidecar(text));
  const auto info = torpor::decode_sidecar(text, file);
  if (!info) return 0;
  require(info->cache_size >= 0 && info->tail_bytes >= int64_t(file.size) && info->bytes >= info->tail_bytes);
  const auto again = torpor::decode_sidecar(torpor::encode_sidecar(*info, file), file);
  require(again && again->agent_id == info->agent_id && again->bytes == info->bytes &&
          again->segments == info->segments);
  require(again->lineage.ranges == info->lineage.ranges && again->user == info->user && again->record == info->record);
  return 0;
}
