#include "server/dialects.h"

#include <algorithm>
#include <cctype>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "server/answer.h"
#include "server/answer_replay.h"
#include "server/anthropic.h"
#include "server/models.h"
#include "server/ollama.h"
#include "server/openai.h"
#include "server/openapi.h"
#include "server/responses.h"
#include "torpor/error.h"

namespace torpor::server {

struct Dialects::Impl {
  using Parts = std::vector<std::string>;
  struct Request {
    const HttpRequest& http;
    const Parts& path;
    HttpResponse& response;
  };
  using Handler = std::function<void(const Request&)>;
  /// A part in braces matches any one; the last one any number, where a name may have slashes.
  struct Route {
    std::string method;
    Parts path;
    bool slashes;
    Handler answer;
  };

  /// The routes are those that the description has, so that it says of each what it is.
  Impl(TurnRunner& runner, AnswerFiles files) : runner(runner), responses(files), replay(files) {
    const std::map<std::string, Handler> handlers = all_handlers();
    size_t served = 0;
    for (const auto& [path, methods] : described_routes().at("paths").items()) {
      if (!path.starts_with("/v1/") && !path.starts_with("/api/")) continue;
      HttpRequest form;
      form.path = path;
      for (const auto& [method, operation] : methods.items()) {
        std::string name = method;
        std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
        const Json parameters = operation.value("parameters", Json::array());
        const bool slashes = !parameters.empty() && parameters.back().value("x-slashes", false);
        routes.push_back({name, form.path_parts(), slashes, handlers.at(operation.at("operationId"))});
        ++served;
      }
    }
    if (served != handlers.size()) throw Error(ErrorCode::kInternal, "a route of the server's is not described");
  }

  /// By the description's operationId.
  std::map<std::string, Handler> all_handlers() {
    const auto turn = [this](void (*answer)(const HttpRequest&, TurnRunner&, HttpResponse&)) -> Handler {
      return [this, answer](const Request& request) { answer(request.http, runner, request.response); };
    };
    const auto stored = [this](void (*answer)(const HttpRequest&, const std::string&, ResponseStore&,
                                              HttpResponse&)) -> Handler {
      return [this, answer](const Request& request) {
        answer(request.http, request.path[2], responses, request.response);
      };
    };
    return {{"createChatCompletion", turn(answer_chat_completions)},
            {"createCompletion", turn(answer_completions)},
            {"createResponse",
             [this](const Request& request) { create_response(request.http, runner, responses, request.response); }},
            {"getResponse", stored(get_response)},
            {"deleteResponse", stored(delete_response)},
            {"listInputItems", stored(list_input_items)},
            {"listModels", turn(answer_models)},
            {"getModel",
             [this](const Request& request) {
               std::string name;
               for (size_t i = 2; i < request.path.size(); ++i) name += (i > 2 ? "/" : "") + request.path[i];
               answer_model(request.http, name, runner, request.response);
             }},
            {"createMessage", turn(answer_messages)},
            {"countTokens", turn(answer_count_tokens)},
            {"ollamaChat", turn(answer_ollama_chat)},
            {"ollamaGenerate", turn(answer_ollama_generate)},
            {"ollamaShow", turn(answer_ollama_show)},
            {"ollamaTags", turn(answer_ollama_tags)},
            {"ollamaPs", turn(answer_ollama_ps)},
            {"ollamaVersion", turn(answer_ollama_version)}};
  }

  /// Of a request whose body the edge did not read, the status alone is known.
  static void refuse_what_the_edge_refuses(const HttpRequest& request) {
    if (request.refused == 413) throw Failure(Failure::Kind::kTooLarge, "The body is larger than this server reads.");
    if (request.refused == 408) throw Failure(Failure::Kind::kInvalid, "The body did not come in time.");
    if (request.refused != 0) {
      Failure failure(Failure::Kind::kUnavailable, "The server has as many requests as it can answer; send it again.");
      failure.retry_after = 5;
      throw failure;
    }
  }

  static bool matches(const Route& route, const Parts& path) {
    const size_t parts = route.path.size();
    if (route.slashes ? path.size() < parts : path.size() != parts) return false;
    return std::equal(route.path.begin(), route.path.end(), path.begin(), [](const std::string& part, const auto& given) {
      return part.starts_with('{') || part == given;
    });
  }

  void answer(const HttpRequest& request, HttpResponse& response) const {
    refuse_what_the_edge_refuses(request);
    const Parts path = request.path_parts();
    const std::string method = request.method == "HEAD" ? "GET" : request.method;
    bool known = false;
    for (const Route& route : routes) {
      if (!matches(route, path)) continue;
      known = true;
      if (route.method == method) return route.answer({request, path, response});
    }
    if (known) {
      throw Failure(Failure::Kind::kMethodNotAllowed, request.path + " does not answer " + request.method + ".");
    }
    throw Failure(Failure::Kind::kNotFound, "There is no " + request.path + " here.");
  }

  TurnRunner& runner;
  ResponseStore responses;
  AnswerReplay replay;
  std::vector<Route> routes;
};

Dialects::Dialects(TurnRunner& runner, AnswerFiles files) : impl_(std::make_unique<Impl>(runner, files)) {}
Dialects::~Dialects() = default;
AnswerReplay& Dialects::replay() { return impl_->replay; }

void Dialects::handle(const HttpRequest& request, HttpResponse& response) {
  try {
    impl_->replay.handle(request, response, [&](HttpResponse& recorded) { impl_->answer(request, recorded); });
  } catch (const StreamFailed&) {
    // It was told in the stream.
  } catch (...) {
    answer_failure(request, current_failure(), response);
  }
}

}  // namespace torpor::server
