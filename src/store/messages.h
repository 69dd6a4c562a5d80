#pragma once
/// An agent's messages as JSON: what stands in the tensor `messages` of its files.

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "torpor/store.h"

namespace torpor {

/// A JSON array: each message with its `ids` last. Empty when there are none. kInvalidArgument when one is no JSON object.
std::string encode_messages(std::span<const StoredMessage> messages);

/// The inverse. kCorruption naming the file.
std::vector<StoredMessage> decode_messages(std::string_view json, const std::string& file_name);

/// Of format versions 1 and 2: an array of {"role", "content"}, and "12,40", the tokens up to the end of each. False, and
/// nothing is added, when the texts are not that: then somebody else keeps something under these names.
bool decode_old_messages(std::string_view json, std::string_view ends, int64_t n_tokens, std::vector<StoredMessage>& messages);

}  // namespace torpor
