#pragma once
/// A conversation as people count it: a user's message and all that follows up to the next one.

#include <cstdint>
#include <string>
#include <vector>

#include "cli/output.h"
#include "torpor/store.h"

namespace torpor::cli {

/// An agent's messages as it last was saved. What is nested deeper than any message is left out: printing recurses as deep as the
/// value.
Json messages_of(const Store& store, const std::string& id);
Json messages_of(const std::vector<StoredMessage>& messages);
/// The text of a message's member; JSON where it is none. Empty without such a member.
std::string text_of(const Json& message, const char* key);

struct Exchange {
  int64_t begin = 0, end = 0;  ///< its tokens
  std::string user, answer;    ///< the first message's text, and the last one's
};

/// First to last. What stands before the first user's message belongs to the first exchange.
std::vector<Exchange> exchanges_of(const std::vector<StoredMessage>& messages);
/// Of the agent's last save.
std::vector<Exchange> exchanges_of(const Store& store, const std::string& id);

/// Tokens up to the end of the first `n` exchanges of the agent `id`. kInvalidArgument when there are fewer.
int64_t end_of_exchange(const std::vector<Exchange>& exchanges, const std::string& id, int64_t n);
/// Tokens that stay when the last `n` exchanges are forgotten, likewise.
int64_t begin_of_last(const std::vector<Exchange>& exchanges, const std::string& id, int64_t n);

/// One line of a text, at most `width` characters of it.
std::string first_line(const std::string& text, size_t width);

}  // namespace torpor::cli
