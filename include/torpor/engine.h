#pragma once
/// Durable agents over one model: the C++ API that the command line and the other faces use. No header of MLX's is needed.
///
/// An Engine owns the one thread that touches MLX. Its methods may be called from any thread and block until that thread
/// has done the work; they run one at a time, in order. Callbacks run on the engine thread. Errors are torpor::Error.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "torpor/agents.h"
#include "torpor/error.h"
#include "torpor/generate_options.h"
#include "torpor/memory_usage.h"
#include "torpor/model_info.h"
#include "torpor/store.h"

namespace torpor {

struct EngineOptions {
  std::string model;                  ///< directory or repo id
  std::filesystem::path store = default_store_root();
  std::optional<KvFormat> kv_format;    ///< of new agents; nullopt: the model's own, and an agent on disk goes on in its own
  Durability durability = Durability::kFull;
  /// Bytes of KV held in memory, real buffers, each once; 0 = no bound. Over it the least recently used agents that are not
  /// pinned go to sleep; when none can, kResourceExhausted says what holds the memory.
  size_t memory_budget = 0;
  DiskLimits disk;
  size_t write_queue_bytes = size_t(256) << 20;  ///< saves behind the turn that may wait; beyond it a turn waits for the disk
};

/// A model as the store needs it to make an agent of a file that does not say whose it is (import_prompt_cache,
/// torpor/agents.h). Its files are read for their digests; no weights are kept. Errors as the Engine's constructor gives them.
CacheModel describe_model(const std::string& name);

struct TurnRequest {
  /// Empty: a prompt without an agent. It starts from the longest prefix that anyone has, and leaves its own sealed segments
  /// for others (save), but nothing with a name.
  std::string agent;
  std::string prompt;                 ///< UTF-8; one user message, or plain text with `raw`
  std::optional<std::string> system;  ///< for a new agent; must equal the agent's own otherwise (kInvalidArgument)
  bool raw = false;                   ///< append the prompt as it stands, without the chat template
  SaveMode save = SaveMode::kWait;
  GenerateOptions generate;
};

struct TurnResult {
  std::string agent, model, text;
  FinishReason finish_reason = FinishReason::kLength;
  struct Tokens {
    int prompt = 0;     ///< before generation; cached + prefilled
    int cached = 0;     ///< of those, reused from the agent, or from whoever has begun alike
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
  /// Set when the answer is complete but could not be saved, or the turn before it (kBehind): nothing is lost while the
  /// agent stays awake.
  std::optional<Error> save_error;
};

class Engine {
 public:
  /// Loads the model. The calling thread waits.
  explicit Engine(EngineOptions options);
  /// Waits for the work under way and for queued saves. What was not saved is dropped.
  ~Engine();

  /// One user turn: wakes the agent (or makes it), prefills what is new, generates, saves. The agent stays awake. A new agent
  /// starts from the longest prefix that any agent in memory (to the token) or segment on disk has.
  /// A save that fails is said in the result, not thrown, for the answer stands; the agent then is awake and unsaved.
  TurnResult turn(const TurnRequest& request);

  /// Begins to load a sleeping agent beside whatever turn is under way, so that its own turn finds it ready. Does not wait.
  /// False when nothing was begun: no such agent, being loaded already, or enough others are.
  bool prefetch(const std::string& agent);
  /// Saves if changed and waits. kNotFound unless the agent is awake or on disk.
  SaveResult save(const std::string& agent);
  /// Saves every awake agent and waits, telling how many of how many are done. All are tried; then the first error is thrown.
  void save_all(const std::function<void(int done, int total)>& progress = nullptr);
  /// Waits for saves that turns have queued (SaveMode::kBehind), and throws the first error that no later turn or save has told:
  /// the destructor, which waits too, can't.
  void finish_saves();
  /// Saves if changed, then lets go of memory and lock. No-op for an agent that is not awake.
  void sleep(const std::string& agent);

  // What follows works on agents awake or asleep: kNotFound when they are neither, kInvalidArgument when a new name is taken.
  /// `dst` begins with the first `at_token` tokens of `src` (all unless given). Copies no tensor: both go on from shared
  /// buffers, and on disk from shared segments.
  void fork(const std::string& src, const std::string& dst, std::optional<int64_t> at_token = std::nullopt);
  /// Forgets everything after the first `n_tokens` tokens.
  void rewind(const std::string& agent, int64_t n_tokens);
  /// A pinned agent stays in memory when others must make room.
  void pin(const std::string& agent, bool pinned = true);
  void rename(const std::string& agent, const std::string& new_id);
  void remove(const std::string& agent);

  MemoryUsage memory_usage() const;

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
