#include <algorithm>

#include "agents/record.h"
#include "torpor/agents.h"
#include "torpor/error.h"

namespace torpor {
namespace {

/// Writes `dst` as the first `n_tokens` of `src` with the record that `change` makes of theirs.
template <typename Change>
SaveResult copy(Store& store, const std::string& src, const std::string& dst, std::optional<int64_t> n_tokens,
                Durability durability, Change change) {
  const AgentInfo info = store.agent_info(src);
  const int64_t keep = n_tokens.value_or(info.cache_size);
  if (keep < 0 || keep > info.cache_size) {
    throw Error(ErrorCode::kInvalidArgument, "The agent '" + src + "' holds " + std::to_string(info.cache_size) +
                                                 " tokens, so it can't be cut to " + std::to_string(keep) + ".");
  }
  AgentRecord record = decode_record({{}, info.record}, size_t(info.cache_size));
  record.cut(size_t(keep));
  change(record);
  CopyOptions options;
  options.n_tokens = keep;
  options.record = encode_record(record, size_t(keep)).record;
  options.replace = src == dst;
  options.durability = durability;
  return store.copy_agent_cache(src, dst, options);
}

void require_free(const Store& store, const std::string& id) {
  check_agent_id(id);
  if (!store.contains(id)) return;
  throw Error(ErrorCode::kInvalidArgument, "There is an agent '" + id + "' already; choose another id.")
      .with_agent(id)
      .with_field(kAgentTaken);
}

/// The lock of an agent that is not there yet.
std::unique_ptr<AgentLock> lock_new(Store& store, const std::string& id) {
  require_free(store, id);
  auto lock = store.lock_agent(id);
  require_free(store, id);  // until the lock was held another process could make it
  return lock;
}

/// The lock of an agent that is there. kNotFound leaves no lock file behind.
std::unique_ptr<AgentLock> lock_existing(Store& store, const std::string& id) {
  store.agent_info(id);
  return store.lock_agent(id);
}

}  // namespace

SaveResult fork_agent(Store& store, const std::string& src, const std::string& dst, std::optional<int64_t> at_token,
                      Durability durability) {
  store.agent_info(src);  // a lock that nothing comes of would leave its file behind
  const auto lock = lock_new(store, dst);
  return copy(store, src, dst, at_token, durability, [](AgentRecord& record) { record.pinned = false; });
}

SaveResult import_prompt_cache(Store& store, const std::filesystem::path& path, const std::string& id,
                               const CacheModel& model, Durability durability) {
  require_free(store, id);
  const PromptCache read = read_prompt_cache(path, model, &store.env());
  const auto lock = lock_new(store, id);
  AgentRecord record;
  record.history = read.snapshot.tokens.size();
  record.shortest_cut = size_t(read.shortest_cut);
  return store.save_agent_cache(id, read.snapshot, model.name, {}, durability, encode_record(record, record.history));
}

SaveResult rewind_agent(Store& store, const std::string& id, int64_t n_tokens, Durability durability) {
  const auto lock = lock_existing(store, id);
  return copy(store, id, id, n_tokens, durability, [](AgentRecord&) {});
}

void pin_agent(Store& store, const std::string& id, bool pinned, Durability durability) {
  const auto lock = lock_existing(store, id);
  copy(store, id, id, std::nullopt, durability, [&](AgentRecord& record) { record.pinned = pinned; });
}

bool is_pinned(const AgentInfo& info) {
  return std::find(info.record.begin(), info.record.end(), RecordMetadata::value_type("pinned", "true")) !=
         info.record.end();
}

Divergence find_divergence(std::span<const int32_t> prompt, std::span<const int32_t> held) {
  const auto [end, ignored] = std::mismatch(prompt.begin(), prompt.end(), held.begin(), held.end());
  return {end - prompt.begin(), int64_t(prompt.size()), int64_t(held.size())};
}

}  // namespace torpor
