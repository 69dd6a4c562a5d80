#pragma once
/// How many bytes of KV buffers are held, each buffer once however many caches hold it, and the budget that they share.
/// Incremental: a buffer counts from its first holder to its last. Any thread.

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/mutex.h"

namespace torpor {

class KvLedger : public std::enable_shared_from_this<KvLedger> {
 public:
  /// `budget` in bytes; 0: unlimited.
  explicit KvLedger(size_t budget = 0) : budget_(budget) {}

  /// That somebody holds a buffer. Move-only; let go of when destroyed.
  class Share {
   public:
    Share() = default;
    /// `bytes` are those that this holder can use; a buffer counts as many as any of its holders can.
    Share(std::shared_ptr<KvLedger> ledger, const void* buffer, size_t bytes, bool mapped);
    Share(Share&& other) noexcept { swap(other); }
    Share& operator=(Share&& other) noexcept {
      Share(std::move(other)).swap(*this);
      return *this;
    }
    ~Share();
    bool is(const void* buffer, size_t bytes, bool mapped) const noexcept {
      return buffer_ == buffer && bytes_ == bytes && mapped_ == mapped;
    }

   private:
    friend class KvLedger;
    void swap(Share& other) noexcept {
      std::swap(ledger_, other.ledger_);
      std::swap(buffer_, other.buffer_);
      std::swap(bytes_, other.bytes_);
      std::swap(mapped_, other.mapped_);
    }
    std::shared_ptr<KvLedger> ledger_;
    const void* buffer_ = nullptr;
    size_t bytes_ = 0;
    bool mapped_ = false;
  };

  /// Room for buffers that are about to be held. Whoever has it takes as much memory and then lets go of it. Move-only.
  class Room {
   public:
    Room() = default;
    Room(Room&& other) noexcept { *this = std::move(other); }
    Room& operator=(Room&& other) noexcept {
      std::swap(ledger_, other.ledger_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Room();

   private:
    friend class KvLedger;
    std::shared_ptr<KvLedger> ledger_;
    size_t bytes_ = 0;
  };
  /// nullopt when the budget has not so much room: what is held, and the room that others have, count.
  std::optional<Room> take_room(size_t bytes);

  /// A buffer that somebody is about to hold (Share).
  struct Buffer {
    const void* data = nullptr;
    size_t bytes = 0;
    bool mapped = false;
  };
  /// All of them, or nullopt when the budget has no room for those that nobody holds yet.
  std::optional<std::vector<Share>> share_within_budget(std::span<const Buffer> buffers);

  size_t budget() const { return budget_; }
  /// How many hold the buffer.
  int holders(const void* buffer) const;
  size_t bytes() const;
  /// Of those, pages of segment files.
  size_t mapped_bytes() const;

 private:
  struct Entry {
    std::vector<std::pair<size_t, int>> holders;  // bytes, and how many holders can use as many; few are different
    bool mapped = false;
    size_t bytes() const;
  };
  /// One holder of `bytes` more (`n` = 1) or less (-1).
  void change(const void* buffer, size_t bytes, bool mapped, int n);
  /// The same. Only one more can throw.
  void change_locked(const void* buffer, size_t bytes, bool mapped, int n) TORPOR_REQUIRES(mutex_);

  const size_t budget_;
  mutable Mutex mutex_;
  std::unordered_map<const void*, Entry> buffers_ TORPOR_GUARDED_BY(mutex_);
  size_t bytes_ TORPOR_GUARDED_BY(mutex_) = 0;
  size_t mapped_bytes_ TORPOR_GUARDED_BY(mutex_) = 0;
  size_t room_ TORPOR_GUARDED_BY(mutex_) = 0;  ///< that has been taken, and is not held yet
};

}  // namespace torpor
