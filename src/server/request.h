#pragma once
/// Members of a body that several dialects have.

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "server/chat.h"
#include "server/fields.h"
#include "server/http.h"

namespace torpor::server {

/// Model, agent, session and priority of any dialect's body: `model` as "name@agent", the header X-Torpor-Agent, the ids by
/// which clients name a conversation, and whether it can wait: HttpRequest::background, or OpenAI's `service_tier` "flex".
void read_identity(const HttpRequest& http, Field body, ChatRequest& request);

/// Text of a `content`: a string, or an array of text parts put together with `between`. Parts that are no text
/// (images, sound, files) are refused by name.
std::string text_content(Field content, std::string_view between = "\n");

/// JSON text of an object, from a call's arguments as a client repeats them: a string or an object.
std::string call_arguments(Field arguments);

/// Names the tool of each tool result by the call that it answers.
void name_tool_results(std::vector<Message>& messages);

/// "none", "auto", "required", or a named function, as `tool_choice` says it.
void read_tool_choice(Field choice, ChatRequest& request);

/// `temperature` and its kin, under the names that OpenAI's body gives them.
void read_sampling(Field body, Sampling& sampling);

/// What was asked, and of the rest `defaults`; a seed is drawn where none is given. Failure kInvalid when a bias is of
/// a token that a model of `vocab_size` tokens has not.
SamplingOptions sampling_options(const Sampling& asked, SamplingOptions defaults, int vocab_size);

constexpr double kLeastPenalty = 1e-3;  ///< of repetition: logits are divided by it
constexpr int kMostLogprobs = 20;       ///< alternatives of a token

/// `logprobs`, true or false, and `top_logprobs`, which needs it.
std::optional<int> read_logprobs(Field body);

/// `stop`: a string, or several.
std::vector<std::string> read_stop(Field stop);

/// The members "type", "name", "schema" and "strict" of `response_format`; in `text.format` of responses they lie flat.
ResponseFormat read_response_format(Field format);

/// "reasoning_effort": the template's variable of that name, and `enable_thinking` when it is "none".
void read_effort(Field effort, ChatRequest& request);

}  // namespace torpor::server
