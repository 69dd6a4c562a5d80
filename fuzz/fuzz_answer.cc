/// The text that a model generates: any bytes are an answer, parted alike wherever it is cut, in each way of writing calls.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "require.h"
#include "server/answer_parser.h"

namespace {

using namespace torpor::server;

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
    require(torpor::parse_json<Json>(delta).is_object());
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

void check(std::string_view text) {
  // kFunctionTags and kArgumentTags are read as kTagged.
  for (const CallFormat calls : {CallFormat::kNone, CallFormat::kTagged, CallFormat::kLlama, CallFormat::kMistral,
                                 CallFormat::kGemma, CallFormat::kHarmony}) {
    const std::string whole = parse(calls, text, text.size());
    for (const size_t part : {2, 3, 7}) require(parse(calls, text, text.size() / part) == whole);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  check({reinterpret_cast<const char*>(data), size});
  return 0;
}
