#pragma once
/// Thinking that a client asked not to be shown, but to be given so that it can send it back (Anthropic's `signature`,
/// OpenAI's `encrypted_content`). Encoded, not encrypted: the client may read its own conversation.

#include <optional>
#include <string>
#include <string_view>

namespace torpor::server {

std::string to_opaque(std::string_view thinking);
/// nullopt when this server did not make it.
std::optional<std::string> from_opaque(std::string_view opaque);

}  // namespace torpor::server
