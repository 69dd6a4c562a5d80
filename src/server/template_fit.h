#pragma once
/// Conversations fitted to what a model's chat template can render. Templates refuse a system message in
/// mid-conversation, two messages of one role in a row, or any system message, and some have no place for tools.
/// Clients send all of these.

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "server/answer_parser.h"
#include "server/chat.h"
#include "torpor/message.h"
#include "torpor/text.h"

namespace torpor::server {

/// A conversation as the engine takes it.
struct FittedConversation {
  std::vector<torpor::Message> messages;
  std::string tools;  ///< JSON array for the template; empty: none, or they stand in the first message
};

/// Immutable; any thread. What a message becomes depends on it and those before it alone, so a conversation that grows
/// keeps its beginning.
class TemplateFit {
 public:
  /// Tries the template out. `source` is its text.
  TemplateFit(std::shared_ptr<const ChatTemplate> chat_template, const std::string& source);

  /// Tools are told of in the order of their names: some programs have them in another one whenever they start.
  FittedConversation fit(const std::vector<Message>& messages, std::vector<Tool> tools) const;
  /// An answer as fit would give it in a later request.
  torpor::Message fit_answer(const Message& answer) const;
  /// How the model writes thinking and calls.
  const AnswerFormat& format() const { return format_; }
  /// Whether an answer begins inside thinking, with these template arguments.
  bool opens_thinking(const Json& template_arguments) const;
  bool renders_tools() const { return tools_; }
  /// Whether a message may hold several calls.
  bool parallel_calls() const { return parallel_calls_; }

 private:
  bool renders(const Json& messages, const Json& variables = Json::object(), std::string_view expected = {}) const;

  std::shared_ptr<const ChatTemplate> chat_template_;
  AnswerFormat format_;
  bool system_ = false;      ///< a system message at the beginning
  bool mid_system_ = false;  ///< and later
  bool repeats_ = false;     ///< two messages of one role in a row
  bool tools_ = false;       ///< tools, their calls and results
  bool parallel_calls_ = true;
};

/// The text of a model directory's chat template; empty when it has none.
std::string template_source(const std::filesystem::path& dir);

}  // namespace torpor::server
