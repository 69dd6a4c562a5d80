#pragma once
/// A turn's result as JSON: what `torpor run --json` prints and /torpor/v1 answers.

#include <cmath>
#include <cstdint>
#include <optional>

#include <nlohmann/json.hpp>

#include "torpor/engine.h"

namespace torpor::faces {

/// `seed`: that makes this answer again; none where chance decided nothing.
inline nlohmann::ordered_json turn_json(const TurnResult& result, std::optional<uint64_t> seed) {
  using Json = nlohmann::ordered_json;
  const auto rounded = [](double ms) { return std::round(ms * 1000) / 1000; };  // microseconds are enough
  Json object{
      {"agent", result.agent},
      {"model", result.model},
      {"text", result.text},
      {"finish_reason", finish_reason_name(result.finish_reason)},
      {"tokens", Json{{"prompt", result.tokens.prompt},
                      {"cached", result.tokens.cached},
                      {"again", result.tokens.again},
                      {"prefilled", result.tokens.prefilled},
                      {"generated", result.tokens.generated},
                      {"proposed", result.tokens.proposed},
                      {"accepted", result.tokens.accepted},
                      {"context", result.tokens.context}}},
      {"timing_ms", Json{{"load", rounded(result.timing_ms.load)},
                         {"wake", rounded(result.timing_ms.wake)},
                         {"ttft", rounded(result.timing_ms.ttft)},
                         {"decode", rounded(result.timing_ms.decode)},
                         {"save", rounded(result.timing_ms.save)}}},
      {"bytes", Json{{"read", result.bytes.read}, {"written", result.bytes.written}}}};
  if (result.repeated) object["repeated"] = true;
  if (seed) object["seed"] = *seed;
  if (!result.stop.empty()) object["stop"] = result.stop;
  const auto logprob = [](const TokenLogprob& token) {
    return Json{{"token", token.token}, {"text", token.text}, {"logprob", token.logprob}};
  };
  for (const TokenLogprobs& token : result.logprobs) {
    Json one = logprob(token);
    one["top"] = Json::array();
    for (const TokenLogprob& other : token.top) one["top"].push_back(logprob(other));
    object["logprobs"].push_back(std::move(one));
  }
  if (const auto& parted = result.divergence) {
    object["divergence"] = Json{{"message", parted->message}, {"held", parted->held}, {"given", parted->given},
                                {"beginning", parted->beginning}};
  }
  if (result.damage) object["damage"] = *result.damage;
  if (!result.notices.empty()) object["notices"] = result.notices;
  return object;
}

}  // namespace torpor::faces
