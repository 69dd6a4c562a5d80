#pragma once
/// Which agent goes to sleep when memory is short.

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace torpor {

/// An awake agent that may go: not pinned, not in its turn.
struct Evictable {
  std::string id;
  uint64_t last_used = 0;  ///< greater is later
  size_t bytes = 0;        ///< of its buffers
  bool dirty = false;      ///< must be written first
};

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  /// Index of the one to go; `candidates` is not empty.
  virtual size_t choose(std::span<const Evictable> candidates) const = 0;
};

/// The least recently used.
std::unique_ptr<EvictionPolicy> make_lru();

}  // namespace torpor
