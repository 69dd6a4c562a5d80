/// Agent files, parts, exports, segments, states and messages: any bytes give a file whose parts agree with each other, or kCorruption
/// (kIncompatible for a format version to come).

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "require.h"
#include "sign_header.h"
#include "store/agent_file.h"
#include "store/messages.h"
#include "store/segment.h"
#include "store/state_file.h"
#include "torpor/error.h"

namespace {

void check(const torpor::TorporFile& file, uint64_t file_size) {
  require(file.header.data_start + file.rows_bytes() <= file_size);
  require(file.checksums.size() == file.header.tensors.size());
  require(file.header.data_start + file.tokens_tensor().end == file_size);
  uint64_t state_end = file.rows_bytes();
  for (const auto& tensor : file.state()) {
    require(tensor.begin == state_end && tensor.size() > 0);
    state_end = tensor.end;
  }
  if (file.has_messages) {
    const auto& messages = file.header.tensors[file.messages_index()];
    require(messages.begin == state_end && messages.size() > 0);
    state_end = messages.end;
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
  require(agent.info.cache_size == agent.first + int64_t(agent.file.n_tokens));
  int64_t end = 0, rows = int64_t(agent.file.rows);
  for (const torpor::PartRef& part : agent.parts) {
    require(part.first == end && part.tokens >= 0 && part.rows >= 0 && part.rows <= part.tokens);
    end = part.end();
    rows += part.rows;
  }
  require(end == agent.first);
  int64_t before = 0;
  for (const torpor::StateRef& state : torpor::states_of(agent.info)) {
    require(state.position > before && state.position <= agent.info.cache_size);
    require(is_export ? state.file.empty() && agent.file.state_tensors > 0 : torpor::is_hex_digest(state.file));
    before = state.position;
  }
  require(is_export ? agent.info.segments.empty()
                    : int64_t(agent.info.segments.size()) * torpor::kSegmentTokens + rows == agent.info.cache_size);
}

void check_all(std::span<const std::byte> bytes) {
  const uint64_t size = bytes.size();
  attempt([&] { check_agent(torpor::parse_agent_file(bytes, size, "fuzzed"), size, false); });
  attempt([&] { check_agent(torpor::parse_export_file(bytes, size, "fuzzed"), size, true); }, true);
  attempt([&] { check(torpor::parse_segment_file(bytes, size, "fuzzed").file, size); });
  attempt([&] {
    const torpor::StateFile state = torpor::parse_state_file(bytes, size, "fuzzed");
    check(state.file, size);
    uint64_t state_bytes = 0;
    for (const auto& tensor : state.file.state()) state_bytes += tensor.size();
    require(state.layout.bytes() == state_bytes && state.file.n_tokens < torpor::kSegmentTokens);
  });
  static const torpor::KnownLayout layout{"layer_0_keys:F16:1:2:0:rows,layer_0_values:F16:1:2:0:rows", 8};
  attempt([&] {
    const torpor::PartFile part = torpor::parse_part_file(bytes, size, "fuzzed", layout);
    check(part.file, size);
    require(part.first >= 0 && part.file.rows <= part.file.n_tokens && part.file.rows_bytes() == 8 * part.file.rows);
  });
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  attempt([&] {
    // What is taken apart is put together again.
    const auto messages = torpor::decode_messages(text, "fuzzed");
    require(torpor::decode_messages(torpor::encode_messages(messages), "fuzzed") == messages);
  });
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
