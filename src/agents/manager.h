#pragma once
/// Many agents in bounded memory: wake, save, evict, fork, rewind. Engine thread only, but for prefetch.
///
/// Memory: the real buffers of all agents awake or prefetched are counted, each once however many hold it. (What the
/// writer copies for saves under way has a bound of its own, ManagerOptions::write_queue_bytes.) Before more is taken,
/// agents that are neither pinned nor held go to sleep, as the policy says. When none can, prefetched ones are let go
/// of. Whoever computes rows reserves their memory first. A prefetch counts once it has loaded, and room is made for it
/// by whoever next needs some.

#include <chrono>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "agents/agent.h"
#include "agents/prefetcher.h"
#include "agents/rows_aside.h"
#include "agents/writer.h"
#include "cache/ledger.h"
#include "torpor/memory_usage.h"

namespace torpor {

/// An awake agent that may go to sleep: neither pinned nor held.
struct Evictable {
  std::string id;
  uint64_t last_used = 0;  ///< greater is later
  size_t bytes = 0;        ///< of its buffers
  bool dirty = false;      ///< must be written first
};

/// Which agent goes to sleep when memory is short.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  /// Index of the one to go; `candidates` is not empty.
  virtual size_t choose(std::span<const Evictable> candidates) const = 0;
};

/// The least recently used.
std::unique_ptr<EvictionPolicy> make_lru();

class AgentManager;

/// The memory that several managers of one engine thread have in common. Engine thread only, but for the ledger.
struct ManagerGroup {
  explicit ManagerGroup(size_t budget) : ledger(std::make_shared<KvLedger>(budget)) {}
  const std::shared_ptr<KvLedger> ledger;
  std::vector<AgentManager*> members;  ///< whose agents go to sleep for each other's
  uint64_t clock = 0;                  ///< of Agent::last_used
};

struct ManagerOptions {
  std::string model_name;
  Identity identity;           ///< complete: model and KV format
  std::string numerics;        ///< Model::numerics
  ConversationIdentity conversation;
  KvLayout layout;
  StateLayout state_layout;    ///< of the model's recurrent layers
  /// The layout of an agent's own format. Where it is set, an agent on disk may go on in a format of its own. That
  /// has the same size as `identity.kv`, unless `any_kv_format`. Else another format is kIncompatible.
  std::function<KvLayout(const KvFormat&)> layout_of;
  bool any_kv_format = false;
  Backend backend = Backend::kKernels;
  Durability durability = Durability::kFull;
  size_t memory_budget = 0;    ///< bytes of KV; 0 = no bound
  size_t write_queue_bytes = size_t(256) << 20;
  PrefetchOptions prefetch;
  bool map_rows = true;        ///< EngineOptions::map_rows
  std::shared_ptr<ManagerGroup> group;  ///< nullptr: one of its own, of memory_budget
};

/// What an agent heard and said, to the end of its last whole turn.
struct Remembered {
  std::vector<HeldMessage> messages;
  std::string variables;         ///< AgentRecord::variables
  std::vector<int32_t> history;
};

/// Rows to be appended to a cache.
struct Growth {
  KvCache* cache;
  int rows;
};

/// Whether an error says that the memory budget has no room while others hold it: with less held it may be had.
bool is_lack_of_room(const Error& error);

class AgentManager {
 public:
  /// `store` outlives the manager.
  AgentManager(Store& store, ManagerOptions options, std::unique_ptr<EvictionPolicy> policy = make_lru());
  /// Writes what is queued. What was not saved is dropped.
  ~AgentManager();

  /// Memory, then disk, then a new agent. kBusy when it is awake in another process. kIncompatible when it belongs to
  /// another model. kResourceExhausted, naming what holds the memory, when it does not fit. A damaged agent wakes with
  /// its longest intact prefix, said in Agent::damage. A new agent has `salt` (Lineage); one that is there keeps its
  /// own.
  AgentHold wake(const std::string& id, const std::string& salt = {});
  /// A new agent without a name, for one prompt.
  AgentHold stateless(const std::string& salt = {});
  /// Begins to load a sleeping agent on a thread of its own, so that the next wake finds it ready. Any thread. False
  /// when nothing was begun: it is awake, prefetched already, not there, or enough others are.
  bool prefetch(const std::string& id);
  bool is_awake(const std::string& id) const { return awake_.count(id) != 0; }
  /// kNotFound unless it is awake or on disk.
  void require(const std::string& id) const;
  /// kInvalidArgument when it is no id, or there is an agent of that id (kAgentTaken).
  void require_free(const std::string& id) const;

  /// Takes the memory that computing these rows needs, for all sequences of a step at once; their agents are held.
  /// kResourceExhausted, before anything is taken, when it does not fit.
  /// With `at_once` they exceed the budget instead, until room is needed next: of rows that were held a moment ago.
  void reserve(std::span<const Growth> growths, bool at_once = false);

  // The caller holds `agent`, and nobody else changes its rows meanwhile.
  /// Gives the agent, whose rows are those of the first `tokens`, the longest prefix of `tokens` that there is. Agents
  /// in memory and turns that were given up have prefixes to the token, the disk has segments. One token at least is
  /// left to compute. Returns how many rows it has then; 0, and nothing has changed, when nobody has more than it has.
  ///
  /// With recurrent layers the prefix ends at a state. `positions` are those after which somebody may have one on disk,
  /// beside the ends of segments. `known` receives how many tokens somebody has rows of.
  int reuse_prefix(Agent& agent, std::span<const int32_t> tokens, std::span<const int64_t> positions = {},
                   int64_t* known = nullptr);
  /// Gives the agent the first `n_tokens` rows of another one, which may be in its turn. Where there is no room for a
  /// cut it gets whole runs of them. False, and nothing has changed, when that is no more than it has, or they can't be
  /// had.
  bool share_rows(Agent& agent, const Agent& other, int n_tokens);
  /// Keeps the rows of a turn that no agent keeps: for a minute, in memory that nobody else wants, so that the same prompt goes
  /// on there, and what follows its answer. Those that are `aside` (nullptr: none) stay in their file. With `on_disk` whole
  /// segments of the first `n_tokens` tokens in memory are written, too; nobody hears when that fails. The turn began with `reused`
  /// rows.
  void keep_for_retry(const Agent& agent, std::shared_ptr<const RowsAside> aside, int reused, bool on_disk, int n_tokens) noexcept;
  /// Cuts the cache to `n_tokens`. If rows that a sliding window needs are neither in memory nor on disk, it cuts
  /// further, and so it does to the last state before: check length() and compute those rows again. An error leaves the
  /// agent as it was.
  void truncate(Agent& agent, int n_tokens);
  /// Puts the agent's rows into a file and lets go of their memory. kIo, kResourceExhausted; then nothing has changed.
  std::unique_ptr<RowsAside> put_aside(Agent& agent);
  /// The same of a cache that the caller then lets go of.
  std::unique_ptr<RowsAside> put_aside(const KvCache& cache);
  /// Gives the agent these rows again. kResourceExhausted when the budget has no room and they are not wanted
  /// `at_once`, which may exceed it until room is needed next. kCorruption. After an error they are still aside.
  void bring_back(Agent& agent, const RowsAside& aside, bool at_once = false);
  /// Reads the last state of the first `n_tokens` tokens into `cache`, the agent's or a clone, unless it is there. How
  /// many tokens that can then go on from: fewer where a file is damaged. Without recurrent layers it is `n_tokens`.
  int hold_state(const Agent& agent, KvCache& cache, int n_tokens);
  /// After a turn: of the agent's states those stay that thin_checkpoints names. `history` is where the turn's prompt
  /// ended but for the asking for an answer; it counts as the end of a turn. Where rows of windows are kept apart, the
  /// same goes for the checkpoints that they are kept for. To these `wanted` are added, and those of a long prompt.
  /// A state at `history` less than a stride behind the one before stays in memory, until the next turn's.
  void thin_states(Agent& agent, int64_t history, std::span<const int64_t> wanted);
  /// The same in a turn that began with `reused` tokens, so that a long prompt keeps no more states than it will leave.
  /// Those go that it has computed, but for the live one and those at `wanted` positions.
  void thin_states_of_turn(Agent& agent, int64_t reused, std::span<const int64_t> wanted);
  bool has_states() const noexcept { return !options_.state_layout.empty(); }
  /// Whether an agent can go on from some of its tokens alone, from where the disk has it: there states, or all rows
  /// that windows see, are kept.
  bool has_checkpoints() const noexcept { return has_states() || options_.layout.has_apart(); }
  /// checkpoint_stride of the agent's rows.
  int64_t stride_of(const Agent& agent) const;
  /// Takes back rows that were computed since the agent was held. It always does: the cut may exceed the budget by a
  /// run while it is made. The agent's version stays.
  void take_back(Agent& agent, int n_tokens);
  /// Hands what changed to the writer. The agent stays awake, and dirty should the store refuse.
  void save_behind(Agent& agent);
  /// The same. Whoever waits for it, on any thread, hears its error there, and nowhere else. The agent gets no rows
  /// before it is over, for those that it has are not copied.
  Writer::Saving begin_save(Agent& agent);
  /// The same, and waits until it is on disk. Throws what the store says.
  SaveResult save(Agent& agent);

  /// As save_behind, of an agent that is awake; for another one the future is not valid. The agent was not used by it.
  Writer::Saving begin_save(const std::string& id);
  /// Waits until what is queued is written, and takes nothing in. Any thread.
  void wait_for_writes(const Writer::Progress& progress = nullptr, size_t submitted = 0) {
    writer_.wait_all(progress, submitted);
  }
  /// Throws the first error of a save that is over and was not told yet, be it of an agent that is gone.
  void tell_errors();

  /// After a turn that began with `n_tokens` rows: takes the agent on to this process's numerics, tokenizer and
  /// template. A sentence for each that is another than before.
  std::vector<std::string> adapt(Agent& agent, int n_tokens);

  /// Of an agent awake or asleep. kNotFound.
  Remembered remembered(const std::string& id) const;
  /// The agent that a turn by these messages is for which may not shorten `id` (OnDivergence::kBranch).
  struct Branch {
    std::string id;
    std::string of;  ///< the agent that a new one begins with; empty: the agent is there, or nobody is
  };
  Branch find_branch(const std::string& id, std::span<const Message> messages) const;

  // All of these are kBusy for an agent that somebody holds.
  /// Saves, then lets go of memory and lock. No-op for an agent that is not awake.
  void sleep(const std::string& id);
  /// Lets go without saving.
  void drop(const std::string& id);
  // The next three change agents that are asleep on disk before they return. An agent that is awake is saved behind, so
  // a crash after the call may still lose the change: `save` waits for it.
  void fork(const std::string& src, const std::string& dst, std::optional<int64_t> at_token);
  void rewind(const std::string& id, int64_t n_tokens);
  void pin(const std::string& id, bool pinned);
  void rename(const std::string& id, const std::string& new_id);
  void remove(const std::string& id);

  /// With the saves that are over by now.
  MemoryUsage memory_usage();

 private:
  friend class AgentHold;
  /// Rows that somebody has, as a cache of their own.
  struct Prefix {
    std::unique_ptr<KvCache> cache;
    Lineage lineage;
    std::vector<std::string> segments;
    std::vector<StateRef> states;
    int64_t bytes_read = 0;
    int64_t known = 0;  ///< tokens that somebody has rows of
  };
  /// Rows of turns that were given up or had no agent, as nameless agents.
  struct Kept {
    Agent agent;
    std::chrono::steady_clock::time_point since;
    std::shared_ptr<const RowsAside> aside;  ///< where the rows are; nullptr: the agent has them
    const std::vector<int32_t>& tokens() const { return aside != nullptr ? aside->tokens() : agent.cache->tokens(); }
  };

  /// What an agent with such an identity must have: the manager's, with the agent's KV format where it may have one.
  Identity expected(const Identity& on_disk) const;
  /// Of an identity that was expected.
  KvLayout layout_of(const Identity& identity) const;
  LoadedAgent load(const std::string& id) const;
  Agent make_agent(const std::string& id, const std::string& salt = {});
  /// What wake gives an agent that is not awake.
  Agent load_or_make(const std::string& id, const std::string& salt);
  void adopt(Agent& agent, LoadedAgent loaded);
  /// How many of its tokens an agent could go on from. Rows of mapped runs whose pages the system let go of are checked
  /// again. When these tokens are not all, `damage` says why.
  int64_t intact_tokens(const Agent& agent, std::optional<std::string>& damage) const;
  void own(Agent& agent, std::unique_ptr<KvCache> cache);
  /// What reuse_prefix gives an agent like `agent`, from anyone but itself. Its cache is empty when nobody has more
  /// than `least`.
  Prefix longest_prefix(const Agent& agent, std::span<const int32_t> tokens, int64_t least = 0,
                        std::span<const int64_t> positions = {});
  /// The last state of the agent's first `n_tokens` tokens, in memory or on disk; without recurrent layers `n_tokens`.
  int64_t last_state(const Agent& agent, int64_t n_tokens) const;
  /// Whether rows of the one may be the other's, tokens apart.
  bool may_share(const Agent& from, const Agent& to) const;
  /// The first rows of an agent that somebody holds: `n_tokens`, or whole runs of them where there is no room for a
  /// cut.
  Prefix cut_of(const Agent& agent, int n_tokens);
  /// Positions of states that thin_checkpoints doesn't name, ascending. `history` as in thin_states.
  std::vector<int64_t> surplus_states(const Agent& agent, int64_t history) const;
  /// Lets go of states in memory that the disk has, but for the live one.
  static void let_saved_states_go(Agent& agent);
  /// Of rows kept apart, those that the agent's checkpoints see: files that the disk has, and in `snapshot`, which is
  /// to be saved, the others.
  static std::vector<StateRef> add_windows(const Agent& agent, KvSnapshot& snapshot);
  void give(Agent& agent, Prefix prefix);
  /// Takes rows that were put aside into memory again. False where that can't be: they are computed again.
  bool bring_kept_back(Kept& kept);
  /// Lets go of what was kept for a retry: what is too old, or with `one` the oldest that nobody holds. Whether there was any.
  bool let_kept_go(bool one = false);
  /// A hold on the agent if it is awake, none if it is not. kBusy when somebody holds it.
  AgentHold hold_alone(const std::string& id);
  /// The same of an agent that exists, else kNotFound. What was prefetched of it is let go of.
  AgentHold existing(const std::string& id);
  /// The last hold of `agent` is gone.
  void unheld(Agent& agent) noexcept;
  /// After a change on disk, which has happened whether the agent can be woken or not: then it stays asleep.
  void wake_again(const std::string& id) noexcept;
  size_t bytes_to_wake(const std::string& id) const;
  /// The first runs of an agent that hold the same rows as those of one that is awake.
  struct Shared {
    int64_t runs = 0;
    int64_t length = 0;  ///< tokens that the other one holds
  };
  /// What `n_tokens` tokens take in memory beside what is shared.
  size_t bytes_of_runs(const KvLayout& layout, int64_t n_tokens, const Shared& shared) const;
  void hand_to_writer(Agent& agent, bool copy_tail);
  /// Has whole segments of an agent's first `n_tokens` tokens written, if the queue has room. Nobody hears of it.
  void submit_prefix(const Agent& agent, int n_tokens);
  /// Takes in what the writer has finished.
  void settle();
  /// The agent that has the ticket, nullptr when it is gone.
  Agent* find(uint64_t ticket, const std::string& id);
  /// Keeps an error for tell_errors.
  void remember(Error error);
  /// The agents at rest that share the sealed run with these rows.
  std::vector<Agent*> idle_holders(size_t run, const void* rows);
  /// Of an agent that nobody holds: memory need not keep rows that windows have left behind and segments have. A run
  /// that an agent in its turn shares waits for that turn (Agent::releasable).
  void release_behind_window(Agent& agent);
  /// Waits until the agent's queued saves are over: its rows and its file may then be changed.
  void finish_writes(Agent& agent);
  /// Lets agents sleep until the budget has room for `bytes` more, and takes it: whoever asks fills it before letting
  /// go of it. kResourceExhausted when nobody can go any more.
  [[nodiscard]] KvLedger::Room make_room(size_t bytes);
  /// The same; nullopt when there is none.
  std::optional<KvLedger::Room> try_room(size_t bytes);
  std::string holders();

  Store& store_;
  const ManagerOptions options_;
  const KvFormat format_;  // of new agents
  const std::unique_ptr<EvictionPolicy> policy_;
  const std::shared_ptr<ManagerGroup> group_;
  const std::shared_ptr<KvLedger> ledger_;  // the group's; before the agents whose caches it counts
  std::map<std::string, Agent> awake_;
  std::list<Agent> nameless_;
  std::list<Kept> kept_;  // the oldest first
  std::vector<Error> untold_;  // of saves whose agents are gone
  uint64_t tickets_ = 0;
  int64_t evictions_ = 0;
  Prefetcher prefetcher_;
  Writer writer_;
};

}  // namespace torpor
