#pragma once
/// The write-behind: a thread that saves agents while the engine thread goes on. It gets evaluated bytes and never calls
/// MLX. Any thread may call it; nothing is dropped: a job ends written or with the error that its outcome carries.

#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor {

class Writer {
 public:
  struct Job {
    std::string agent;      ///< empty: the snapshot's segments alone (Store::save_prefix)
    uint64_t ticket = 0;    ///< Agent::ticket; comes back in the outcome
    uint64_t version = 0;   ///< of the agent; comes back in the outcome
    KvSnapshot snapshot;
    std::string model;
    UserMetadata user;
    AgentNotes notes;
    size_t new_bytes = 0;   ///< that are in memory for this job alone, or not yet on disk: what the queue's bound counts
  };
  struct Outcome {
    std::string agent;
    uint64_t ticket = 0, version = 0;
    SaveResult result;
    std::optional<Error> error;
    bool awaited = false;  ///< somebody has the save's future, and hears the error there
  };
  /// What a save comes to. Gives its Error.
  using Saving = std::shared_future<SaveResult>;
  /// Jobs done and jobs to do in all.
  using Progress = std::function<void(int done, int total)>;

  /// `store` outlives the writer. The queue holds `max_bytes` at most, or one job.
  Writer(Store& store, Durability durability, size_t max_bytes);
  /// Writes what is queued.
  ~Writer();

  /// Takes the place of a job of the same agent that has not begun. Waits while the queue is full.
  void submit(Job job);
  /// The newest save of the agent that was submitted and is not collected yet; one that has written nothing where there is none.
  Saving await(uint64_t ticket);
  /// Until nothing of the agent is queued or being written.
  void wait(uint64_t ticket);
  /// Until nothing is queued. `submitted` jobs count as to be done even where some were over before this call.
  void wait_all(const Progress& progress = nullptr, size_t submitted = 0);
  /// What was finished since the last call, in order.
  std::vector<Outcome> collect();
  size_t queued_bytes() const;

 private:
  struct Queued {
    explicit Queued(Job given) : job(std::move(given)) {}
    Job job;
    std::optional<std::promise<SaveResult>> awaited;
    Saving saving;
  };

  void run();
  Outcome write(const Job& job);
  static void tell(std::promise<SaveResult>& promise, const Outcome& outcome);
  bool busy_with(uint64_t ticket) const TORPOR_REQUIRES(mutex_);

  Store& store_;
  const Durability durability_;
  const size_t max_bytes_;
  mutable Mutex mutex_;
  CondVar changed_;
  std::deque<Queued> queue_ TORPOR_GUARDED_BY(mutex_);  // the front is being written while writing_ is set
  bool writing_ TORPOR_GUARDED_BY(mutex_) = false;
  bool closing_ TORPOR_GUARDED_BY(mutex_) = false;
  size_t bytes_ TORPOR_GUARDED_BY(mutex_) = 0;  // new_bytes of the queue
  std::vector<Outcome> outcomes_ TORPOR_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace torpor
