#include "server/response_store.h"

#include <algorithm>

namespace torpor::server {

std::deque<ResponseStore::Entry>::iterator ResponseStore::locate(const std::string& tenant, const std::string& id) {
  return std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) {
    return entry.response.id == id && entry.response.tenant == tenant;
  });
}

void ResponseStore::drop_old() {
  const auto now = std::chrono::steady_clock::now();
  while (!entries_.empty() && (entries_.size() > limits_.count || bytes_ > limits_.bytes ||
                               now - entries_.front().stored >= limits_.lifetime)) {
    bytes_ -= entries_.front().bytes;
    entries_.pop_front();
  }
}

void ResponseStore::put(StoredResponse response) {
  // Text is what there is most of; the trees around it count about as much.
  const size_t bytes = 2 * (to_text(response.response).size() + to_text(response.items).size());
  const MutexLock lock(mutex_);
  entries_.push_back({std::move(response), bytes, std::chrono::steady_clock::now()});
  bytes_ += bytes;
  drop_old();
}

std::optional<StoredResponse> ResponseStore::find(const std::string& tenant, const std::string& id) {
  const MutexLock lock(mutex_);
  drop_old();
  const auto found = locate(tenant, id);
  if (found == entries_.end()) return std::nullopt;
  return found->response;
}

bool ResponseStore::remove(const std::string& tenant, const std::string& id) {
  const MutexLock lock(mutex_);
  const auto found = locate(tenant, id);
  if (found == entries_.end()) return false;
  bytes_ -= found->bytes;
  entries_.erase(found);
  return true;
}

}  // namespace torpor::server
