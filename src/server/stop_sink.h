#pragma once
/// Stop strings in an answer's text, and what the choice of a tool demands of it.

#include <string>
#include <string_view>
#include <vector>

#include "server/answer_parser.h"
#include "server/chat.h"

namespace torpor::server {

/// An AnswerSink before another one, that ends the text before the first stop string. Thinking and calls are passed on
/// unsearched. Text that may be the beginning of a stop string waits.
class StopSink : public AnswerSink {
 public:
  /// `sink` must outlive it. `withhold_text`: the answer must be a call, so no text is passed on.
  StopSink(std::vector<std::string> stop, bool withhold_text, AnswerSink& sink)
      : stop_(std::move(stop)), withhold_text_(withhold_text), sink_(sink) {}
  /// The parser that tells it the answer, for position() and cut().
  void follow(const AnswerParser& parser) { parser_ = &parser; }

  void start(const AnswerStart& start) override { sink_.start(start); }
  void progress(int done, int total) override { sink_.progress(done, total); }
  void thinking(std::string_view delta) override;
  void text(std::string_view delta) override;
  void tool_call(const std::string& name) override;
  void arguments(std::string_view delta) override;
  /// Passes on what waited, then the end.
  void finish(const AnswerEnd& end) override;

  /// The stop string that was met; empty until then. Nothing is passed on afterwards.
  const std::string& met() const { return met_; }
  /// Where that begins, in bytes of all that the parser was given.
  size_t cut() const { return position_; }
  /// Where the text that is passed on begins, likewise; inside `sink`'s text().
  size_t position() const { return position_; }

 private:
  void release();

  std::vector<std::string> stop_;
  bool withhold_text_;
  AnswerSink& sink_;
  const AnswerParser* parser_ = nullptr;
  std::string waiting_, met_;
  size_t position_ = 0;  // of the text that waits
};

}  // namespace torpor::server
