#include "server/overview.h"

#include <algorithm>

#include "server/keys.h"
#include "torpor/version.h"

namespace torpor::server {
namespace {

const char* state_name(TurnRecord::State state) {
  switch (state) {
    case TurnRecord::State::kWaiting: return "waiting";
    case TurnRecord::State::kReading: return "reading";
    case TurnRecord::State::kAnswering: return "answering";
    case TurnRecord::State::kEnded: break;
  }
  return "ended";
}

Json record_json(const TurnRecord& record) {
  return Json{{"id", record.id},
              {"agent", record.agent},
              {"begun_at_ms", record.begun_at},
              {"state", state_name(record.state)},
              {"prompt_tokens", record.prompt_tokens},
              {"cached_tokens", record.cached_tokens},
              {"done", record.done},
              {"total", record.total}};
}

}  // namespace

Json now_json(ModelPool& pool, Metrics& metrics, const std::string& tenant) {
  Json turns = Json::array();
  for (const TurnRecord& record : metrics.turns().running(tenant)) turns.push_back(record_json(record));
  const size_t all = std::max(metrics.turns().running(), turns.size());
  Json models = Json::array();
  for (const ModelEntry& entry : pool.models()) models.push_back(Json{{"name", entry.name}, {"loaded", entry.loaded}});
  const EngineWork work = pool.work();
  const std::vector<ModelPool::Lease> loaded = pool.loaded();
  const ModelInfo& model = loaded.front().engine().model();
  return Json{{"version", TORPOR_VERSION},
              {"model", Json{{"name", model.name},
                             {"architecture", model.architecture},
                             {"context", model.max_context},
                             {"bytes", model.weight_bytes}}},
              {"models", std::move(models)},
              {"others", all - turns.size()},
              {"turns", std::move(turns)},
              {"work", Json{{"passes", work.passes},
                            {"turns", work.turns},
                            {"most_turns", work.most_turns},
                            {"prompt_tokens", work.prompt_tokens},
                            {"answer_tokens", work.answer_tokens},
                            {"accepted_tokens", work.accepted_tokens},
                            {"rejected_tokens", work.rejected_tokens},
                            {"put_aside", work.put_aside}}}};
}

Json requests_json(Metrics& metrics, const std::string& tenant) {
  Json requests = Json::array();
  for (const TurnRecord& record : metrics.turns().ended(tenant)) {
    Json request = record_json(record);
    request["generated_tokens"] = record.generated_tokens;
    request["waited_ms"] = record.waited_ms;
    request["read_ms"] = record.read_ms;
    request["answered_ms"] = record.answered_ms;
    request["reason"] = record.reason;
    request["missed"] = record.missed;
    requests.push_back(std::move(request));
  }
  return Json{{"requests", std::move(requests)}};
}

Json memory_json(ModelPool& pool, const std::string& tenant) {
  const MemoryUsage usage = pool.memory_usage();
  const std::vector<ModelPool::Lease> loaded = pool.loaded();
  Store& store = loaded.front().engine().store();
  Json agents = Json::array();
  for (const AgentMemory& memory : usage.agents) {
    const auto name = agent_name_of(tenant, memory.agent);
    if (!name) continue;
    agents.push_back(Json{{"agent", *name},
                          {"tokens", memory.tokens},
                          {"bytes", memory.bytes},
                          {"shared_bytes", memory.shared_bytes},
                          {"pinned", memory.pinned},
                          {"unsaved", memory.unsaved}});
  }
  const DiskUsage disk = store.get_cache_disk_usage();
  const DiskLimits limits = store.kept_disk_limits();
  return Json{{"model_bytes", usage.model_bytes},
              {"kv_bytes", usage.kv_bytes},
              {"mapped_bytes", usage.mapped_bytes},
              {"queued_bytes", usage.queued_bytes},
              {"budget_bytes", usage.budget},
              {"evictions", usage.evictions},
              {"agents", std::move(agents)},
              {"disk", Json{{"total_bytes", disk.total_bytes},
                            {"agents", disk.agents},
                            {"agent_bytes", disk.agent_bytes},
                            {"segments", disk.segments},
                            {"segment_bytes", disk.segment_bytes},
                            {"states", disk.states},
                            {"state_bytes", disk.state_bytes},
                            {"orphan_segments", disk.orphan_segments},
                            {"orphan_bytes", disk.orphan_bytes},
                            {"budget_bytes", limits.budget},
                            {"min_free_bytes", limits.min_free}}}};
}

Json map_json(Engine& engine, const AgentName& agent) {
  Store& store = engine.store();
  const AgentInfo info = store.agent_info(agent.id);
  Json messages = Json::array();
  for (const StoredMessage& message : store.agent_messages(agent.id)) {
    messages.push_back(Json{{"begin", message.begin},
                            {"end", message.end},
                            {"message", parse_json<Json>(message.json, nullptr, false)}});
  }
  // Segments are named by all that comes before them: who shares one shares those before it, too.
  std::vector<Json> shared(info.segments.size(), Json::array());
  Json branches = Json::array();
  for (const AgentInfo& other : store.list_cached_agents()) {
    const auto name = agent_name_of(agent.tenant, other.agent_id);
    if (!name || other.agent_id == agent.id) continue;
    const auto [mine, theirs] = std::mismatch(info.segments.begin(), info.segments.end(), other.segments.begin(),
                                              other.segments.end());
    const size_t common = size_t(mine - info.segments.begin());
    for (size_t i = 0; i < common; ++i) shared[i].push_back(*name);
    if (common > 0)
      branches.push_back(Json{{"agent", *name}, {"tokens", other.cache_size}, {"common_tokens", common * kSegmentTokens}});
  }
  Json segments = Json::array();
  for (size_t i = 0; i < info.segments.size(); ++i)
    segments.push_back(Json{{"name", info.segments[i]}, {"shared_with", std::move(shared[i])}});
  return Json{{"agent", agent.name},
              {"tokens", info.cache_size},
              {"segment_tokens", kSegmentTokens},
              {"bytes", info.bytes},
              {"own_bytes", info.tail_bytes},
              {"messages", std::move(messages)},
              {"segments", std::move(segments)},
              {"branches", std::move(branches)}};
}

}  // namespace torpor::server
