#pragma once
/// Which weights are read after which: a model reads the same ones for each token, in the same order.

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace torpor::kernels {

/// Of one thread. Weights are told apart by where they begin, and never read here: they may be gone.
class ReadingOrder {
 public:
  using Weights = std::span<const std::byte>;

  /// `now` is about to be read. Returns what was read next the last time; empty if that is not known.
  Weights next(Weights now) {
    if (Entry& before = entry(last_); before.begin == last_) before.next = now;
    last_ = now.data();
    Entry& found = entry(last_);
    if (found.begin != last_) found = {last_, {}};
    return found.next;
  }

 private:
  struct Entry {
    const std::byte* begin = nullptr;
    Weights next;
  };
  /// Of a model with more some are forgotten.
  static constexpr int kLogEntries = 10;

  Entry& entry(const std::byte* begin) {
    const uint64_t hash = uint64_t(reinterpret_cast<uintptr_t>(begin)) * 0x9E3779B97F4A7C15u;
    return entries_[hash >> (64 - kLogEntries)];
  }

  std::array<Entry, size_t{1} << kLogEntries> entries_;
  const std::byte* last_ = nullptr;
};

}  // namespace torpor::kernels
