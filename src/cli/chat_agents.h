#pragma once
/// The agents that `torpor chat` talks with: those of an Engine in this process, or of a running server.

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cli/turn.h"
#include "torpor/store.h"

namespace torpor::cli {

struct ServerOptions;

/// One thread. All throw torpor::Error, with the same codes on both sides.
class ChatAgents {
 public:
  virtual ~ChatAgents() = default;

  /// What the agents compute on, for a greeting: a model, or a server's address.
  virtual std::string place() const = 0;
  /// One turn of `options.agent`, which is made if new, told on the standard streams.
  virtual void turn(const TurnOptions& options, const std::string& message, InterruptScope& interrupt) = 0;
  /// Whether the agent's last save has any token.
  virtual bool has_begun(const std::string& id) = 0;
  /// All of the store, or of the server's tenant.
  virtual std::vector<AgentStatus> all() = 0;
  virtual MemoryUsage memory() = 0;
  /// Of the agent's last save; none where there is no such agent.
  virtual std::vector<StoredMessage> messages(const std::string& id) = 0;
  virtual void save(const std::string& id) = 0;
  virtual void fork(const std::string& id, const std::string& as, std::optional<int64_t> at) = 0;
  virtual void rewind(const std::string& id, int64_t keep) = 0;
  virtual void rename(const std::string& id, const std::string& to) = 0;
  virtual void pin(const std::string& id, bool pinned) = 0;
  virtual void sleep(const std::string& id) = 0;
  /// Begins to load the agent, if there is one; what fails is told by its turn.
  virtual void prefetch(const std::string& id) = 0;
  /// Saves what this process alone has.
  virtual void save_all(const std::function<void(int done, int total)>& on_saved) = 0;
};

/// Those of an Engine of its own, with the model and the limits of `options`.
std::unique_ptr<ChatAgents> engine_agents(const TurnOptions& options, const std::filesystem::path& root);
/// Those of a running server. Only where the server is built (TORPOR_SERVER). A turn that is interrupted is taken back.
std::unique_ptr<ChatAgents> server_agents(const ServerOptions& server);

}  // namespace torpor::cli
