#include "server/dialects.h"

#include <functional>
#include <string>
#include <vector>

#include "server/answer.h"
#include "server/answer_replay.h"
#include "server/anthropic.h"
#include "server/models.h"
#include "server/ollama.h"
#include "server/openai.h"
#include "server/responses.h"

namespace torpor::server {

struct Dialects::Impl {
  using Parts = std::vector<std::string>;
  struct Request {
    const HttpRequest& http;
    const Parts& path;
    HttpResponse& response;
  };
  /// A part that is "*" matches any one; "**" at the end any number, for names with slashes.
  struct Route {
    std::string method;
    Parts path;
    std::function<void(const Request&)> answer;
  };

  explicit Impl(TurnRunner& runner) : runner(runner) {
    const auto serve = [this](const char* method, Parts path,
                              void (*answer)(const HttpRequest&, TurnRunner&, HttpResponse&)) {
      routes.push_back({method, std::move(path), [this, answer](const Request& request) {
                          answer(request.http, this->runner, request.response);
                        }});
    };
    serve("POST", {"v1", "chat", "completions"}, answer_chat_completions);
    serve("POST", {"v1", "completions"}, answer_completions);
    serve("POST", {"v1", "messages"}, answer_messages);
    serve("POST", {"v1", "messages", "count_tokens"}, answer_count_tokens);
    serve("POST", {"api", "chat"}, answer_ollama_chat);
    serve("POST", {"api", "generate"}, answer_ollama_generate);
    serve("POST", {"api", "show"}, answer_ollama_show);
    serve("GET", {"api", "tags"}, answer_ollama_tags);
    serve("GET", {"api", "ps"}, answer_ollama_ps);
    serve("GET", {"api", "version"}, answer_ollama_version);
    serve("GET", {"v1", "models"}, answer_models);
    routes.push_back({"POST", {"v1", "responses"}, [this](const Request& request) {
                        create_response(request.http, this->runner, responses, request.response);
                      }});
    const auto stored = [this](const char* method, Parts path,
                               void (*answer)(const HttpRequest&, const std::string&, ResponseStore&, HttpResponse&)) {
      routes.push_back({method, std::move(path), [this, answer](const Request& request) {
                          answer(request.http, request.path[2], responses, request.response);
                        }});
    };
    stored("GET", {"v1", "responses", "*"}, get_response);
    stored("DELETE", {"v1", "responses", "*"}, delete_response);
    stored("GET", {"v1", "responses", "*", "input_items"}, list_input_items);
    routes.push_back({"GET", {"v1", "models", "**"}, [this](const Request& request) {
                        std::string name;
                        for (size_t i = 2; i < request.path.size(); ++i) name += (i > 2 ? "/" : "") + request.path[i];
                        answer_model(request.http, name, this->runner, request.response);
                      }});
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

  static bool matches(const Parts& pattern, const Parts& path) {
    for (size_t i = 0; i < pattern.size(); ++i) {
      if (pattern[i] == "**") return path.size() > i;
      if (i >= path.size() || (pattern[i] != "*" && pattern[i] != path[i])) return false;
    }
    return pattern.size() == path.size();
  }

  void answer(const HttpRequest& request, HttpResponse& response) const {
    refuse_what_the_edge_refuses(request);
    const Parts path = request.path_parts();
    const std::string method = request.method == "HEAD" ? "GET" : request.method;
    bool known = false;
    for (const Route& route : routes) {
      if (!matches(route.path, path)) continue;
      known = true;
      if (route.method == method) return route.answer({request, path, response});
    }
    if (known) {
      throw Failure(Failure::Kind::kMethodNotAllowed, request.path + " does not answer " + request.method + ".");
    }
    throw Failure(Failure::Kind::kNotFound, "There is no " + request.path + " here.");
  }

  TurnRunner& runner;
  ResponseStore responses{{}};
  AnswerReplay replay;
  std::vector<Route> routes;
};

Dialects::Dialects(TurnRunner& runner) : impl_(std::make_unique<Impl>(runner)) {}
Dialects::~Dialects() = default;

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
