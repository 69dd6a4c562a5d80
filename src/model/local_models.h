#pragma once
/// Where other programs keep models that they have fetched.

#include <filesystem>

#include "torpor/model_info.h"

namespace torpor {

/// Where Hugging Face's tools keep what is theirs (`HF_HOME`), by their own rules.
std::filesystem::path hub_home();
/// Where they keep repositories.
std::filesystem::path hub_cache();
/// What `main` of a repository is there ("models--ORG--NAME"); empty when it is not there.
std::filesystem::path hub_snapshot(const std::filesystem::path& repo);

/// Fills in what the headers of the model's files say, or `problem`.
void describe_headers(LocalModel& model);

}  // namespace torpor
