#include "engine/speculation.h"

#include <algorithm>
#include <bit>

namespace torpor {
namespace {

/// Part of a new measurement in what is known. Outliers, such as a paused process, count little for it.
constexpr double kWeight = 0.125;

/// More is not measured, so that guesses that are all but sure go on, and what rows cost stays known.
constexpr double kMostCost = 0.9;

}  // namespace

// ---- what a row costs

void RowCost::took(int turns, int guesses, double seconds) {
  if (turns < 1 || turns >= kMostRows || seconds <= 0) return;
  auto& [plain, cost] = measured_[size_t(turns)];
  if (guesses == 0) {
    plain = plain == 0 ? seconds : plain + kWeight * std::clamp(seconds - plain, -plain / 2, plain / 2);
    // What was measured once, in a busy moment perhaps, is forgotten by and by.
    if (cost != 0) cost += (RowCost().of(turns) - cost) / 64;
  } else if (plain != 0) {
    const double found = std::clamp(turns * (seconds - plain) / (plain * guesses), 0.05, kMostCost);
    cost = of(turns) + kWeight * (found - of(turns));
  }
}

double RowCost::of(int turns) const {
  if (turns < 1 || turns >= kMostRows) return 1;
  // Not known: rows of several turns are computed as those of one would be, each for 0.35 of the first one's time.
  constexpr double kFirst = 0.35;
  const double cost = measured_[size_t(turns)].cost;
  return cost != 0 ? cost : turns * kFirst / (1 + kFirst * (turns - 1));
}

std::vector<int> share_guesses(std::span<const int> left, const std::function<int(size_t, int)>& guess) {
  std::vector<int> guesses(left.size());
  const int decoding = int(std::ranges::count(left, 0));
  const bool reads = std::ranges::any_of(left, [](int tokens) { return tokens > 0; });
  const int most = decoding > 0 && !reads ? RowCost::kMostRows / decoding - 1 : 0;
  int guessing = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    if (left[i] == 0) guessing += (guesses[i] = guess(i, most)) > 0;
  }
  for (size_t i = 0; guessing < decoding && i < left.size(); ++i) {
    if (guesses[i] > 0) guesses[i] = guess(i, std::min(most, decoding / guessing));
  }
  return guesses;
}

// ---- repetitions

SuffixLookup::SuffixLookup(std::span<const int32_t> tokens) : heads_(kHeads), before_(kShortest) {
  tokens_.reserve(tokens.size() + 256);
  before_.reserve(tokens.size() + 256);
  for (const int32_t token : tokens) add(token);
}

void SuffixLookup::add(int32_t token) {
  tokens_.push_back(token);
  if (tokens_.size() < size_t(kShortest)) return;
  uint32_t hash = 0;
  for (const int32_t one : std::span(tokens_).last(kShortest)) hash = (hash ^ uint32_t(one)) * 0x9E3779B1u;
  int& last = heads_[hash >> (32 - std::countr_zero(unsigned(kHeads)))];
  before_.push_back(last);
  last = int(tokens_.size());
}

void SuffixLookup::push(int32_t token) {
  const bool goes_on = length_ > 0 && following(0) == token;
  add(token);
  at_ = goes_on ? at_ + 1 : 0;
  length_ = goes_on ? length_ + 1 : 0;
  if (length_ == 0) search();
}

void SuffixLookup::search() {
  if (tokens_.size() < size_t(kShortest)) return;
  int place = before_[tokens_.size()];
  for (int i = 0; i < kCandidates && place > 0; ++i, place = before_[size_t(place)]) {
    const auto end = tokens_.rbegin(), there = tokens_.rend() - place;
    const int same = int(std::mismatch(there, there + std::min(place, kLongest), end).first - there);
    if (same < kShortest || same <= length_) continue;  // another text of the same hash; no longer one
    at_ = place;
    length_ = same;
  }
}

int32_t SuffixLookup::following(int i) const {
  // What is repeated may end where it begins again: it goes on with itself then.
  const size_t period = tokens_.size() - size_t(at_);
  return tokens_[size_t(at_) + size_t(i) % period];
}

// ---- guesses

int Speculation::kind(int length) { return std::clamp(int(std::bit_width(unsigned(length))) - 2, 0, kKinds - 1); }

void Speculation::push(int32_t token) {
  if (const int length = lookup_.length(); length > 0) {
    double& right = right_[size_t(kind(length))];
    right += ((lookup_.following(0) == token ? 1 : 0) - right) / 16;
  }
  lookup_.push(token);
}

std::vector<int32_t> Speculation::guess(int most, double cost, int vocabulary) {
  std::vector<int32_t> guesses;
  if (lookup_.length() == 0) return guesses;
  double chance = 1;
  for (int i = 0; i < std::min(most, kMostGuesses); ++i) {
    chance *= right_[size_t(kind(lookup_.length() + i))];
    const int32_t token = lookup_.following(i);
    if (chance <= std::max(cost, kLeastChance) || token < 0 || token >= vocabulary) break;
    guesses.push_back(token);
  }
  return guesses;
}

}  // namespace torpor
