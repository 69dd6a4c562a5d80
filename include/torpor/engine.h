#pragma once
/// Durable agents over one model: the C++ API that the command line and the other faces use. No header of MLX's is needed.
///
/// An Engine owns the one thread that touches MLX. Its methods may be called from any thread and block until that thread has
/// done the work. It works step by step. A step is one forward pass: the next token of every answer, and a chunk of one or two
/// prompts. On Torpor's kernels no turn's tokens or rows depend on what else is computed with it. MLX's kernels compute one turn
/// at a time. Methods run between steps. What names the same agent runs in the order it came. Saves are waited for on the calling
/// thread, while other agents' turns go on.
///
/// Callbacks run on the thread that called. They may call the Engine. A call that would wait for the turn from whose callback
/// it is made is kInvalidArgument: one on the same agent, and save_all. The destructor must not be called there. What a callback
/// throws comes out of the method as it is; all other errors are torpor::Error.
///
/// fork(2): an Engine works in the process that made it. In a child its methods are kInvalidArgument.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "torpor/agents.h"
#include "torpor/compute_options.h"
#include "torpor/error.h"
#include "torpor/generate_options.h"
#include "torpor/memory_usage.h"
#include "torpor/message.h"
#include "torpor/model_info.h"
#include "torpor/remote_tier.h"
#include "torpor/store.h"
#include "torpor/text.h"

namespace torpor {

/// The thread and the memory budget that several engines of one process have in common. Opaque.
class EngineHost;
/// `memory_budget` and `text_queue_bytes` as in EngineOptions, over all of its engines.
std::shared_ptr<EngineHost> make_engine_host(size_t memory_budget = 0, size_t text_queue_bytes = size_t(64) << 10);

struct EngineOptions {
  std::string model;                  ///< directory or repo id
  std::filesystem::path store = default_store_root();
  /// The dtype, bits and group of new agents' rows; the rest is the model's to say (Model::refined). nullopt: the model's
  /// own. An agent on disk goes on in its own format. Of another dtype, bits or group than given it is kIncompatible.
  std::optional<KvFormat> kv_format;
  Durability durability = Durability::kFull;
  /// Bytes of KV held in memory, real buffers, each once; 0 = no bound. Over it agents that are not pinned go to sleep,
  /// the least recently used first. Turns that came last, or whose readers are slow, put their rows into files until
  /// they go on. When that is not enough, kResourceExhausted says what holds the memory.
  size_t memory_budget = 0;
  DiskLimits disk;
  ComputeOptions compute;
  size_t write_queue_bytes = size_t(256) << 20;  ///< of saves that may wait; beyond it all turns wait for the disk
  /// Text of each turn that may wait for its callback. Beyond it the turn waits, and others go on.
  size_t text_queue_bytes = size_t(64) << 10;
  /// How long a step with tokens of prompts may take: the other turns' answers wait so long for their next token. The speed
  /// measured last decides how many tokens those are; 16 at least.
  int max_stall_ms = 250;
  /// Sealed rows of agents that wake are mapped from their files: nothing is copied, and processes share the pages. False: they
  /// are read into memory of the process, those behind sliding windows too. Then no later fault of the disk can reach them.
  bool map_rows = true;
  /// Engines of one host, each of a model of its own, take turns on one thread: a step is one pass for each of them. Their agents
  /// share its budget: any of them goes to sleep for any other's. They have one store. memory_budget and text_queue_bytes are the
  /// host's. nullptr: a host of its own.
  std::shared_ptr<EngineHost> host;
  /// Where agents are kept beyond this machine (attach_remote). Methods that name an agent then wait for it to be this
  /// worker's, and for each change to be committed there: SaveMode::kBehind is kWait, and a save that fails is thrown.
  /// kBusy where another worker has the agent (kAgentElsewhere), or what was changed may not count (kUncommitted).
  /// `agents` and `memory_usage` tell of this machine alone. nullptr: nowhere.
  std::shared_ptr<RemoteTier> remote;
};

/// A model as the store needs it to make an agent of a file that does not say whose it is (import_prompt_cache,
/// torpor/agents.h). Its files are read for their digests; no weights are kept. Errors as the Engine's constructor gives them.
CacheModel describe_model(const std::string& name, const ComputeOptions& compute = {});

/// For export_prompt_cache (torpor/exchange.h): by the model that the agent was last saved by, or by `model` unless that
/// is empty. kIncompatible when the agent is of another model. Else as describe_model.
RestoreAgentKeys agent_keys(const AgentInfo& agent, const std::string& model = {});

/// What a turn by messages does where the agent holds other messages than the request has there, or more.
enum class OnDivergence {
  kRewind,  ///< the agent forgets what follows the last equal message
  /// The agent stays as it is, and the turn is that of a branch: agent `ID.2`, `ID.3` and so on. Of these and the agent itself
  /// it is the one whose messages the request goes on from, else a new one. TurnResult::agent says which.
  kBranch,
};

struct TurnRequest {
  /// Empty: a prompt without an agent. It starts from the longest prefix that anyone has, and leaves its own sealed segments
  /// for others (save), but nothing with a name.
  std::string agent;
  /// With a remote tier: the client's name for this turn, at most 256 bytes. The agent's last turn, asked for again
  /// under its id, is not run again: its answer is given back (TurnResult::repeated). kInvalidArgument where another
  /// request had the id, or the agent has changed since. Empty: none.
  std::string id;
  /// kNew: there must be none of that name yet (kInvalidArgument, field kAgentTaken). kThere: there must be one (kNotFound).
  enum class Presence { kAny, kNew, kThere } presence = Presence::kAny;
  /// Agents take rows, in memory and on disk, from those of the same salt alone. A new agent has this one, and keeps it.
  std::string salt;
  std::string prompt;                 ///< UTF-8; one user message, or plain text with `raw`
  std::optional<std::string> system;  ///< for a new agent; must equal the agent's own otherwise (kInvalidArgument)
  bool raw = false;                   ///< append the prompt as it stands, without the chat template

  /// Instead of prompt, system and raw: the whole conversation, oldest first. Its last message is not the assistant's. It is
  /// compared with what the agent holds (says_the_same). Ids of equal messages are used again up to the last answer among
  /// them, and beyond as far as ids are equal. The rest is computed. kInvalidArgument carries the template's own refusal.
  std::vector<Message> messages;
  OnDivergence on_divergence = OnDivergence::kRewind;
  /// JSON array of tools, as the chat template takes them. Empty: none; with `prompt`, those that the agent began with.
  std::string tools;
  /// JSON object of further variables for the template: `enable_thinking`, `documents`. Empty: as for `tools`. Both belong to
  /// the beginning of a conversation. Where other ones would have rendered it otherwise, a turn by messages diverges at its
  /// first message; one by prompt is kInvalidArgument.
  std::string template_arguments;
  /// Special tokens and role markers that are written in messages, tools and arguments count as such. Else they are text.
  bool special = false;
  /// Makes the message that is kept of an answer from its text. Empty: the assistant's, with the text as content. It must not
  /// block or call the Engine. When it throws, it is as if it were empty.
  std::function<Message(const std::string& text)> read_answer;

  /// Turns of one share wait for one another's. Between shares the engine is divided evenly.
  std::string share;
  /// Comes after all turns that are not in the background, and gives up its memory for them.
  bool background = false;

  SaveMode save = SaveMode::kWait;
  /// With its callbacks. A chunk of the prompt is computed when on_prefill has returned for the one before. The turn is saved when
  /// on_text has returned for all text. `cancel` ends a turn that has not begun, too; nothing has happened then.
  GenerateOptions generate;
  /// Set from any thread to take the turn back: it throws kCancelled, and the agent is as it was before. Without effect once
  /// the last callback has returned.
  const std::atomic<bool>* give_up = nullptr;
};

struct TurnResult {
  std::string agent, model, text;
  bool repeated = false; ///< the answer of a turn that was committed before (TurnRequest::id), not computed now
  FinishReason finish_reason = FinishReason::kLength;
  std::string stop;      ///< the stop string that ended the answer, or empty
  Message message;       ///< the answer as it is kept (TurnRequest::read_answer)
  std::vector<TokenLogprobs> logprobs;  ///< of each token generated (GenerateOptions::logprobs)
  std::optional<MessageDivergence> divergence;  ///< of a turn by messages; none: the request repeats all that the agent holds
  struct Tokens {
    int prompt = 0;     ///< before generation; cached + prefilled
    int cached = 0;     ///< of those, reused from the agent, or from whoever has begun alike
    int prefilled = 0;  ///< computed now
    int again = 0;      ///< of those, known already, but behind the last recurrent state; `notices` says where
    int generated = 0;  ///< sampled
    int proposed = 0;   ///< guessed before they were sampled (GenerateOptions::speculate)
    int accepted = 0;   ///< of those, the ones that were right
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
  /// What has changed since the agent's last turn, and makes no row unusable: tokenizer, chat template, numerics. Sentences.
  std::vector<std::string> notices;
  /// Set when the agent was damaged on disk and went on from its longest intact prefix.
  std::optional<std::string> damage;
  /// Set when the answer is complete but could not be saved, or the turn before it (kBehind): nothing is lost while the
  /// agent stays awake.
  std::optional<Error> save_error;
};

/// One agent, in memory or on disk.
struct AgentStatus {
  std::string agent, model;   ///< the model as given when the agent was last saved
  int64_t tokens = 0;
  bool awake = false;         ///< in this engine's memory
  bool pinned = false;
  bool unsaved = false;       ///< has changed since its last save
  bool in_turn = false;       ///< `tokens` grow as the turn goes on
  int64_t memory_bytes = 0;   ///< buffers it holds, shared ones included; 0 when asleep
  int64_t disk_bytes = 0;     ///< its file and the segments it names; 0 before the first save
};

/// What an engine has computed since it began.
struct EngineWork {
  int64_t passes = 0;         ///< forward passes
  int64_t turns = 0;          ///< in each of them, added up
  int64_t most_turns = 0;     ///< in one of them
  int64_t prompt_tokens = 0;  ///< whose rows were computed
  int64_t answer_tokens = 0;  ///< likewise
  int64_t accepted_tokens = 0;  ///< of those, guessed before they were sampled (GenerateOptions::speculate)
  int64_t rejected_tokens = 0;  ///< guessed wrongly: their rows were computed, too, and dropped
  int64_t put_aside = 0;      ///< how often a turn's rows were written to a file so that another one had their memory
};

class Engine {
 public:
  /// Loads the model. The calling thread waits.
  explicit Engine(EngineOptions options);
  /// Waits for the work under way and for queued saves. What was not saved is dropped. In a forked process nothing is freed.
  /// Where others have the same host, no method of this one may be running.
  ~Engine();

  /// One user turn: wakes the agent (or makes it), prefills what is new, generates, saves. The agent stays awake. It starts from
  /// the longest prefix that any agent in memory (to the token) or segment on disk has. A new agent's turn waits for rows that
  /// another turn is computing for the same tokens.
  /// A save that fails is said in the result, not thrown, for the answer stands; the agent then is awake and unsaved.
  /// A turn that throws leaves the agent as it was; what it computed is kept a while for when it is asked again. kInternal when the
  /// model computes no number.
  TurnResult turn(const TurnRequest& request);

  /// Ids of the request's prompt or messages: what a new agent would hold before it answers. Computes nothing and waits for
  /// nobody. Errors as `turn` gives them.
  std::vector<int32_t> prompt_tokens(const TurnRequest& request) const;

  /// Begins to load a sleeping agent beside whatever turn is under way, so that its own turn finds it ready. Does not wait.
  /// False when nothing was begun: no such agent, being loaded already, or enough others are. Takes nobody's memory: without
  /// free room in the budget what was loaded is let go of again.
  bool prefetch(const std::string& agent);
  /// Saves if changed and waits. kNotFound unless the agent is awake or on disk.
  SaveResult save(const std::string& agent);
  /// Saves every awake agent and waits, telling how many of how many are done. All are tried; then the first error is thrown.
  /// Agents in a turn are saved after it. kInvalidArgument, and nothing is done, from a callback of a turn.
  void save_all(const std::function<void(int done, int total)>& progress = nullptr);
  /// Waits for queued saves (SaveMode::kBehind) and throws the first error not yet reported. Call it before destroying
  /// the Engine: the destructor also waits, but can't report errors.
  void finish_saves();
  /// Saves if changed, then lets go of memory and lock. No-op for an agent that is not awake.
  void sleep(const std::string& agent);

  // What follows works on agents awake or asleep: kNotFound when they are neither, kInvalidArgument when a new name is taken.
  // With SaveMode::kWait the change is on disk when the call returns. What the save says is thrown; the change then stands in
  // memory, unsaved. Else the change of an agent that is awake is saved behind the call, and a crash may lose it.
  /// `dst` begins with the first `at_token` tokens of `src` (all unless given). Copies no tensor: both go on from shared
  /// buffers, and on disk from shared segments.
  void fork(const std::string& src, const std::string& dst, std::optional<int64_t> at_token = std::nullopt,
            SaveMode save = SaveMode::kWait);
  /// Forgets everything after the first `n_tokens` tokens.
  void rewind(const std::string& agent, int64_t n_tokens, SaveMode save = SaveMode::kWait);
  /// A pinned agent stays in memory when others must make room.
  void pin(const std::string& agent, bool pinned = true, SaveMode save = SaveMode::kWait);
  // These two are on disk when they return.
  void rename(const std::string& agent, const std::string& new_id);
  void remove(const std::string& agent);

  // These three answer during the turns of others, within a step.
  EngineWork work() const;
  MemoryUsage memory_usage() const;
  /// All agents of the store and in memory, by id.
  std::vector<AgentStatus> agents() const;

  /// The ids that the agent holds to the end of its last turn, and the messages that they say, awake or asleep, saved
  /// or not. Ids that are not known (import_prompt_cache) are negative. A call during a turn of the agent waits for its
  /// end; `give_up`, set from any thread meanwhile, makes it kCancelled. kNotFound.
  std::vector<int32_t> tokens(const std::string& agent) const;
  std::vector<Message> messages(const std::string& agent, const std::atomic<bool>* give_up = nullptr) const;

  /// Logits `[vocab]` that follow the agent's last token (recomputed from its cache without changing it); for tests and
  /// inspection. kNotFound.
  std::vector<float> next_logits(const std::string& agent);

  const ModelInfo& model() const;
  std::shared_ptr<const Tokenizer> tokenizer() const;
  Store& store();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torpor
