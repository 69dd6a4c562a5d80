#pragma once
/// The tokens of a GGUF file that end a turn.

#include <cstdint>
#include <set>

#include "base/gguf.h"

namespace torpor {

struct GgufEnds {
  std::set<int32_t> ids;      ///< all: those that the metadata name, and `by_text`
  std::set<int32_t> by_text;  ///< those that are known for it: control tokens, whatever type the file gives them
};

/// As llama.cpp finds them, but for `</s>`: only a control token of that text ends a turn, elsewhere it is HTML's.
/// kInvalidArgument for metadata of other types.
GgufEnds gguf_ends(const GgufFile& metadata);

}  // namespace torpor
