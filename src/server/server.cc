#include "server/server.h"

#include <utility>

#include "torpor/error.h"

namespace torpor::server {

Server::Server(ServerOptions options)
    : models_(std::move(options.pool)),
      metrics_(options.vllm_names),
      metered_(models_, metrics_),
      dialects_(metered_, {&models_.model("").engine().store()}),  // the first model stays
      queue_(options.queue),
      agents_(models_, metrics_, dialects_.replay(), queue_),
      service_(std::move(options.service), queue_, dialects_, agents_, metrics_) {
  metrics_.add_source([this](std::string& out) { write_samples(out); });
}

void Server::write_samples(std::string& out) {
  const MemoryUsage usage = models_.memory_usage();
  write_sample(out, "torpor_model_bytes", "gauge", "Memory of the model's weights.", usage.model_bytes);
  write_sample(out, "torpor_kv_bytes", "gauge", "Memory of agents' caches, each buffer once.", usage.kv_bytes);
  write_sample(out, "torpor_kv_mapped_bytes", "gauge", "Of those, pages of segment files.", usage.mapped_bytes);
  write_sample(out, "torpor_kv_budget_bytes", "gauge", "What bounds them; 0: nothing.", usage.budget);
  // As torpor.ray scales: others are there only because there is room.
  int64_t held = 0;
  for (const AgentMemory& agent : usage.agents) held += agent.unsaved || agent.pinned ? agent.bytes : 0;
  const double ratio = usage.budget > 0 ? double(held) / double(usage.budget) : 0;
  write_sample(out, "torpor_kv_held_ratio", "gauge",
               "The part of the budget that agents hold who may not sleep now; 0 without a budget.", ratio);
  if (metrics_.vllm_names()) write_sample(out, "vllm:kv_cache_usage_perc", "gauge", "As torpor_kv_held_ratio.", ratio);
  write_sample(out, "torpor_save_queue_bytes", "gauge", "Waiting to be written.", usage.queued_bytes);
  write_sample(out, "torpor_agents_awake", "gauge", "Agents in memory.", usage.agents.size());
  const EngineWork work = models_.work();
  write_sample(out, "torpor_speculated_tokens_total", "counter",
               "Tokens of answers that were guessed before they were sampled.",
               work.accepted_tokens + work.rejected_tokens);
  write_sample(out, "torpor_speculated_tokens_accepted_total", "counter", "Of those, the ones that were right.",
               work.accepted_tokens);
  write_sample(out, "torpor_evictions_total", "counter", "Agents that went to sleep to make room.", usage.evictions);
}

std::string served_name(const std::string& model) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(model, ignored)) return model;
  return std::filesystem::canonical(model).filename().string();
}

ModelAlias parse_alias(const std::string& text) {
  const size_t equals = text.rfind('=');
  if (equals == std::string::npos || equals == 0) {
    throw Error(ErrorCode::kInvalidArgument, "'" + text + "' is no alias; write PATTERN=NAME").with_field("alias");
  }
  return {text.substr(0, equals), text.substr(equals + 1)};
}

}  // namespace torpor::server
