#pragma once
/// Guesses of what an answer says next: what followed, earlier in the agent's own tokens, the longest text that ends as the
/// answer does now. Whoever computes verifies several guesses in one pass. A wrong guess costs a row and changes nothing.
/// One thread at a time.

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace torpor {

/// What one more row of a step costs, in parts of what a token is worth: a step's time over its turns. Measured as steps go.
class RowCost {
 public:
  /// Turns and rows of a step that may have guesses at all.
  static constexpr int kMostRows = 32;

  /// A step that computed one token of each of `turns` answers, and `guesses` more rows, took `seconds`.
  void took(int turns, int guesses, double seconds);
  /// In [0, 1]: at 1 a guess gains nothing, however sure it is.
  double of(int turns) const;

 private:
  struct Measured {
    double plain = 0;  // seconds of a step without guesses; 0: not known
    double cost = 0;   // 0: not known
  };
  std::array<Measured, kMostRows> measured_;  // by turns
};

/// How many tokens each answer of a step guesses. `left`: of the turns' prompts, as PrefillPace::share takes it. `guess` lets turn `i`
/// guess anew, `most` tokens at most, and gives how many they are. There are no guesses beside rows of a prompt: each costs as much
/// as one of those, and the prompt's first token would wait. An answer without guesses waits for twice as many rows at most.
std::vector<int> share_guesses(std::span<const int> left, const std::function<int(size_t i, int most)>& guess);

/// Where an answer repeats what was there before. Each token costs the same, however many there are.
class SuffixLookup {
 public:
  /// Tokens that a repetition has at least.
  static constexpr int kShortest = 3;

  explicit SuffixLookup(std::span<const int32_t> tokens);
  /// Goes on with the repetition, or finds the longest one anew if that has ended.
  void push(int32_t token);
  /// Tokens that are repeated now; 0: none.
  int length() const noexcept { return length_; }
  /// What follows the repetition, `i` tokens on.
  int32_t following(int i) const;

 private:
  static constexpr int kCandidates = 16, kLongest = 64;  // that are compared: places, and tokens of each
  static constexpr int kHeads = 1 << 14;

  void add(int32_t token);
  void search();

  std::vector<int32_t> tokens_;
  // Hash chains, as deflate has them (RFC 1951, section 4): the places where the last kShortest tokens were seen, the latest first.
  std::vector<int> heads_, before_;  // by hash; by place. A place is the number of tokens before it, 0 is none
  int at_ = 0, length_ = 0;          // the repetition: what follows it, and its tokens
};

class Speculation {
 public:
  /// Guesses of one answer at most.
  static constexpr int kMostGuesses = 16;

  /// `tokens`: what the answer follows.
  explicit Speculation(std::span<const int32_t> tokens) : lookup_(tokens), right_(kBegin) {}
  /// The answer's next token.
  void push(int32_t token);
  /// At most `most` tokens that are likely to come next, all of them with a chance above `cost` (RowCost::of). Ids below 0 and from
  /// `vocabulary` on, which imported agents have, are none.
  std::vector<int32_t> guess(int most, double cost, int vocabulary);

 private:
  /// How sure a guess is grows with the tokens that are repeated: 3, 4 to 7, 8 to 15, 16 to 31, more.
  static constexpr int kKinds = 5;
  static constexpr std::array<double, kKinds> kBegin = {0.3, 0.4, 0.6, 0.8, 0.9};
  /// Below it nothing is guessed, however little a row costs: prose then has under 2% of wrong guesses.
  static constexpr double kLeastChance = 0.6;
  static int kind(int length);

  SuffixLookup lookup_;
  std::array<double, kKinds> right_;  // how often what followed a repetition came again, whether it was guessed or not
};

}  // namespace torpor
