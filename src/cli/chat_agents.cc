#include "cli/chat_agents.h"

namespace torpor::cli {
namespace {

class EngineAgents : public ChatAgents {
 public:
  EngineAgents(const TurnOptions& options, const std::filesystem::path& root)
      : model_(options.model), save_(options.save), remote_(!options.remote.empty()), engine_(options.engine(root)) {}

  std::string place() const override { return model_; }
  void turn(const TurnOptions& options, const std::string& message, InterruptScope& interrupt) override {
    TurnRequest request = turn_request(options);
    request.prompt = message;
    take_turn(engine_, options, std::move(request), interrupt);
  }
  bool has_begun(const std::string& id) override {
    bring(id);
    return engine_.store().contains(id) && engine_.store().agent_info(id).cache_size > 0;
  }
  std::vector<AgentStatus> all() override { return engine_.agents(); }
  MemoryUsage memory() override { return engine_.memory_usage(); }
  std::vector<StoredMessage> messages(const std::string& id) override {
    bring(id);
    return engine_.store().contains(id) ? engine_.store().agent_messages(id) : std::vector<StoredMessage>();
  }
  void save(const std::string& id) override { engine_.save(id); }
  void fork(const std::string& id, const std::string& as, std::optional<int64_t> at) override {
    engine_.fork(id, as, at, save_);
  }
  void rewind(const std::string& id, int64_t keep) override { engine_.rewind(id, keep, save_); }
  void rename(const std::string& id, const std::string& to) override { engine_.rename(id, to); }
  void pin(const std::string& id, bool pinned) override { engine_.pin(id, pinned, save_); }
  void sleep(const std::string& id) override { engine_.sleep(id); }
  void prefetch(const std::string& id) override { engine_.prefetch(id); }
  void save_all(const std::function<void(int, int)>& on_saved) override { engine_.save_all(on_saved); }

 private:
  /// What the store has of an agent in a bucket may be old.
  void bring(const std::string& id) {
    if (remote_) engine_.prefetch(id);
  }

  const std::string model_;
  const SaveMode save_;
  const bool remote_;
  Engine engine_;
};

}  // namespace

std::unique_ptr<ChatAgents> engine_agents(const TurnOptions& options, const std::filesystem::path& root) {
  return std::make_unique<EngineAgents>(options, root);
}

}  // namespace torpor::cli
