#pragma once
/// The models of a server: loaded when a request names them, unloaded when nobody does for a while. Their engines have one
/// thread and one memory budget (EngineHost), and one store.

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "server/chat.h"
#include "server/engine_runner.h"
#include "torpor/engine.h"

namespace torpor::server {

struct ServedModel {
  std::string name;    ///< that requests name, and answers have
  std::string source;  ///< its directory or repo id; requests may name it by this, too
  std::shared_ptr<Engine> engine;  ///< one that is there already, which then is the only model; nullptr: none
};

struct ModelAlias {
  std::string pattern;  ///< what requests say; '*' at its end stands for anything
  std::string name;     ///< of the model that they get
};

struct ModelPoolOptions {
  std::vector<ServedModel> models;  ///< one at least. The first answers requests that name none, and stays loaded
  std::vector<ModelAlias> aliases;  ///< the first that fits counts, after the models' own names
  EngineOptions engine;             ///< of each, but for `model` and `host`
  bool share_prefixes = false;      ///< EngineRunner
};

/// Any thread.
class ModelPool : public TurnRunner {
 private:
  struct Loaded {
    std::shared_ptr<Engine> engine;
    EngineRunner runner;
    Loaded(std::shared_ptr<Engine> given, const std::string& name, bool share_prefixes)
        : engine(std::move(given)), runner(*engine, name, share_prefixes) {}
  };
  struct Slot;

 public:
  /// A model in use: it stays loaded as long as this lives. Move-only; gone before its pool.
  class Lease {
   public:
    Lease(Lease&&) = default;
    ~Lease();
    Engine& engine() const { return *loaded_->engine; }
    EngineRunner& runner() const { return loaded_->runner; }
    const std::string& name() const;

   private:
    friend class ModelPool;
    Lease(ModelPool& pool, Slot& slot, std::shared_ptr<Loaded> loaded, bool uses)
        : pool_(&pool), slot_(&slot), loaded_(std::move(loaded)), uses_(uses) {}
    ModelPool* pool_;
    Slot* slot_;
    std::shared_ptr<Loaded> loaded_;
    bool uses_;  // whether it counts as use
  };

  /// Loads the first model, and looks whether the others are there. kInvalidArgument for two of one name, an alias of none,
  /// a model without a chat template; kNotFound; what Engine throws.
  explicit ModelPool(ModelPoolOptions options);
  /// No lease is left. What was not saved is dropped.
  ~ModelPool() override;

  /// The model that a request names, loaded if need be: the caller waits. Empty: the first. Failure kNotFound; what Engine
  /// throws.
  Lease model(const std::string& name);
  /// The model that a program calls so: by name or source, by another path to the same directory, or by a path that is
  /// gone but ends in the name. Empty: the first. Failure kNotFound when it is none of those served.
  Lease of_source(const std::string& source);
  /// The one that has the agent awake, else that it was last saved by, else the first. With `looks` no model is loaded: the
  /// first does for an agent that is asleep.
  Lease of_agent(const std::string& id, bool looks);
  /// Those that are loaded now, the first model's first. This is no use of them.
  std::vector<Lease> loaded();
  /// All agents of the store and in memory, by id.
  std::vector<AgentStatus> agents();
  /// Of all models that are loaded, together; evictions since the server began.
  MemoryUsage memory_usage();
  /// Of all models since the server began, also of those that are unloaded now.
  EngineWork work();
  /// What keeps the rows of the tenant's agents from others' (TurnRequest::salt).
  std::string salt(const std::string& tenant) const;
  /// Saves what is unsaved of all that are loaded.
  void save_all();
  /// From now on models that nobody has used for `idle_unload` are unloaded, and sessions that nobody has used for
  /// `session_ttl` are forgotten; 0: none are.
  void set_times(std::chrono::milliseconds idle_unload, std::chrono::seconds session_ttl);
  /// Unloads what nobody has used for so long; the first model stays.
  void unload_idle(std::chrono::milliseconds idle);

  /// Removes agents of sessions that were last saved so long ago; those that are in a turn or pinned stay.
  void forget_sessions(std::chrono::seconds ttl);

  void run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) override;
  int count_tokens(const ChatRequest& request) override;
  std::vector<ModelEntry> models() override;

 private:
  using Clock = std::chrono::steady_clock;
  Slot& find(const std::string& name);
  /// As of_source; nullptr: none.
  Slot* find_source(const std::string& source);
  [[noreturn]] void refuse(const std::string& model) const;
  Lease lease(Slot& slot);
  /// The same, and at one instant the totals of what is unloaded; nullptr: not asked for.
  std::vector<Lease> loaded(EngineWork* unloaded_work, int64_t* unloaded_evictions = nullptr);
  void keep_house();

  const ModelPoolOptions options_;
  const std::shared_ptr<EngineHost> host_;
  std::vector<std::unique_ptr<Slot>> slots_;
  Mutex mutex_;  // of what slots hold, too, but for their own
  CondVar wake_;  // the housekeeper
  bool stopping_ TORPOR_GUARDED_BY(mutex_) = false;
  bool changed_ TORPOR_GUARDED_BY(mutex_) = false;
  std::chrono::milliseconds idle_unload_ TORPOR_GUARDED_BY(mutex_){0};
  std::chrono::seconds session_ttl_ TORPOR_GUARDED_BY(mutex_){0};
  EngineWork unloaded_work_ TORPOR_GUARDED_BY(mutex_);  // of engines that are gone
  int64_t unloaded_evictions_ TORPOR_GUARDED_BY(mutex_) = 0;
  std::thread housekeeper_;
};

}  // namespace torpor::server
