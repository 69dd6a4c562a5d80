#pragma once
/// Tokenizer's inside, which templates and grammars see too.

#include <string>

#include "text/shim.h"
#include "torpor/text.h"

namespace torpor {

struct Tokenizer::Impl {
  text::TokenizerHandle handle;
  std::string digest;
};

}  // namespace torpor
