#pragma once
/// What a user turn adds to an agent's tokens.
///
/// The tokens an agent holds are its history: they are never rendered again, so a template that strips thinking or
/// reorders arguments can't make a warm agent cold. A turn renders the template around a placeholder that stands for
/// the last answer and encodes only what follows it.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "torpor/text.h"

namespace torpor {

struct Message {
  std::string role, content;
  int end = 0;  ///< tokens that the agent holds up to the end of this message; of a question: up to where the answer begins
};

/// The conversation as the agent's metadata keeps it: a JSON array of {"role", "content"}. kInvalidArgument for
/// invalid UTF-8.
std::string messages_to_json(const std::vector<Message>& messages);
/// One of them, as it is stored.
std::string message_to_json(const Message& message);
/// kCorruption when `json` is no such message.
Message message_from_json(const std::string& json);

/// Tokens to append to `held` (whose messages are `history`, ending with the assistant's) so that the model answers
/// `prompt`. With an empty `held` the whole conversation is rendered. kInvalidArgument carries the template's own refusal.
std::vector<int32_t> encode_user_turn(const Tokenizer& tokenizer, const ChatTemplate& chat_template,
                                      const std::vector<Message>& history, const std::vector<int32_t>& held,
                                      const std::string& prompt);

}  // namespace torpor
