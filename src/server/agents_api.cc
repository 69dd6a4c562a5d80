#include "server/agents_api.h"

#include <algorithm>

#include "faces/error_table.h"
#include "server/failure.h"
#include "server/operations.h"
#include "torpor/remote_tier.h"

namespace torpor::server {
namespace {

/// What is told of a failure, in the words of torpor::Error.
Reply failed(const Failure& failure, const std::string& tenant, HttpHeaders& headers) {
  ErrorCode code = ErrorCode::kInvalidArgument;
  if (failure.kind == Failure::Kind::kNotFound) code = ErrorCode::kNotFound;
  if (failure.kind == Failure::Kind::kBusy) code = ErrorCode::kBusy;
  if (failure.retry_after > 0) headers.emplace_back("retry-after", std::to_string(failure.retry_after));
  const Error error = Error(code, failure.what()).with_field(failure.param);
  const int status = code == ErrorCode::kBusy ? 409 : faces::http_status(error);  // of a key, not of an agent
  return {status, error_json(error, tenant)};
}

}  // namespace

Reply AgentsApi::answer(const HttpRequest& request, HttpResponse& response, std::string& allow) {
  std::vector<std::string> path = request.path_parts();
  path.erase(path.begin(), path.begin() + std::min<size_t>(2, path.size()));  // torpor, v1
  const std::string method = request.method == "HEAD" ? "GET" : request.method;
  for (const auto* table : {&agent_operations(), &team_operations()}) {
    for (const Operation& operation : *table) {
      if (!fits(operation, path)) continue;
      if (method != operation.method) {
        allow += (allow.empty() ? "" : ", ") + std::string(operation.method);
        continue;
      }
      Json body = body_of(operation, request);
      const bool of_agent = path[0] == "agents";
      const std::string name = path.size() > 1 && (of_agent || path[0] == "teams") ? path[1] : "";
      const std::string id = name.empty() ? "" : agent_id_of(request.tenant, name);
      const bool names_agent = of_agent && !name.empty();
      const ModelPool::Lease model = names_agent ? models_.of_agent(id, !operation.computes) : models_.model("");
      return operation.run({models_, metrics_, queue_, model.engine(), request, response, name, id, std::move(body)});
    }
  }
  if (!allow.empty())
    return {405, Json{{"error", Json{{"code", "kInvalidArgument"},
                                     {"message", request.path + " answers " + allow + " alone"}}}}};
  throw Error(ErrorCode::kNotFound, "there is no " + request.path + " here");
}

void AgentsApi::handle(const HttpRequest& request, HttpResponse& plain) {
  const auto answer_with = [&](HttpResponse& response) {
    Reply said;
    HttpHeaders headers;
    std::string allow;
    try {
      said = answer(request, response, allow);
    } catch (const Error& error) {
      const bool moved = error.field() == kAgentElsewhere && !error.found().empty();
      if (moved) headers = moved_to(request, error.found(), error.agent());
      said = {moved ? 307 : faces::http_status(error), error_json(error, request.tenant)};
    } catch (const Failure& failure) {
      if (failure.kind == Failure::Kind::kOverloaded) throw;  // the service words it for all routes
      said = failed(failure, request.tenant, headers);
    }
    if (said.said) return;
    if (!said.body.is_null()) headers.emplace_back("content-type", "application/json");
    if (said.status == 405) headers.emplace_back("allow", allow);
    response.whole(said.status, std::move(headers), said.body.is_null() ? "" : to_text(said.body));
  };
  try {
    replay_.handle(request, plain, answer_with);
  } catch (const Failure& failure) {  // of the key
    if (failure.kind == Failure::Kind::kOverloaded) throw;
    HttpHeaders headers{{"content-type", "application/json"}};
    const Reply said = failed(failure, request.tenant, headers);
    plain.whole(said.status, std::move(headers), to_text(said.body));
  }
}

}  // namespace torpor::server
