/// The agents of a running server, over /torpor/v1/agents.

#include "cli/chat_agents.h"
#include "cli/server_client.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

constexpr const char* kAgents = "/torpor/v1/agents";

/// Whether the server said that it has no such agent.
bool is_absent(const Error& error, const std::string& id) {
  return error.code() == ErrorCode::kNotFound && error.agent() == id;
}

class ServerAgents : public ChatAgents {
 public:
  explicit ServerAgents(const ServerOptions& options) : client_(options) {}

  std::string place() const override { return client_.url(); }

  void turn(const TurnOptions& options, const std::string& message, InterruptScope& interrupt) override {
    const SamplingOptions& sampling = options.sampling;
    Json body{{"prompt", message},
              {"max_tokens", options.max_tokens},
              {"temperature", sampling.temperature},
              {"top_p", sampling.top_p},
              {"stream", true}};
    if (options.seed) body["seed"] = *options.seed;
    const SamplingOptions usual;
    const auto say = [&](const char* name, const auto& value, const auto& otherwise) {
      if (value != otherwise) body[name] = value;
    };
    say("top_k", sampling.top_k, usual.top_k);
    say("min_p", sampling.min_p, usual.min_p);
    say("repetition_penalty", sampling.repetition_penalty, usual.repetition_penalty);
    say("penalty_context", sampling.penalty_context, usual.penalty_context);
    say("presence_penalty", sampling.presence_penalty, usual.presence_penalty);
    say("frequency_penalty", sampling.frequency_penalty, usual.frequency_penalty);
    say("stop", options.stop, std::vector<std::string>());
    for (const auto& [token, bias] : parse_bias(options.logit_bias)) body["logit_bias"][std::to_string(token)] = bias;
    if (options.has_system) body["system"] = options.system;
    TurnPrinter printer(options, interrupt);
    try {
      stream(path(options.agent, "/turn"), body, interrupt, printer);
    } catch (const Error& error) {
      if (!is_absent(error, options.agent)) throw;
      body["agent"] = options.agent;
      if (!options.model.empty()) body["model"] = options.model;
      stream(kAgents, body, interrupt, printer);
    }
  }

  bool has_begun(const std::string& id) override {
    const Json shown = get_if_there(id, "");
    return shown.is_object() && shown.at("tokens").get<int64_t>() > 0;
  }

  std::vector<AgentStatus> all() override {
    std::vector<AgentStatus> agents;
    const Json told = client_.get(kAgents);
    for (const Json& one : told.at("agents")) {
      AgentStatus& agent = agents.emplace_back();
      agent.agent = one.at("agent");
      agent.model = one.at("model");
      agent.tokens = one.at("tokens");
      agent.awake = one.at("awake");
      agent.pinned = one.at("pinned");
      agent.unsaved = one.at("unsaved");
    }
    return agents;
  }

  MemoryUsage memory() override {
    const Json told = client_.get("/torpor/v1/memory");
    MemoryUsage usage;
    usage.model_bytes = told.at("model_bytes");
    usage.kv_bytes = told.at("kv_bytes");
    usage.mapped_bytes = told.at("mapped_bytes");
    usage.queued_bytes = told.at("queued_bytes");
    usage.budget = told.at("budget_bytes");
    for (const Json& one : told.at("agents")) {
      usage.agents.push_back({one.at("agent"), one.at("tokens"), one.at("bytes"), one.at("shared_bytes"),
                              one.at("pinned"), one.at("unsaved")});
    }
    return usage;
  }

  std::vector<StoredMessage> messages(const std::string& id) override {
    std::vector<StoredMessage> messages;
    const Json map = get_if_there(id, "/map");
    if (map.is_null()) return messages;
    for (const Json& one : map.at("messages")) {
      messages.push_back({dump_json(one.at("message"), -1, Json::error_handler_t::replace), one.at("begin"),
                          one.at("end")});
    }
    return messages;
  }

  void save(const std::string& id) override { post(id, "/save"); }
  void fork(const std::string& id, const std::string& as, std::optional<int64_t> at) override {
    Json body{{"as", as}};
    if (at) body["at_token"] = *at;
    post(id, "/fork", body);
  }
  void rewind(const std::string& id, int64_t keep) override { post(id, "/rewind", {{"tokens", keep}}); }
  void rename(const std::string& id, const std::string& to) override { post(id, "/rename", {{"to", to}}); }
  void pin(const std::string& id, bool pinned) override { post(id, "/pin", {{"pinned", pinned}}); }
  void sleep(const std::string& id) override { post(id, "/sleep"); }
  void prefetch(const std::string& id) override {
    try {
      post(id, "/wake");
    } catch (const Error& error) {
      if (!is_absent(error, id)) throw;
    }
  }
  void save_all(const std::function<void(int, int)>&) override {}  // the server saves each turn

 private:
  /// The id has been checked (check_agent_id): it needs no escapes.
  static std::string path(const std::string& id, const char* operation) {
    return std::string(kAgents) + "/" + id + operation;
  }
  void post(const std::string& id, const char* operation, const Json& body = nullptr) {
    client_.post(path(id, operation), body);
  }
  /// Null where there is no such agent.
  Json get_if_there(const std::string& id, const char* operation) {
    try {
      return client_.get(path(id, operation));
    } catch (const Error& error) {
      if (!is_absent(error, id)) throw;
      return nullptr;
    }
  }

  void stream(const std::string& path, const Json& body, InterruptScope& interrupt, TurnPrinter& printer) {
    bool ended = false;
    try {
      client_.stream(path, body, interrupt.flag(), [&](const std::string& event, const Json& data) {
        if (event == "prefill") printer.prefill(data.at("done"), data.at("total"));
        if (event == "text") printer.text(data.at("text").get<std::string>());
        if (event == "error") throw server_error(data).value_or(Error(ErrorCode::kInternal, "the turn failed"));
        if (event != "result") return;
        ended = true;
        printer.result(data, true);
      });
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kCancelled) throw;
      printer.check_read();  // else a signal came
      printer.stopped();
      return;
    }
    if (!ended) throw Error(ErrorCode::kIo, "the server at " + client_.url() + " has gone before the answer's end");
  }

  const ServerClient client_;
};

}  // namespace

std::unique_ptr<ChatAgents> server_agents(const ServerOptions& server) {
  return std::make_unique<ServerAgents>(server);
}

}  // namespace torpor::cli
