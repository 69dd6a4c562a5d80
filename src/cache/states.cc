/// What of a cache is about recurrent states. A pass writes the spare buffer, which then becomes the live state. The
/// buffer of the state before is the next spare, unless somebody else holds that state.

#include <algorithm>
#include <utility>

#include "torpor/cache.h"
#include "torpor/error.h"

namespace torpor {
namespace {

constexpr auto position_of = [](const std::shared_ptr<const StateCheckpoint>& state) { return state->position(); };

}  // namespace

std::span<const std::byte> KvCache::state() const {
  return states_.empty() ? std::span<const std::byte>() : states_.back()->bytes();
}

std::span<std::byte> KvCache::next_state() {
  if (state_layout_.empty()) return {};
  take_spare();
  return {spare_.get(), state_layout_.bytes()};
}

void KvCache::take_spare() {
  if (spare_ != nullptr || state_layout_.empty()) return;
  spare_ = mlx_buffer(state_layout_.bytes());
  recount_states();
}

void KvCache::advance(int n) {
  if (!state_layout_.empty() && n > 0) {
    if (spare_ == nullptr) throw Error(ErrorCode::kInternal, "A cache with states went on without a new one.");
    auto state = std::make_shared<const StateCheckpoint>(
        length_ + n, std::span<const std::byte>(spare_.get(), state_layout_.bytes()), spare_);
    std::shared_ptr<std::byte> free;
    if (!states_.empty() && !live_kept_) {
      // The checkpoint and we: then nobody else can see the buffer being written.
      if (states_.back().use_count() == 1 && live_buffer_.use_count() == 2) free = live_buffer_;
      states_.pop_back();
    }
    states_.push_back(std::move(state));
    live_kept_ = false;
    live_buffer_ = std::exchange(spare_, std::move(free));
    recount_states();
  }
  length_ += n;
}

void KvCache::drop_spare() {
  if (spare_ == nullptr) return;
  spare_.reset();
  recount_states();
}

void KvCache::drop_state(int64_t position) {
  const auto found = std::ranges::lower_bound(states_, position, {}, position_of);
  if (found == states_.end() || (*found)->position() != position) return;
  if (found + 1 == states_.end()) {
    live_kept_ = false;
  } else {
    states_.erase(found);
    recount_states();
  }
}

void KvCache::add_state(std::shared_ptr<const StateCheckpoint> state) {
  const int64_t position = state->position();
  if (state->bytes().size() != state_layout_.bytes() || position <= 0 || position > length_) {
    throw Error(ErrorCode::kInvalidArgument, "The state after " + std::to_string(position) + " tokens, of " +
                                                 std::to_string(state->bytes().size()) +
                                                 " bytes, is none of a cache of " + std::to_string(length_) +
                                                 " tokens whose states have " +
                                                 std::to_string(state_layout_.bytes()) + ".");
  }
  if (position == length_) live_kept_ = true;
  const auto found = std::ranges::lower_bound(states_, position, {}, position_of);
  if (found != states_.end() && (*found)->position() == position) return;
  states_.insert(found, std::move(state));
  recount_states();
}

int KvCache::resumable(int n_tokens) const {
  if (state_layout_.empty()) return n_tokens;
  const auto after = std::ranges::upper_bound(states_, int64_t(n_tokens), {}, position_of);
  return after == states_.begin() ? 0 : int((*(after - 1))->position());
}

std::vector<const void*> KvCache::state_buffers() const {
  std::vector<const void*> buffers;
  for (const auto& state : states_) buffers.push_back(state->bytes().data());
  if (spare_ != nullptr) buffers.push_back(spare_.get());
  return buffers;
}

void KvCache::cut_states(int n_tokens) {
  if (n_tokens == length_) return;
  while (!states_.empty() && states_.back()->position() > n_tokens) states_.pop_back();
  live_kept_ = !states_.empty();  // as it was when it was no longer live
  live_buffer_ = nullptr;
  recount_states();
}

}  // namespace torpor
