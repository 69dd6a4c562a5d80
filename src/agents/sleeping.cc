#include <algorithm>

#include "agents/record.h"
#include "torpor/agents.h"
#include "torpor/error.h"

namespace torpor {
namespace {

/// Writes `dst` as the first `n_tokens` of `src` with the record that `change` makes of theirs.
template <typename Change>
SaveResult copy(Store& store, const std::string& src, const std::string& dst, std::optional<int64_t> n_tokens, Durability durability,
                Change change) {
  const AgentInfo info = store.agent_info(src);
  const int64_t keep = n_tokens.value_or(info.cache_size);
  if (keep < 0 || keep > info.cache_size) {
    throw Error(ErrorCode::kInvalidArgument, "The agent '" + src + "' holds " + std::to_string(info.cache_size) +
                                                 " tokens, so it can't be cut to " + std::to_string(keep) + ".");
  }
  AgentRecord record = decode_record(info.user, size_t(info.cache_size));
  record.cut(size_t(keep));
  change(record);
  CopyOptions options;
  options.n_tokens = keep;
  options.user = encode_record(record, size_t(keep));
  options.replace = src == dst;
  options.durability = durability;
  return store.copy_agent_cache(src, dst, options);
}

}  // namespace

SaveResult fork_agent(Store& store, const std::string& src, const std::string& dst, std::optional<int64_t> at_token,
                      Durability durability) {
  check_agent_id(dst);
  const auto lock = store.lock_agent(dst);
  if (store.contains(dst)) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + dst + "' already; choose another id.");
  }
  return copy(store, src, dst, at_token, durability, [](AgentRecord& record) { record.pinned = false; });
}

SaveResult import_prompt_cache(Store& store, const std::filesystem::path& path, const std::string& id, const CacheModel& model,
                               Durability durability) {
  check_agent_id(id);
  const auto lock = store.lock_agent(id);
  if (store.contains(id)) {
    throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + id + "' already; choose another id.");
  }
  const PromptCache read = store.read_prompt_cache(path, model);
  AgentRecord record;
  record.history = read.snapshot.tokens.size();
  record.shortest_cut = size_t(read.shortest_cut);
  return store.save_agent_cache(id, read.snapshot, model.name, encode_record(record, record.history), durability);
}

SaveResult rewind_agent(Store& store, const std::string& id, int64_t n_tokens, Durability durability) {
  const auto lock = store.lock_agent(id);
  return copy(store, id, id, n_tokens, durability, [](AgentRecord&) {});
}

void pin_agent(Store& store, const std::string& id, bool pinned, Durability durability) {
  const auto lock = store.lock_agent(id);
  copy(store, id, id, std::nullopt, durability, [&](AgentRecord& record) { record.pinned = pinned; });
}

bool is_pinned(const AgentInfo& info) {
  return std::find(info.user.begin(), info.user.end(), std::pair<std::string, std::string>("pinned", "true")) != info.user.end();
}

Divergence find_divergence(std::span<const int32_t> prompt, std::span<const int32_t> held) {
  const auto [end, ignored] = std::mismatch(prompt.begin(), prompt.end(), held.begin(), held.end());
  return {end - prompt.begin(), int64_t(prompt.size()), int64_t(held.size())};
}

}  // namespace torpor
