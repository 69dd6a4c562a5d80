// The server behind torpor.asgi. Requests come in as bytes; what is said to them goes to methods of a Python object.

#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "server/server.h"
#include "shared_engine.h"

namespace nb = nanobind;

namespace torpor::python {
namespace {

std::string text_of(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }
nb::bytes bytes_of(std::string_view text) { return nb::bytes(text.data(), text.size()); }

nb::list pairs_of(const server::HttpHeaders& headers) {
  nb::list pairs;
  for (const auto& [name, value] : headers) pairs.append(nb::make_tuple(bytes_of(name), bytes_of(value)));
  return pairs;
}

/// A request, and whether its client has gone.
struct Exchange {
  server::HttpRequest request;
  std::atomic<bool> gone{false};
};

/// An answer that a Python object hears (torpor/asgi.py, _Answer). The handler's thread holds no GIL.
class PythonResponse final : public server::HttpResponse {
 public:
  PythonResponse(nb::handle answer, const std::atomic<bool>& gone) : answer_(answer), gone_(gone) {}

  void whole(int status, server::HttpHeaders headers, std::string body) override {
    const nb::gil_scoped_acquire acquire;
    answer_.attr("whole")(status, pairs_of(headers), bytes_of(body));
  }
  void begin(int status, server::HttpHeaders headers) override {
    const nb::gil_scoped_acquire acquire;
    answer_.attr("begin")(status, pairs_of(headers));
  }
  bool write(std::string_view bytes) override {
    const nb::gil_scoped_acquire acquire;
    return nb::cast<bool>(answer_.attr("write")(bytes_of(bytes)));
  }
  void keep_alive(std::string bytes, std::chrono::milliseconds idle) override {
    const nb::gil_scoped_acquire acquire;
    answer_.attr("keep_alive")(bytes_of(bytes), double(idle.count()) / 1000);
  }
  void end() override {
    const nb::gil_scoped_acquire acquire;
    answer_.attr("end")();
  }
  const std::atomic<bool>& gone() const override { return gone_; }

 private:
  const nb::handle answer_;
  const std::atomic<bool>& gone_;
};

/// A server that can be closed, though a request under way keeps it until it is answered.
class SharedServer {
 public:
  explicit SharedServer(server::ServerOptions options)
      : remote_(options.pool.engine.remote), server_(std::make_shared<server::Server>(std::move(options))) {}
  ~SharedServer() {
    const nb::gil_scoped_release release;
    server_.reset();
    remote_.reset();
  }

  /// One that has lost its lease in the bucket takes no turn any more.
  std::shared_ptr<server::Server> get() const {
    if (server_ == nullptr)
      throw Error(ErrorCode::kInvalidArgument, "The application is closed; make another one.");
    if (remote_ && !remote_->alive()) server_->service().drain();
    return server_;
  }
  void close() {
    auto remote = std::move(remote_);
    auto server = std::move(server_);
    if (server == nullptr) return;
    const nb::gil_scoped_release release;
    std::exception_ptr failed;
    try {
      server->models().save_all();
    } catch (...) {
      failed = std::current_exception();
    }
    server.reset();
    remote.reset();
    if (failed) std::rethrow_exception(failed);
  }

 private:
  std::shared_ptr<RemoteTier> remote_;  // outlives the server
  std::shared_ptr<server::Server> server_;
};

using NamedModels = std::vector<std::pair<std::string, std::string>>;  // name, source

void make_server(SharedServer* self, const std::vector<std::string>& models, const SharedEngine* engine,
                 const EngineSettings* settings, const NamedModels& aliases, bool share_prefixes, int queue,
                 std::optional<std::filesystem::path> key_file, std::vector<std::string> hosts, double idle_unload,
                 double session_ttl) {
  server::ServerOptions options{.queue = queue};
  for (const std::string& model : models) options.pool.models.push_back({server::served_name(model), model, nullptr});
  if (engine != nullptr) {
    const std::string& source = engine->get()->model().name;
    options.pool.models.push_back({server::served_name(source), source, engine->get()});
    options.pool.engine.remote = engine->remote();
  }
  for (const auto& [pattern, name] : aliases) options.pool.aliases.push_back({pattern, name});
  options.pool.share_prefixes = share_prefixes;
  options.service.authenticate = key_file.has_value();
  const nb::gil_scoped_release release;
  std::optional<server::ApiKeys> keys;  // a mistake in there is told before a model is loaded
  if (key_file) {
    if (!std::filesystem::exists(*key_file)) server::make_key_file(*key_file);
    keys = server::ApiKeys::read(*key_file);
  }
  if (settings != nullptr) options.pool.engine = settings->attached();
  new (self) SharedServer(std::move(options));
  const auto server = self->get();
  if (keys) server->service().set_keys(std::move(*keys));
  server->service().set_hosts(std::move(hosts));
  server->models().set_times(std::chrono::milliseconds(int64_t(idle_unload * 1000)),
                             std::chrono::seconds(int64_t(std::ceil(session_ttl))));
}

void make_exchange(Exchange* self, const std::string& method, const nb::bytes& path, const nb::bytes& query,
                   const std::vector<std::pair<nb::bytes, nb::bytes>>& headers, const nb::bytes& body,
                   const std::string& peer, int refused) {
  new (self) Exchange;
  server::HttpRequest& request = self->request;
  request.method = method;
  request.path = text_of(path);
  request.query = text_of(query);
  for (const auto& [name, value] : headers) request.headers.emplace_back(text_of(name), text_of(value));
  request.body = text_of(body);
  request.peer = peer;
  request.refused = refused;
}

}  // namespace

void bind_server(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Exchange>(module, "Exchange")
      .def("__init__", &make_exchange, "method"_a, "path"_a, "query"_a, "headers"_a, "body"_a, "peer"_a, "refused"_a)
      .def("leave", [](Exchange& exchange) { exchange.gone = true; });
  nb::class_<SharedServer>(module, "CoreServer")
      .def("__init__", &make_server, "models"_a, "engine"_a.none(), "settings"_a.none(), "aliases"_a,
           "share_prefixes"_a, "queue"_a, "key_file"_a.none(), "hosts"_a, "idle_unload"_a, "session_ttl"_a,
           nb::sig("def __init__(self, models: Sequence[str], engine: CoreEngine | None, "
                   "settings: EngineOptions | None, aliases: Sequence[tuple[str, str]], share_prefixes: bool, "
                   "queue: int, key_file: str | os.PathLike[str] | None, hosts: Sequence[str], idle_unload: float, "
                   "session_ttl: float) -> None"))
      .def(
          "handle",
          [](const SharedServer& shared, Exchange& exchange, nb::handle answer) {
            auto kept = shared.get();
            PythonResponse response(answer, exchange.gone);
            const nb::gil_scoped_release release;
            const auto server = std::move(kept);  // whose end, if this is the last to have it, comes before the GIL
            server->handle(exchange.request, response);
          },
          "exchange"_a, "answer"_a)
      .def(
          "read_keys",
          [](const SharedServer& shared, const std::filesystem::path& key_file) {
            shared.get()->service().set_keys(server::ApiKeys::read(key_file));
          },
          "key_file"_a, nb::sig("def read_keys(self, key_file: str | os.PathLike[str]) -> None"))
      .def("drain", [](const SharedServer& shared) { shared.get()->service().drain(); })
      .def("close", &SharedServer::close);
  module.def("default_key_file", &server::default_key_file);
  module.def("local_key", &server::local_key, "key_file"_a, nb::call_guard<nb::gil_scoped_release>(),
             nb::sig("def local_key(key_file: str | os.PathLike[str]) -> str"));
}

}  // namespace torpor::python
