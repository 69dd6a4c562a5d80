#pragma once
/// How many bytes of KV buffers are held, each buffer once however many caches hold it. Incremental: a buffer counts from its
/// first holder to its last. Any thread.

#include <cstddef>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace torpor {

class KvLedger : public std::enable_shared_from_this<KvLedger> {
 public:
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

  mutable std::mutex mutex_;
  std::unordered_map<const void*, Entry> buffers_;
  size_t bytes_ = 0, mapped_bytes_ = 0;
};

}  // namespace torpor
