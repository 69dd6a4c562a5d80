#pragma once
/// A bucket in simulated time. It answers late, or not at all; it applies what it said it had refused; it is asked
/// twice by a client that retries; what was given up may be applied long after. Everything follows from a seed.

#include <cstdint>
#include <functional>
#include <map>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include "base/hash.h"
#include "remote/operation.h"

namespace torpor::testing {

using remote::Answer;
using remote::Condition;
using remote::Request;

using SimTime = int64_t;  ///< microseconds of true time
inline constexpr SimTime kMillisecond = 1000, kSecond = 1000 * kMillisecond;
inline constexpr SimTime kLatest = 40 * kSecond;  ///< after it was sent, a request may be applied

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  /// 0 to n - 1.
  int64_t pick(int64_t n) { return int64_t(engine_() % uint64_t(n)); }
  bool chance(double p) { return double(engine_() >> 11) * 0x1p-53 < p; }
  SimTime between(SimTime least, SimTime most) { return least + pick(most - least + 1); }

 private:
  std::mt19937_64 engine_;
};

class Events {
 public:
  SimTime now() const { return now_; }
  void after(SimTime time, std::function<void()> action) {
    queue_.push({now_ + time, next_++, std::move(action)});
  }
  bool step() {
    if (queue_.empty()) return false;
    Event event = std::move(const_cast<Event&>(queue_.top()));
    queue_.pop();
    now_ = event.time;
    event.action();
    return true;
  }

 private:
  struct Event {
    SimTime time;
    int64_t order;
    std::function<void()> action;
    bool operator<(const Event& other) const { return std::pair(time, order) > std::pair(other.time, other.order); }
  };
  SimTime now_ = 0;
  int64_t next_ = 0;
  std::priority_queue<Event> queue_;
};

class SimulatedBucket {
 public:
  struct Stored {
    std::string text, tag;
    SimTime modified = 0;
  };

  SimulatedBucket(Events& events, Random& random)
      : events_(events), random_(random), tags_of_bytes_(random.chance(0.5)), trouble_(random.pick(4) * 0.01) {}

  /// Called when a put, or a removal, is applied; before it is.
  std::function<void(const std::string& key, const std::string& text)> on_put;
  std::function<void(const std::string& key)> on_remove;
  /// A client that, told that a head is another one, puts its own all the same.
  bool forces_heads = false;

  const std::map<std::string, Stored>& objects() const { return objects_; }
  void end_trouble() { trouble_ = 0; }

  /// `answered` is called once, later.
  void send(Request request, std::string blob, std::function<void(Answer)> answered) {
    request.text += blob;
    const SimTime there = latency(), back = latency();
    if (random_.chance(trouble_)) {
      Answer lost;
      lost.status = Answer::Status::kLost;
      lost.error = std::make_exception_ptr(remote::LostAnswer("No answer came."));
      // Never applied; applied, and the answer lost; applied long after it was given up.
      const int64_t fate = random_.pick(4);
      const SimTime until = fate == 3 ? random_.between(kSecond, kLatest) : there;
      if (fate > 0) events_.after(until, [this, request] { apply(request); });
      events_.after(there + back + 2 * kSecond, [lost, answered] { answered(lost); });
      return;
    }
    if (request.kind == Request::Kind::kPut && random_.chance(trouble_)) {
      const bool conflicts = request.condition.kind != Condition::Kind::kNone && random_.chance(0.3);
      if (conflicts) {  // 409: another request for this key is under way
        Answer conflict;
        conflict.status = Answer::Status::kPrecondition;
        events_.after(there + back, [conflict, answered] { answered(conflict); });
        return;
      }
      events_.after(there, [this, request] { apply(request); });  // 503 after it was applied: asked again below
    }
    events_.after(2 * there, [this, request, back, answered] {
      Answer answer = apply(request);
      events_.after(back, [answer = std::move(answer), answered] { answered(answer); });
    });
  }

  /// At once.
  Answer apply(const Request& request) {
    Answer answer;
    const auto found = objects_.find(request.key);
    const bool is_there = found != objects_.end();
    switch (request.kind) {
      case Request::Kind::kPut: {
        const auto& condition = request.condition;
        const bool is_absent = condition.kind == Condition::Kind::kAbsent && !is_there;
        const bool is_same = is_there && condition.kind == Condition::Kind::kTag && found->second.tag == condition.tag;
        const bool holds = condition.kind == Condition::Kind::kNone || is_absent || is_same;
        if (!holds && !(forces_heads && request.key.ends_with("/head"))) {
          answer.status = Answer::Status::kPrecondition;
          break;
        }
        if (on_put) on_put(request.key, request.text);
        answer.tag = tags_of_bytes_ ? hash_hex(request.text) : std::to_string(++versions_);
        objects_[request.key] = {request.text, answer.tag, events_.now()};
        break;
      }
      case Request::Kind::kGet:
      case Request::Kind::kRead:
        if (!is_there) {
          answer.status = Answer::Status::kAbsent;
          break;
        }
        answer.tag = found->second.tag;
        answer.text = found->second.text;
        if (request.kind == Request::Kind::kRead) answer.text = answer.text.substr(request.offset, request.bytes);
        break;
      case Request::Kind::kList:
        for (auto object = objects_.lower_bound(request.key);
             object != objects_.end() && object->first.starts_with(request.key); ++object) {
          answer.objects.push_back({object->first, object->second.text.size(), object->second.tag, 0});
        }
        break;
      case Request::Kind::kRemove:
        if (!is_there) break;
        if (on_remove) on_remove(request.key);
        objects_.erase(found);
        break;
      case Request::Kind::kWait: break;
    }
    return answer;
  }

 private:
  SimTime latency() {
    return random_.chance(0.02) ? random_.between(100 * kMillisecond, 2 * kSecond)
                                : random_.between(kMillisecond, 30 * kMillisecond);
  }

  Events& events_;
  Random& random_;
  std::map<std::string, Stored> objects_;
  bool tags_of_bytes_;
  double trouble_;
  int64_t versions_ = 0;
};

}  // namespace torpor::testing
