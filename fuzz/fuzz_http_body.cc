/// HTTP bodies, and the text that a model generates. What begins with '/' is a line with the path, then the body: any bytes
/// are answered once, in JSON or as a stream, and never by 500. Other bytes are an answer, parted alike wherever it is cut.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "recording_response.h"
#include "scripted_runner.h"
#include "server/answer_parser.h"
#include "server/dialects.h"

namespace {

using namespace torpor::server;

void require(bool ok, int line = __builtin_LINE()) {
  if (ok) return;
  std::fprintf(stderr, "line %d: what was promised does not hold\n", line);
  std::abort();
}

void check_body(std::string_view bytes) {
  static ScriptedRunner runner([](const ChatRequest& request, Say& say) {
    say.start().thinking("t").text("x");
    if (!request.tools.empty()) say.call(request.tools[0].name, {"{}"});
    say.finish();
  });
  static Dialects dialects(runner);
  runner.heard.clear();
  HttpRequest request;
  const size_t line = std::min(bytes.find('\n'), bytes.size());
  request.method = "POST";
  request.path = bytes.substr(0, line);
  request.body = bytes.substr(std::min(line + 1, bytes.size()));
  RecordingResponse response;
  dialects.handle(request, response);
  require(response.ended && response.status != 500);
  if (!response.streamed) require(Json::parse(response.body).is_object());
}

class Told : public AnswerSink {
 public:
  std::string told;
  void start(const AnswerStart&) override {}
  void thinking(std::string_view delta) override { piece('t', delta); }
  void text(std::string_view delta) override { piece('x', delta); }
  void tool_call(const std::string& name) override {
    kind_ = 'c';
    told += "\x01" + name + "\x02";
  }
  void arguments(std::string_view delta) override {
    require(Json::parse(delta).is_object());
    told += delta;
  }
  void finish(const AnswerEnd&) override {}

 private:
  void piece(char kind, std::string_view delta) {
    require(!delta.empty());
    if (kind_ != kind) told += {'\x01', kind};
    kind_ = kind;
    told += delta;
  }
  char kind_ = 0;
};

std::string parse(CallFormat calls, std::string_view text, size_t cut) {
  AnswerParser::Options options{{calls, "<think>", "</think>"}, {{"read", "", Json::object(), false}}, false, false};
  Told told;
  AnswerParser parser(options, told);
  parser.push(text.substr(0, cut));
  parser.push(text.substr(cut));
  parser.finish();
  return told.told;
}

void check_answer(std::string_view text) {
  for (const CallFormat calls : {CallFormat::kNone, CallFormat::kTagged, CallFormat::kLlama, CallFormat::kMistral,
                                 CallFormat::kGemma, CallFormat::kHarmony}) {
    const std::string whole = parse(calls, text, text.size());
    for (const size_t part : {2, 3, 7}) require(parse(calls, text, text.size() / part) == whole);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  if (bytes.starts_with('/')) check_body(bytes);
  else check_answer(bytes);
  return 0;
}
