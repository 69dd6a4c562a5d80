/// HTTP bodies of each dialect: a line with the path, then the body. Any bytes are answered once, in JSON or as a stream, and
/// never by 500.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "recording_response.h"
#include "require.h"
#include "scripted_runner.h"
#include "server/dialects.h"

using namespace torpor::server;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
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
  if (!response.streamed) require(torpor::parse_json<Json>(response.body).is_object());
  return 0;
}
