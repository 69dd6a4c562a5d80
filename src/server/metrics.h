#pragma once
/// What the server counts, in Prometheus' text format, and what it knows of single turns. No label holds an agent's id, a key or text of a request.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "base/mutex.h"
#include "server/chat.h"
#include "server/turn_log.h"

namespace torpor::server {

/// Seconds, in buckets.
class Histogram {
 public:
  void add(double seconds);
  void write(std::string& out, const std::string& name, const std::string& labels) const;

 private:
  static constexpr double kBounds[] = {0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300};
  uint64_t counts_[std::size(kBounds) + 1] = {};
  double sum_ = 0;
};

/// Any thread.
class Metrics {
 public:
  /// Writes further samples, whenever someone asks for the text.
  using Source = std::function<void(std::string& out)>;

  /// `vllm`: the names under which vLLM's dashboards look, too.
  explicit Metrics(bool vllm_names = false) : vllm_names_(vllm_names) {}
  bool vllm_names() const { return vllm_names_; }
  void add_source(Source source);

  /// `route` is one of a closed set.
  void request(const std::string& route, int status, double seconds);
  void turn_begins() { ++running_; }
  void turn_starts(int prompt_tokens, int cached_tokens);
  void first_token(double seconds);
  /// `reason`: "stop", "length", "tool_calls", "cancelled", "error".
  void turn_ends(const std::string& reason, int generated_tokens);
  int running() const { return running_; }
  /// The turns themselves; who counts a turn here tells it there too.
  TurnLog& turns() { return turn_log_; }

  std::string text() const;

 private:
  const bool vllm_names_;
  TurnLog turn_log_;
  std::atomic<int> running_{0};
  mutable Mutex mutex_;
  std::vector<Source> sources_ TORPOR_GUARDED_BY(mutex_);
  std::map<std::pair<std::string, int>, uint64_t> requests_ TORPOR_GUARDED_BY(mutex_);
  std::map<std::string, Histogram> seconds_ TORPOR_GUARDED_BY(mutex_);
  std::map<std::string, uint64_t> turns_ TORPOR_GUARDED_BY(mutex_);
  Histogram first_token_ TORPOR_GUARDED_BY(mutex_);
  uint64_t prompt_tokens_ TORPOR_GUARDED_BY(mutex_) = 0;
  uint64_t cached_tokens_ TORPOR_GUARDED_BY(mutex_) = 0;
  uint64_t generated_tokens_ TORPOR_GUARDED_BY(mutex_) = 0;
};

/// One sample with its help and type lines.
void write_sample(std::string& out, const std::string& name, const std::string& type, const std::string& help,
                  double value);

/// A runner whose turns are counted.
class MeteredRunner : public TurnRunner {
 public:
  /// Both must live longer.
  MeteredRunner(TurnRunner& runner, Metrics& metrics) : runner_(runner), metrics_(metrics) {}
  void run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) override;
  int count_tokens(const ChatRequest& request) override { return runner_.count_tokens(request); }
  std::vector<ModelEntry> models() override { return runner_.models(); }

 private:
  TurnRunner& runner_;
  Metrics& metrics_;
};

}  // namespace torpor::server
