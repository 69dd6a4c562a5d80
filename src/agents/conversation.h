#pragma once
/// What a turn adds to an agent's tokens.
///
/// The tokens an agent holds are its history, and are never rendered again. So a template that strips thinking or
/// reorders arguments can't make a warm agent cold. A turn renders the template around a placeholder that stands for
/// the last answer and encodes only what follows it.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "torpor/message.h"
#include "torpor/text.h"

namespace torpor {

/// A message that an agent holds.
struct HeldMessage : Message {
  int end = 0;  ///< tokens that the agent holds up to its end; of a question: up to where the answer begins
};

/// How a conversation becomes tokens. What it names must outlive it.
struct Phrasing {
  const Tokenizer& tokenizer;
  const ChatTemplate& chat_template;
  std::string variables;  ///< template_variables
  bool special = false;   ///< special tokens that messages and variables hold count as such; else they are text

  RenderedText render(const std::string& messages_json) const { return render(messages_json, variables); }
  RenderedText render(const std::string& messages_json, const std::string& with) const {
    return chat_template.render(messages_json, true, with, special ? nullptr : &tokenizer);
  }
};

/// Tools (a JSON array) and template arguments (a JSON object) as one JSON object of variables; empty when there are
/// none. kInvalidArgument when they are not that.
std::string template_variables(const std::string& tools, const std::string& arguments);

/// Whether two results of template_variables are equal as JSON.
bool same_variables(const std::string& a, const std::string& b);

/// How many of the first messages of `held` and `given` say the same.
size_t count_equal(std::span<const HeldMessage> held, std::span<const Message> given);
/// Looks among the first `equal` messages for the last answer whose own tokens end where it says. Its index and one; 0
/// when there is none.
size_t last_answer(std::span<const HeldMessage> held, size_t equal);

/// All of `messages`, up to where the model's answer begins. kInvalidArgument carries the template's own refusal.
std::vector<int32_t> encode_conversation(const Phrasing& phrasing, std::span<const Message> messages);

/// The same of what follows the answer `messages[answered - 1]`, whose tokens end with `last`. nullopt when the
/// template leaves that answer out. `began_with` are the variables that the conversation began with. nullopt, too, when
/// those of `phrasing` would have rendered anything before the answer otherwise.
std::optional<std::vector<int32_t>> encode_after_answer(const Phrasing& phrasing, std::vector<Message> messages, size_t answered,
                                                        int32_t last, const std::string& began_with);

/// How many tokens at the end of a prompt's `tokens` are the template's way to ask for an answer. The next prompt of the
/// same conversation may go on otherwise there. 0 where that can't be told.
size_t count_asking(const Phrasing& phrasing, std::span<const int32_t> tokens);
/// After how many of a prompt's tokens its system messages, and with them the tools, are over. 0: it has none.
size_t count_system(const Phrasing& phrasing, std::span<const Message> messages, std::span<const int32_t> tokens);

/// All of `messages` as if each answer had come in a turn of its own. Sets their ends. What follows the last answer
/// ends where the next one would begin. kInvalidArgument where the template changes answers.
std::vector<int32_t> encode_history(const Phrasing& phrasing, std::span<HeldMessage> messages);

/// Tokens to append to `held`, which holds `history`, so that the model answers `prompt`. Whatever `held` ends with,
/// raw text too, counts as an answer that is over. `began_with`: see encode_after_answer. kInvalidArgument where that
/// gives nothing.
std::vector<int32_t> encode_user_turn(const Phrasing& phrasing, std::vector<Message> history, std::span<const int32_t> held,
                                      const std::string& prompt, const std::string& began_with);

}  // namespace torpor
