#include "server/responses.h"

#include "server/answer.h"
#include "server/failure.h"
#include "server/opaque.h"
#include "server/openai.h"
#include "server/responses_request.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor::server {
namespace {

using Kind = AnswerPart::Kind;

Json or_null(const Json& body, const char* member) { return body.contains(member) ? body[member] : Json(); }

/// Turns an answer's parts into the output items of one request.
class Items {
 public:
  explicit Items(const ResponseRequest& request) : request_(request) {}

  /// The id of the item at `index`; made when it is first asked for.
  const std::string& id(const AnswerPart& part, size_t index) {
    while (ids_.size() <= index) {
      ids_.push_back(new_id(part.kind == Kind::kThinking ? "rs_" : part.kind == Kind::kText ? "msg_" : "fc_"));
    }
    return ids_[index];
  }

  /// An item that is complete, or one that has just begun and holds nothing.
  Json item(const AnswerPart& part, size_t index, bool complete) {
    Json item{{"id", id(part, index)}};
    const char* status = complete ? "completed" : "in_progress";
    switch (part.kind) {
      case Kind::kThinking:
        item["type"] = "reasoning";
        item["summary"] = Json::array();
        item["content"] = complete ? Json::array({content(part)}) : Json::array();
        if (request_.encrypted_content) item["encrypted_content"] = complete ? to_opaque(part.text) : "";
        break;
      case Kind::kText:
        item.update({{"type", "message"}, {"status", status}, {"role", "assistant"}});
        item["content"] = complete ? Json::array({content(part)}) : Json::array();
        break;
      case Kind::kToolCall: {
        item.update({{"type", "function_call"}, {"status", status}});
        item.update({{"call_id", part.call.id}, {"name", part.call.name}});
        const auto space = request_.namespaces.find(part.call.name);
        if (space != request_.namespaces.end()) {
          item["namespace"] = space->second.first;
          item["name"] = space->second.second;
        }
        item["arguments"] = complete ? part.call.arguments : "";
        break;
      }
    }
    return item;
  }

  static Json content(const AnswerPart& part, bool complete = true) {
    const std::string text = complete ? part.text : "";
    if (part.kind == Kind::kThinking) return {{"type", "reasoning_text"}, {"text", text}};
    return {{"type", "output_text"}, {"text", text}, {"annotations", Json::array()},
            {"logprobs", logprobs_json(part.logprobs)}};
  }

  Json all(const Answer& answer) {
    Json items = Json::array();
    for (size_t i = 0; i < answer.parts.size(); ++i) items.push_back(item(answer.parts[i], i, true));
    return items;
  }

 private:
  const ResponseRequest& request_;
  std::vector<std::string> ids_;
};

/// The response object. `body` is the request's: much of it is said again.
Json response_json(const Answer& answer, const Json& body, bool store, const char* status, Json output) {
  Json response{{"id", answer.id}, {"object", "response"}, {"created_at", answer.created}, {"status", status}};
  response["background"] = false;
  response["error"] = Json();
  response["incomplete_details"] = Json();
  for (const char* member : {"instructions", "max_output_tokens", "previous_response_id", "reasoning", "temperature",
                             "top_p", "user"}) {
    response[member] = or_null(body, member);
  }
  response["metadata"] = body.contains("metadata") ? body["metadata"] : Json::object();
  response["model"] = answer.start.model;
  response["output"] = std::move(output);
  response["parallel_tool_calls"] = body.value("parallel_tool_calls", Json(true));
  response["store"] = store;
  response["text"] = body.value("text", Json{{"format", {{"type", "text"}}}});
  response["tool_choice"] = body.value("tool_choice", Json("auto"));
  response["tools"] = body.value("tools", Json::array());
  response["top_logprobs"] = body.value("top_logprobs", Json(0));
  response["truncation"] = "disabled";
  response["usage"] = Json();
  return response;
}

void complete(Json& response, const AnswerEnd& end) {
  if (end.reason == StopReason::kLength) {
    response["status"] = "incomplete";
    response["incomplete_details"] = {{"reason", "max_output_tokens"}};
  }
  response["usage"] = {{"input_tokens", end.prompt_tokens},
                       {"input_tokens_details", {{"cached_tokens", end.cached_tokens}}},
                       {"output_tokens", end.generated_tokens},
                       {"output_tokens_details", {{"reasoning_tokens", end.thinking_tokens}}},
                       {"total_tokens", end.prompt_tokens + end.generated_tokens}};
}

/// A response that the store has no room for is told as one that is not stored: it was computed, and its agent has it.
void keep(const ResponseRequest& request, const std::string& id, Json& response, ResponseStore& store) {
  if (!request.store) return;
  Json items = request.items;
  items.insert(items.end(), response["output"].begin(), response["output"].end());
  try {
    store.put({id, request.chat.tenant, response, std::move(items), request.input});
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kResourceExhausted) throw;
    response["store"] = false;
    log(LogLevel::kWarning, std::string("A response is not stored: ") + error.what());
  }
}

class ResponseStream : public StreamSink {
 public:
  ResponseStream(const ResponseRequest& request, const Json& body, ResponseStore& store, HttpResponse& response)
      : StreamSink(response, "resp_", "call_"), request_(request), body_(body), store_(store), items_(request),
        events_(response, kOpenAiKeepAlive) {}

  void fail(const Failure& failure) override {
    const Json error = failure_body(Dialect::kOpenAi, failure)["error"];
    Json response = response_json(answer(), body_, request_.store, "failed", Json::array());
    response["error"] = {{"code", error["code"].is_null() ? Json("server_error") : error["code"]},
                         {"message", error["message"]}};
    send("response.failed", {{"response", response}});
  }

 protected:
  void on_start() override {
    events_.begin(answer().start);
    const Json response = response_json(answer(), body_, request_.store, "in_progress", Json::array());
    send("response.created", {{"response", response}});
    send("response.in_progress", {{"response", response}});
  }
  void on_open(const AnswerPart& part, int index) override {
    send("response.output_item.added", {{"output_index", index}, {"item", items_.item(part, size_t(index), false)}});
    if (part.kind == Kind::kToolCall) return;
    send_part("response.content_part.added", part, index, {{"part", Items::content(part, false)}});
  }
  void on_delta(const AnswerPart& part, int index, std::string_view delta) override {
    switch (part.kind) {
      case Kind::kThinking: return send_part("response.reasoning_text.delta", part, index, {{"delta", delta}});
      case Kind::kText:
        return send_part("response.output_text.delta", part, index,
                         {{"delta", delta}, {"logprobs", logprobs_json(delta_logprobs())}});
      case Kind::kToolCall: break;
    }
    send("response.function_call_arguments.delta",
         {{"item_id", items_.id(part, size_t(index))}, {"output_index", index}, {"delta", delta}});
  }
  void on_close(const AnswerPart& part, int index) override {
    const Json item = items_.item(part, size_t(index), true);
    if (part.kind == Kind::kToolCall) {
      send("response.function_call_arguments.done", {{"item_id", item["id"]}, {"output_index", index},
                                                     {"name", item["name"]}, {"arguments", part.call.arguments}});
    } else {
      Json done{{"text", part.text}};
      if (part.kind == Kind::kText) done["logprobs"] = logprobs_json(part.logprobs);
      const bool is_text = part.kind == Kind::kText;
      send_part(is_text ? "response.output_text.done" : "response.reasoning_text.done", part, index, done);
      send_part("response.content_part.done", part, index, {{"part", Items::content(part)}});
    }
    send("response.output_item.done", {{"output_index", index}, {"item", item}});
  }
  void on_finish() override {
    Json response = response_json(answer(), body_, request_.store, "completed", items_.all(answer()));
    complete(response, answer().end);
    keep(request_, answer().id, response, store_);
    send(response["status"] == "completed" ? "response.completed" : "response.incomplete", {{"response", response}});
  }

 private:
  void send(const char* name, const Json& members) {
    Json event{{"type", name}, {"sequence_number", sequence_++}};
    event.update(members);
    events_.event(name, event);
  }
  void send_part(const char* name, const AnswerPart& part, int index, const Json& members) {
    Json event{{"item_id", items_.id(part, size_t(index))}, {"output_index", index}, {"content_index", 0}};
    event.update(members);
    send(name, event);
  }

  const ResponseRequest& request_;
  const Json& body_;
  ResponseStore& store_;
  Items items_;
  EventStream events_;
  int sequence_ = 0;
};

void answer_json(HttpResponse& response, const Json& json) {
  response.whole(200, {{"content-type", "application/json"}}, to_text(json));
}

}  // namespace

void create_response(const HttpRequest& http, TurnRunner& runner, ResponseStore& store, HttpResponse& response) {
  const Json json = parse_body(http);
  const Field body(json);
  const ResponseRequest request = read_response_request(http, body, store);
  if (body["stream"].boolean().value_or(false)) {
    ResponseStream stream(request, json, store, response);
    run_stream(runner, request.chat, stream, response);
    return;
  }
  PartSink sink("resp_", "call_");
  runner.run(request.chat, sink, response.gone());
  Json whole = response_json(sink.answer(), json, request.store, "completed", Items(request).all(sink.answer()));
  complete(whole, sink.answer().end);
  keep(request, sink.answer().id, whole, store);
  answer_whole(response, sink.answer(), whole);
}

void get_response(const HttpRequest& http, const std::string& id, ResponseStore& store, HttpResponse& response) {
  answer_json(response, stored_response(http.tenant, id, store, "response_id").response);
}

void delete_response(const HttpRequest& http, const std::string& id, ResponseStore& store, HttpResponse& response) {
  stored_response(http.tenant, id, store, "response_id");
  store.remove(http.tenant, id);
  answer_json(response, {{"id", id}, {"object", "response"}, {"deleted", true}});
}

void list_input_items(const HttpRequest& http, const std::string& id, ResponseStore& store, HttpResponse& response) {
  const Json items = stored_response(http.tenant, id, store, "response_id").input;
  answer_json(response, {{"object", "list"}, {"data", items}, {"has_more", false}});
}

}  // namespace torpor::server
