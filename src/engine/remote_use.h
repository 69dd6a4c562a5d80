#pragma once
/// What an Engine asks of its RemoteTier.

#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "torpor/engine.h"
#include "torpor/remote_tier.h"

namespace torpor {

/// One use of an agent that a tier has: from its opening to its end. Without a tier, a name or such an agent it is
/// nothing, and the agent is the store's alone.
class RemoteUse {
 public:
  RemoteUse() = default;
  /// `tier`: nullptr without one. `forget` lets memory go of an agent that isn't this worker's any more.
  RemoteUse(RemoteTier* tier, std::string agent, bool make, const std::function<void()>& forget);
  RemoteUse(RemoteUse&& other) noexcept { swap(other); }
  RemoteUse& operator=(RemoteUse&& other) noexcept {
    RemoteUse(std::move(other)).swap(*this);
    return *this;
  }
  ~RemoteUse() { end(); }

  explicit operator bool() const noexcept { return tier_ != nullptr; }
  /// RemoteTier::answered; nullopt for a turn without an id. The agent is to be this worker's all the same.
  std::optional<std::string> answered(const KnownTurn& turn) const;
  /// RemoteTier::commit, of a turn or of another change; nothing where this is no use.
  void commit(std::optional<KnownTurn> turn = std::nullopt) const;
  /// RemoteTier::remove, likewise.
  void remove() const;
  void end() noexcept;

 private:
  void swap(RemoteUse& other) noexcept {
    std::swap(tier_, other.tier_);
    std::swap(agent_, other.agent_);
  }

  RemoteTier* tier_ = nullptr;
  std::string agent_;
};

/// The turn of a request, without a result; its id is empty where the request has none.
KnownTurn known_turn(const TurnRequest& request);

/// What of a turn's result can't be read off the agent.
std::string encode_result(const TurnResult& result);
/// The inverse, and the rest of what is known. `held`: the agent's ids, of which the answer's are the last; `message`:
/// its last one. kCorruption: it is no such text.
TurnResult decode_result(const std::string& text, const TurnRequest& request, std::vector<int32_t> held,
                         Message message, const Tokenizer& tokenizer);

}  // namespace torpor
