#include "engine/remote_use.h"

#include <algorithm>

#include "base/hash.h"
#include "base/json.h"
#include "torpor/error.h"

namespace torpor {

using Json = nlohmann::json;

RemoteUse::RemoteUse(RemoteTier* tier, std::string agent, bool make, const std::function<void()>& forget) {
  if (tier == nullptr || agent.empty()) return;
  if (!tier->owns(agent)) forget();
  if (!tier->open(agent, make)) return;
  tier_ = tier;
  agent_ = std::move(agent);
}

std::optional<std::string> RemoteUse::answered(const KnownTurn& turn) const {
  return tier_ == nullptr ? std::nullopt : tier_->answered(agent_, turn);
}

void RemoteUse::commit(std::optional<KnownTurn> turn) const {
  if (tier_ != nullptr) tier_->commit(agent_, turn);
}

void RemoteUse::remove() const {
  if (tier_ != nullptr) tier_->remove(agent_);
}

void RemoteUse::end() noexcept {
  if (RemoteTier* const tier = std::exchange(tier_, nullptr)) tier->done(agent_);
}

KnownTurn known_turn(const TurnRequest& request) {
  if (request.id.empty()) return {};
  Hasher hasher;
  for (const std::string& text : {request.prompt, request.system.value_or(""), request.tools,
                                  request.template_arguments, std::string(request.raw ? "raw" : "")}) {
    hasher.update_field(text);
  }
  for (const Message& message : request.messages) hasher.update_field(message_to_json(message));
  return {request.id, hasher.hex(), {}};
}

std::string encode_result(const TurnResult& result) {
  constexpr size_t kMostStop = 64;  // bytes; a longer one is left out
  Json json{{"finish", finish_reason_name(result.finish_reason)},
            {"prompt", result.tokens.prompt},
            {"cached", result.tokens.cached},
            {"prefilled", result.tokens.prefilled},
            {"generated", result.tokens.generated}};
  if (!result.stop.empty() && result.stop.size() <= kMostStop) json["stop"] = result.stop;
  return dump_json(json);
}

TurnResult decode_result(const std::string& text, const TurnRequest& request, std::vector<int32_t> held,
                         Message message, const Tokenizer& tokenizer) {
  TurnResult result;
  try {
    const Json json = parse_json<Json>(text);
    const std::string finish = json.at("finish");
    for (const FinishReason reason : {FinishReason::kStop, FinishReason::kLength, FinishReason::kCancelled}) {
      if (finish == finish_reason_name(reason)) result.finish_reason = reason;
    }
    result.tokens.prompt = json.at("prompt").get<int>();
    result.tokens.cached = json.at("cached").get<int>();
    result.tokens.prefilled = json.at("prefilled").get<int>();
    result.tokens.generated = json.at("generated").get<int>();
    result.stop = json.value("stop", "");
  } catch (const Json::exception&) {
    result.tokens.prompt = -1;
  }
  if (result.tokens.prompt < 0 || size_t(result.tokens.prompt) > held.size()) {
    throw Error(ErrorCode::kCorruption, "What the bucket says of the last turn of agent '" + request.agent +
                                            "' can't be read; ask again under another id.")
        .with_agent(request.agent);
  }
  result.agent = request.agent;
  result.repeated = true;
  result.tokens.context = int(held.size());
  // A message that was made of the text need not have all of it.
  result.text = message.content;
  if (request.read_answer) {
    held.erase(held.begin(), held.begin() + result.tokens.prompt);
    std::erase_if(held, [](int32_t id) { return id < 0; });
    result.text = tokenizer.decode(held, true);
  }
  result.message = std::move(message);
  return result;
}

}  // namespace torpor
