#pragma once
/// The routes of /torpor/v1 as tables: what each takes and gives, how a request is checked against that, and their
/// description.

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "server/agents_turn.h"
#include "server/chat.h"
#include "server/http.h"
#include "server/keys.h"
#include "server/metrics.h"
#include "server/model_pool.h"
#include "server/turn_queue.h"

namespace torpor::server {

/// One request, and what it names.
struct Call {
  ModelPool& models;
  Metrics& metrics;
  TurnQueue& queue;
  Engine& engine;  ///< of the agent's model, or the first
  const HttpRequest& request;
  HttpResponse& response;
  std::string name, id;  ///< of the path's agent or team: as the tenant knows it, as the store does
  Json body;             ///< an object; empty without one

  std::string id_of(const std::string& other) const { return agent_id_of(request.tenant, other); }
  AgentName named(const std::string& other) const {
    return {id_of(other), other, request.tenant, models.salt(request.tenant)};
  }
  AgentName agent() const { return named(name); }
};

struct Reply {
  int status = 200;
  Json body;  ///< null: none
  bool said = false;  ///< the response has it already
};

/// Of an Operation whose answer is a file.
inline constexpr const char* kFile = "application/octet-stream";

/// A member of a request's body.
struct Member {
  const char* name;
  const char* type;  ///< of JSON Schema; of lists "objects" or "strings"; an "object" has numbers
  bool required;
  const char* help;
};

struct Operation {
  const char* method;
  const char* path;  ///< below /torpor/v1; "{agent}" and "{team}" stand for a name
  const char* id;    ///< operationId
  const char* help;
  std::vector<Member> members;
  int status;
  const char* answer;  ///< a schema of the description, or kFile; nullptr: no body
  std::function<Reply(const Call&)> run;
  bool computes = false;  ///< needs the agent's own model
};

/// Of agents, and of what the dashboard shows.
const std::vector<Operation>& agent_operations();
/// Of teams.
const std::vector<Operation>& team_operations();

/// Whether `path`, the parts below /torpor/v1, is of the operation's form.
bool fits(const Operation& operation, const std::vector<std::string>& path);
/// The request's body: an object of the operation's members. kInvalidArgument names the one that is wrong.
Json body_of(const Operation& operation, const HttpRequest& request);
/// The dialects' routes, and those of all tables.
Json describe_operations();
/// Members by which a turn is asked for, after `first`.
std::vector<Member> turn_members(std::vector<Member> first);
/// How long an answer may be and how it is sampled, and whether it is streamed. `events`: what a stream has.
std::vector<Member> sampling_members(std::vector<Member> first, const char* events);

}  // namespace torpor::server
