#pragma once
/// The end-of-turn token of a model's tokenizer, which configs often lack.

#include <cstdint>
#include <filesystem>
#include <optional>

namespace torpor::model {

/// The id of the tokenizer's `eos_token`: the name from tokenizer_config.json (special_tokens_map.json in old directories), the id
/// from there too, else from tokenizer.json. nullopt where they do not say: files that can't be read are the text room's to refuse.
std::optional<int32_t> tokenizer_eos(const std::filesystem::path& dir);

}  // namespace torpor::model
