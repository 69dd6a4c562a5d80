/// A server without a model, for clients that speak HTTP: the dialects over a script. It prints its port, and ends with its
/// standard input. The last message says what is answered:
///
///     say TEXT          text, word by word, each a token      think TEXT     thinking, then text
///     call NAME JSON    a call of a tool              stop           an answer that a stop string ended
///     fail              an error after some text      full, long, missing   a Failure before the start
///     wait              nothing, until the client has gone
///
/// A tool's result is quoted; "how many gone" tells how many clients went during "wait".

#include <atomic>
#include <chrono>
#include <iostream>
#include <optional>
#include <sstream>
#include <thread>

#include "scripted_runner.h"
#include "server/dialects.h"
#include "server/http_edge.h"
#include "torpor/error.h"

namespace {

using namespace torpor::server;

std::atomic<int> gone{0};

void speak(Say& say, const std::string& text, std::optional<int> logprobs = {}) {
  std::istringstream words(text);
  size_t told = 0;
  for (std::string word; words >> word;) {
    if (told > 0) word = " " + word;
    if (logprobs) say.tokens({word}, *logprobs, told);
    say.text(word);
    told += word.size();
  }
}

[[noreturn]] void refuse(Failure::Kind kind, const char* message) {
  Failure failure(kind, message, kind == Failure::Kind::kNotFound ? "model" : "");
  failure.tokens = 5000;
  failure.maximum = 4096;
  if (kind == Failure::Kind::kOverloaded) failure.retry_after = 1;
  throw failure;
}

void answer(const ChatRequest& request, Say& say) {
  const std::string text = request.prompt ? "say " + *request.prompt : request.messages.back().text;
  if (!request.prompt && request.messages.back().role == Role::kTool) {
    speak(say.start(), request.messages.back().tool_name + " says " + text);
    return say.finish();
  }
  const size_t space = text.find(' ');
  const std::string verb = text.substr(0, space), rest = space == std::string::npos ? "" : text.substr(space + 1);
  if (verb == "full") refuse(Failure::Kind::kOverloaded, "The queue is full.");
  if (verb == "long") refuse(Failure::Kind::kContextTooLong, "The prompt is too long.");
  if (verb == "missing") refuse(Failure::Kind::kNotFound, "There is no such model.");
  if (verb == "wait") {
    while (!say.gone()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ++gone;
    throw torpor::Error(torpor::ErrorCode::kCancelled, "The turn was cancelled.");
  }
  say.start();
  if (verb == "call") {
    const size_t end = rest.find(' ');
    say.call(rest.substr(0, end), {rest.substr(end + 1, 5), rest.substr(end + 6)});
    return say.finish(StopReason::kToolCalls);
  }
  if (verb == "think") {
    say.thinking("Let me ").thinking("think.");
    speak(say, rest);
    return say.finish(StopReason::kEnd, 9, 4);
  }
  if (verb == "stop") {
    say.text("Until here");
    return say.finish(StopReason::kStopString, 2, 0, request.stop.empty() ? "END" : request.stop[0]);
  }
  if (verb == "fail") {
    say.text("Some text");
    throw torpor::Error(torpor::ErrorCode::kIo, "The disk is full.");
  }
  if (text == "how many gone") speak(say, std::to_string(gone));
  else speak(say, verb == "say" ? rest : "You said: " + text, request.logprobs);
  say.finish();
}

}  // namespace

int main() {
  ScriptedRunner runner(answer);
  Dialects dialects(runner);
  HttpEdgeOptions options;
  options.port = 0;
  HttpEdge edge(options, dialects);
  std::cout << edge.port() << std::endl;
  while (std::cin.get() != EOF) {
  }
}
