#pragma once
/// The grammar that an answer is held to: a response format, calls that must come, and arguments of calls that may.

#include <optional>
#include <string>

#include "server/answer_parser.h"
#include "server/chat.h"
#include "torpor/text.h"

namespace torpor::server {

/// In llguidance's dialect of Lark; nullopt where any answer will do. `parsing`: how the answer is written and which tools it may
/// call, as the parser is told. Thinking before it is free. Failure kInvalid where the response format can't be held to beside
/// tools.
std::optional<std::string> answer_grammar(const ChatRequest& request, const AnswerParser::Options& parsing,
                                          const Tokenizer& tokenizer);

}  // namespace torpor::server
