#include "server/http_edge.h"

#include <unistd.h>

#include <algorithm>
#include <deque>
#include <list>
#include <map>
#include <thread>

#include "base/mutex.h"
#include "torpor/error.h"
#include "torpor/log.h"
#include "torpor_http_shim.h"

namespace torpor::server {
namespace {

constexpr std::string_view kTooMany =
    R"({"error":{"message":"too many requests are being answered; try again","type":"overloaded_error"}})";
constexpr std::string_view kDefect =
    R"({"error":{"message":"the server failed to answer; its log says more","type":"internal_error"}})";

std::string_view text(torpor_http_view view) {
  return view.data ? std::string_view(view.data, view.size) : std::string_view();
}
torpor_http_view view(std::string_view text) { return {text.data(), text.size()}; }

struct ShimError {
  torpor_text_bytes bytes{};
  ~ShimError() { torpor_text_bytes_free(bytes); }
  std::string str() const { return bytes.data ? std::string(bytes.data, bytes.size) : std::string(); }
};

HttpRequest copied(const torpor_http_request& from) {
  HttpRequest request;
  request.method = text(from.method);
  request.path = text(from.path);
  request.query = text(from.query);
  request.peer = text(from.peer);
  request.body = text(from.body);
  request.refused = from.refused;
  request.headers.reserve(from.headers_size);
  for (size_t i = 0; i < from.headers_size; ++i) {
    request.headers.emplace_back(text(from.headers[i].name), text(from.headers[i].value));
  }
  return request;
}

class EdgeResponse : public HttpResponse {
 public:
  explicit EdgeResponse(torpor_http_exchange* exchange) : exchange_(exchange) {}
  ~EdgeResponse() override { torpor_http_exchange_free(exchange_); }

  void whole(int status, HttpHeaders headers, std::string body) override {
    expect(state_ == State::kNothing);
    const auto list = views(headers);
    ShimError error;
    said(torpor_http_respond(exchange_, status, list.data(), list.size(), body.data(), body.size(), &error.bytes),
         error);
    state_ = State::kEnded;
  }
  void begin(int status, HttpHeaders headers) override {
    expect(state_ == State::kNothing);
    headers.emplace_back("x-accel-buffering", "no");
    headers.emplace_back("cache-control", "no-cache");
    const auto list = views(headers);
    ShimError error;
    said(torpor_http_begin(exchange_, status, list.data(), list.size(), &error.bytes), error);
    state_ = State::kStream;
  }
  bool write(std::string_view bytes) override {
    expect(state_ == State::kStream);
    return torpor_http_write(exchange_, bytes.data(), bytes.size());
  }
  void keep_alive(std::string bytes, std::chrono::milliseconds idle) override {
    expect(state_ == State::kStream);
    torpor_http_keep_alive(exchange_, bytes.data(), bytes.size(), std::max<int64_t>(idle.count(), 1));
  }
  void end() override {
    expect(state_ == State::kStream);
    torpor_http_end(exchange_);
    state_ = State::kEnded;
  }
  const std::atomic<bool>& gone() const override { return gone_; }

  bool nothing_said() const { return state_ == State::kNothing; }
  void set_gone() { gone_ = true; }

 private:
  enum class State { kNothing, kStream, kEnded };

  static void expect(bool in_order) {
    if (!in_order) throw Error(ErrorCode::kInternal, "an HTTP answer was given out of order");
  }
  static void said(torpor_text_status status, const ShimError& error) {
    if (status != TORPOR_TEXT_OK) throw Error(ErrorCode::kInternal, "can't send an HTTP answer: " + error.str());
  }
  static std::vector<torpor_http_header> views(const HttpHeaders& headers) {
    std::vector<torpor_http_header> list;
    for (const auto& [name, value] : headers) list.push_back({view(name), view(value)});
    return list;
  }

  torpor_http_exchange* exchange_;
  State state_ = State::kNothing;
  std::atomic<bool> gone_{false};
};

struct Job {
  uint64_t id;
  HttpRequest request;
  std::unique_ptr<EdgeResponse> response;
};

}  // namespace

struct HttpEdge::Impl {
  Impl(HttpHandler& handler, size_t max_workers) : handler(handler), max_workers(std::max<size_t>(max_workers, 1)) {}

  // On the server's thread.
  void take(const torpor_http_request& from, torpor_http_exchange* exchange);
  void gone(uint64_t id) {
    const MutexLock lock(mutex);
    if (const auto found = responses.find(id); found != responses.end()) found->second->set_gone();
  }

  void work();
  void answer(Job& job) noexcept;

  HttpHandler& handler;
  const size_t max_workers;
  const pid_t pid = getpid();
  torpor_http_server* server = nullptr;

  Mutex mutex;
  CondVar wanted;
  std::deque<Job> jobs TORPOR_GUARDED_BY(mutex);                         // at most as many as workers wait for one
  std::map<uint64_t, EdgeResponse*> responses TORPOR_GUARDED_BY(mutex);  // of jobs that are not done
  std::list<std::thread> workers TORPOR_GUARDED_BY(mutex);
  size_t waiting TORPOR_GUARDED_BY(mutex) = 0;
  bool stopping TORPOR_GUARDED_BY(mutex) = false;
};

void HttpEdge::Impl::take(const torpor_http_request& from, torpor_http_exchange* exchange) {
  auto response = std::make_unique<EdgeResponse>(exchange);
  try {
    Job job{from.id, copied(from), std::move(response)};
    MutexLock lock(mutex);
    if (waiting <= jobs.size()) {
      if (workers.size() >= max_workers) {
        lock.unlock();
        job.response->whole(503, {{"content-type", "application/json"}, {"retry-after", "1"}}, std::string(kTooMany));
        return;
      }
      workers.emplace_back([this] { work(); });
      ++waiting;
    }
    responses.emplace(job.id, job.response.get());
    jobs.push_back(std::move(job));
    wanted.notify_one();
  } catch (const std::exception& e) {  // no thread, no memory: the connection is cut
    log(LogLevel::kWarning, std::string("an HTTP request could not be taken: ") + e.what());
  }
}

void HttpEdge::Impl::work() {
  MutexLock lock(mutex);
  while (true) {
    while (!stopping && jobs.empty()) wanted.wait(lock);
    if (jobs.empty()) return;
    Job job = std::move(jobs.front());
    jobs.pop_front();
    --waiting;
    lock.unlock();
    answer(job);
    lock.lock();
    responses.erase(job.id);
    lock.unlock();
    job = {};  // frees body and exchange
    lock.lock();
    ++waiting;
  }
}

void HttpEdge::Impl::answer(Job& job) noexcept {
  EdgeResponse& response = *job.response;
  try {
    if (response.gone()) return;
    try {
      handler.handle(job.request, response);
    } catch (const std::exception& e) {
      log(LogLevel::kWarning, job.request.method + " " + job.request.path + " failed: " + e.what());
    }
    if (response.nothing_said()) response.whole(500, {{"content-type", "application/json"}}, std::string(kDefect));
  } catch (...) {  // the connection is cut
  }
}

HttpEdge::HttpEdge(HttpEdgeOptions options, HttpHandler& handler)
    : impl_(std::make_unique<Impl>(handler, options.max_workers)) {
  torpor_http_config config{};
  const std::string socket = options.socket.string();
  config.host = view(options.host);
  config.port = options.port;
  config.socket = view(socket);
  config.max_body_bytes = options.max_body_bytes;
  config.max_bodies_bytes = options.max_bodies_bytes;
  config.max_head_bytes = options.max_head_bytes;
  config.max_connections = options.max_connections;
  config.head_timeout_ms = options.head_timeout.count();
  config.body_timeout_ms = options.body_timeout.count();
  config.idle_timeout_ms = options.idle_timeout.count();
  config.stream_buffer_bytes = options.stream_buffer_bytes;
  config.stall_timeout_ms = options.stall_timeout.count();
  torpor_http_callbacks callbacks{};
  callbacks.context = impl_.get();
  callbacks.request = [](void* context, const torpor_http_request* request, torpor_http_exchange* exchange) {
    static_cast<Impl*>(context)->take(*request, exchange);
  };
  callbacks.gone = [](void* context, uint64_t id) { static_cast<Impl*>(context)->gone(id); };
  ShimError error;
  const auto status = torpor_http_start(&config, &callbacks, &impl_->server, &error.bytes);
  if (status != TORPOR_TEXT_OK) {
    throw Error(status == TORPOR_TEXT_INVALID ? ErrorCode::kInvalidArgument : ErrorCode::kInternal, error.str());
  }
}

HttpEdge::~HttpEdge() {
  if (getpid() != impl_->pid) {
    impl_.release();  // the threads stayed with the parent
    return;
  }
  torpor_http_stop(impl_->server);
  {
    const MutexLock lock(impl_->mutex);
    impl_->stopping = true;
  }
  impl_->wanted.notify_all();
  for (auto& worker : impl_->workers) worker.join();
}

uint16_t HttpEdge::port() const { return torpor_http_port(impl_->server); }
size_t HttpEdge::connections() const { return torpor_http_connections(impl_->server); }

bool HttpEdge::drain(std::chrono::milliseconds timeout) {
  torpor_http_drain(impl_->server);
  return torpor_http_wait(impl_->server, std::max<int64_t>(timeout.count(), 0));
}

}  // namespace torpor::server
