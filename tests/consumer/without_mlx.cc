/// An embedder that wants turns and the store alone: compiled where no header of MLX's can be found.

#include <torpor/engine.h>
#include <torpor/exchange.h>
#include <torpor/model_info.h>
#include <torpor/store.h>

/// Answers one prompt and says how many tokens the store's agents hold. Never called: it has to compile and link.
int64_t turn_without_mlx(const char* model, const char* root) {
  torpor::EngineOptions options{.model = model, .store = root};
  torpor::Engine engine(options);
  torpor::TurnRequest request{.agent = "ada", .prompt = "Hello."};
  request.generate.on_text = [](std::string_view) {};
  const torpor::TurnResult result = engine.turn(request);
  int64_t tokens = result.finish_reason == torpor::FinishReason::kStop ? engine.memory_usage().kv_bytes : 0;
  for (const torpor::AgentInfo& info : engine.store().list_cached_agents()) tokens += info.cache_size;
  torpor::export_prompt_cache(engine.store(), "ada", "ada.safetensors", torpor::mlx_lm_rotates_windows);
  return tokens + engine.model().n_layers;
}
