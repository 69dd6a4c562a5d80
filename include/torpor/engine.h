#pragma once
/// Durable agents over one model: the C++ API that the command line and the other faces use.
///
/// An Engine owns the one thread that touches MLX. Its methods may be called from any thread and block until that thread
/// has done the work; they run one at a time, in order. Callbacks run on the engine thread. Errors are torpor::Error.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "torpor/error.h"
#include "torpor/generate.h"
#include "torpor/store.h"

namespace torpor {

struct EngineOptions {
  std::string model;                  ///< directory or repo id
  std::filesystem::path store = default_store_root();
  std::optional<KvFormat> kv_format;    ///< nullopt: the model's own
  Durability durability = Durability::kFull;
};

struct TurnRequest {
  std::string agent;
  std::string prompt;                 ///< UTF-8; one user message, or plain text with `raw`
  std::optional<std::string> system;  ///< for a new agent; must equal the agent's own otherwise (kInvalidArgument)
  bool raw = false;                   ///< append the prompt as it stands, without the chat template
  bool save = true;
  GenerateOptions generate;
};

struct TurnResult {
  std::string agent, model, text;
  FinishReason finish_reason = FinishReason::kLength;
  struct Tokens {
    int prompt = 0;     ///< before generation; cached + prefilled
    int cached = 0;     ///< of those, reused from the agent
    int prefilled = 0;  ///< computed now
    int generated = 0;
    int context = 0;    ///< held by the agent afterwards
  } tokens;
  struct Timing {
    double load = 0;    ///< the model, once per engine
    double wake = 0;    ///< the agent's cache from disk
    double ttft = 0;    ///< turn's start (agent still asleep) to the first token
    double decode = 0;
    double save = 0;
  } timing_ms;
  struct Bytes {
    int64_t read = 0, written = 0;
  } bytes;
  /// Set when the agent was damaged on disk and went on from its longest intact prefix.
  std::optional<std::string> damage;
  /// Set when the answer is complete but could not be saved: nothing is lost while the agent stays awake.
  std::optional<Error> save_error;
};

class Engine {
 public:
  /// Loads the model. The calling thread waits.
  explicit Engine(EngineOptions options);
  /// Waits for the work under way. Awake agents that were not saved are dropped.
  ~Engine();

  /// One user turn: wakes the agent (or makes it), prefills what is new, generates, saves. The agent stays awake.
  /// A save that fails is said in the result, not thrown, for the answer stands; the agent then is awake and unsaved.
  TurnResult turn(const TurnRequest& request);

  /// Saves if changed, then lets go of memory and lock. No-op for an agent that is not awake.
  void sleep(const std::string& agent);

  /// Logits `[vocab]` that follow the agent's last token (recomputed from its cache without changing it); for tests and
  /// inspection. kNotFound.
  std::vector<float> next_logits(const std::string& agent);

  const ModelInfo& model() const;
  Store& store();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor
