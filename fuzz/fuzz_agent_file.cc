/// Agent files, exports and segments: any bytes give a file whose parts agree with each other, or kCorruption
/// (kIncompatible for a format version to come).

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

#include "sign_header.h"
#include "store/agent_file.h"
#include "store/segment.h"
#include "torpor/error.h"

namespace {

void require(bool ok, int line = __builtin_LINE()) {
  if (ok) return;
  std::fprintf(stderr, "line %d: what was promised does not hold\n", line);
  std::abort();
}

void check(const torpor::TorporFile& file, uint64_t file_size) {
  require(file.header.data_start + file.rows_bytes() <= file_size);
  require(file.checksums.size() == file.header.tensors.size());
  require(file.header.data_start + file.tokens_tensor().end == file_size);
  uint64_t state_end = file.rows_bytes();
  for (const auto& tensor : file.state()) {
    require(tensor.begin == state_end && tensor.size() > 0);
    state_end = tensor.end;
  }
  require(state_end == file.tokens_tensor().begin);
  require(file.tokens_tensor().size() == file.n_tokens * 4);
}

template <typename Parse>
void attempt(Parse parse, bool is_export = false) {
  try {
    parse();
  } catch (const torpor::Error& error) {
    require(error.code() == torpor::ErrorCode::kCorruption || error.code() == torpor::ErrorCode::kIncompatible ||
            (is_export && error.code() == torpor::ErrorCode::kInvalidArgument)); // sound, but no export
  }
}

void check_agent(const torpor::AgentFile& agent, uint64_t file_size, bool is_export) {
  check(agent.file, file_size);
  require(torpor::is_agent_id(agent.info.agent_id));
  require(agent.info.cache_size == int64_t(agent.file.n_tokens));
  require(is_export ? agent.info.segments.empty()
                    : agent.info.segments.size() * torpor::kSegmentTokens + agent.file.rows == agent.file.n_tokens);
}

void check_all(std::span<const std::byte> bytes) {
  const uint64_t size = bytes.size();
  attempt([&] { check_agent(torpor::parse_agent_file(bytes, size, "fuzzed"), size, false); });
  attempt([&] { check_agent(torpor::parse_export_file(bytes, size, "fuzzed"), size, true); }, true);
  attempt([&] { check(torpor::parse_segment_file(bytes, size, "fuzzed").file, size); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  check_all(bytes);
  std::vector<std::byte> signed_bytes(bytes.begin(), bytes.end());
  torpor::testing::sign(signed_bytes);
  check_all(signed_bytes);
  return 0;
}
