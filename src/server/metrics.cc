#include "server/metrics.h"

#include <charconv>

#include "server/keys.h"
#include "torpor/error.h"

namespace torpor::server {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

std::string number(double value) {
  char text[32];
  return std::string(text, std::to_chars(text, text + sizeof text, value).ptr);
}

void head(std::string& out, const std::string& name, const std::string& type, const std::string& help) {
  out += "# HELP " + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
}

void sample(std::string& out, const std::string& name, const std::string& labels, double value) {
  out += name + (labels.empty() ? "" : "{" + labels + "}") + " " + number(value) + "\n";
}

/// Counts what goes by.
class MeteredSink : public AnswerSink {
 public:
  MeteredSink(AnswerSink& sink, Metrics& metrics, TurnLog::Turn& turn)
      : sink_(sink), metrics_(metrics), turn_(turn) {}

  void start(const AnswerStart& start) override {
    metrics_.turn_starts(start.prompt_tokens, start.cached_tokens);
    turn_.starts(start.prompt_tokens, start.cached_tokens);
    sink_.start(start);
  }
  void progress(int done, int total) override {
    turn_.reads(done, total);
    sink_.progress(done, total);
  }
  void thinking(std::string_view delta) override { first(), sink_.thinking(delta); }
  void text(std::string_view delta) override { first(), sink_.text(delta); }
  void logprobs(std::vector<TokenLogprobs> tokens) override { sink_.logprobs(std::move(tokens)); }
  void tool_call(const std::string& name) override { first(), sink_.tool_call(name); }
  void arguments(std::string_view delta) override { sink_.arguments(delta); }
  void finish(const AnswerEnd& end) override {
    static constexpr const char* kReasons[] = {"stop", "stop", "length", "tool_calls", "cancelled"};
    reason = kReasons[static_cast<int>(end.reason)];
    generated = end.generated_tokens;
    agent = end.agent;
    missed = end.why.substr(0, end.why.find(':'));  // what follows quotes the conversation
    sink_.finish(end);
  }

  std::string reason = "error", agent, missed;
  int generated = 0;

 private:
  void first() {
    if (std::exchange(heard_, true)) return;
    metrics_.first_token(since(begin_));
    turn_.answers();
  }

  AnswerSink& sink_;
  Metrics& metrics_;
  TurnLog::Turn& turn_;
  const Clock::time_point begin_ = Clock::now();
  bool heard_ = false;
};

}  // namespace

void Histogram::add(double seconds) {
  size_t i = 0;
  while (i < std::size(kBounds) && seconds > kBounds[i]) ++i;
  ++counts_[i];
  sum_ += seconds;
}

void Histogram::write(std::string& out, const std::string& name, const std::string& labels) const {
  const std::string before = labels.empty() ? "" : labels + ",";
  uint64_t count = 0;
  for (size_t i = 0; i <= std::size(kBounds); ++i) {
    count += counts_[i];
    const std::string bound = i < std::size(kBounds) ? number(kBounds[i]) : "+Inf";
    sample(out, name + "_bucket", before + "le=\"" + bound + "\"", count);
  }
  sample(out, name + "_sum", labels, sum_);
  sample(out, name + "_count", labels, count);
}

void write_sample(std::string& out, const std::string& name, const std::string& type, const std::string& help,
                  double value) {
  head(out, name, type, help);
  sample(out, name, "", value);
}

void Metrics::add_source(Source source) {
  const MutexLock lock(mutex_);
  sources_.push_back(std::move(source));
}

void Metrics::request(const std::string& route, int status, double seconds) {
  const MutexLock lock(mutex_);
  ++requests_[{route, status}];
  seconds_[route].add(seconds);
}

void Metrics::turn_starts(int prompt_tokens, int cached_tokens) {
  const MutexLock lock(mutex_);
  prompt_tokens_ += prompt_tokens;
  cached_tokens_ += cached_tokens;
}

void Metrics::first_token(double seconds) {
  const MutexLock lock(mutex_);
  first_token_.add(seconds);
}

void Metrics::turn_ends(const std::string& reason, int generated_tokens) {
  const MutexLock lock(mutex_);
  --running_;
  ++turns_[reason];
  generated_tokens_ += generated_tokens;
}

std::string Metrics::text() const {
  std::string out;
  std::vector<Source> sources;
  {
    const MutexLock lock(mutex_);
    sources = sources_;
    head(out, "torpor_requests_total", "counter", "Requests that were answered.");
    for (const auto& [key, count] : requests_) {
      sample(out, "torpor_requests_total", "route=\"" + key.first + "\",status=\"" + std::to_string(key.second) + "\"",
             count);
    }
    head(out, "torpor_request_seconds", "histogram", "From a request's last byte to the end of its answer.");
    for (const auto& [route, seconds] : seconds_)
      seconds.write(out, "torpor_request_seconds", "route=\"" + route + "\"");
    write_sample(out, "torpor_turns_running", "gauge", "Turns that run or wait.", running_);
    head(out, "torpor_turns_total", "counter", "Turns that have ended, by why.");
    for (const auto& [reason, count] : turns_) sample(out, "torpor_turns_total", "reason=\"" + reason + "\"", count);
    write_sample(out, "torpor_prompt_tokens_total", "counter", "Tokens of prompts, cached ones included.",
                 prompt_tokens_);
    write_sample(out, "torpor_prompt_tokens_cached_total", "counter", "Tokens of prompts that were not computed.",
                 cached_tokens_);
    write_sample(out, "torpor_generation_tokens_total", "counter", "Tokens that were generated.", generated_tokens_);
    head(out, "torpor_time_to_first_token_seconds", "histogram", "From a turn's admission to its first piece of text.");
    first_token_.write(out, "torpor_time_to_first_token_seconds", "");
    if (vllm_names_) {
      write_sample(out, "vllm:num_requests_running", "gauge", "As torpor_turns_running.", running_);
      write_sample(out, "vllm:prompt_tokens_total", "counter", "As torpor_prompt_tokens_total.", prompt_tokens_);
      write_sample(out, "vllm:prefix_cache_queries_total", "counter", "As torpor_prompt_tokens_total.", prompt_tokens_);
      write_sample(out, "vllm:prefix_cache_hits_total", "counter", "As torpor_prompt_tokens_cached_total.",
                   cached_tokens_);
      write_sample(out, "vllm:generation_tokens_total", "counter", "As torpor_generation_tokens_total.",
                   generated_tokens_);
      head(out, "vllm:time_to_first_token_seconds", "histogram", "As torpor_time_to_first_token_seconds.");
      first_token_.write(out, "vllm:time_to_first_token_seconds", "");
    }
  }
  for (const Source& source : sources) source(out);
  return out;
}

void MeteredRunner::run(const ChatRequest& request, AnswerSink& sink, const std::atomic<bool>& gone) {
  const std::string tenant = request.tenant.empty() ? kLocalTenant : request.tenant;
  metrics_.turn_begins();
  TurnLog::Turn turn(metrics_.turns(), tenant, request.agent);
  MeteredSink metered(sink, metrics_, turn);
  const auto end = [&](const std::string& reason) {
    metrics_.turn_ends(reason, metered.generated);
    turn.end(reason, metered.generated, metered.missed, agent_name_of(tenant, metered.agent).value_or(""));
  };
  try {
    runner_.run(request, metered, gone);
  } catch (...) {
    end(gone ? "cancelled" : metered.reason);
    throw;
  }
  end(metered.reason);
}

}  // namespace torpor::server
