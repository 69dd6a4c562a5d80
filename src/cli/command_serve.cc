/// serve.

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <iterator>
#include <set>

#include <CLI/CLI.hpp>

#include "base/mutex.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "cli/serve_options.h"
#include "cli/server_notes.h"
#include "faces/error_table.h"
#include "server/http_edge.h"
#include "server/server.h"
#include "torpor/engine.h"
#include "torpor/error.h"
#include "torpor/log.h"

namespace torpor::cli {
namespace {

bool is_loopback(const std::string& host) {
  return host.empty() || host == "localhost" || host == "::1" || host.starts_with("127.");
}

/// Lines to a file that is opened anew on request, as logrotate wants it; standard error without one.
class LogFile {
 public:
  explicit LogFile(std::filesystem::path path) { open_at(std::move(path)); }
  ~LogFile() { close_now(); }
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;

  /// Opens the file, anew where it is open already. Empty: standard error.
  void open_at(std::filesystem::path path) {
    int fd = -1;
    if (!path.empty() && (fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0) {
      throw Error(ErrorCode::kIo,
                  "can't write the log '" + path.string() + "': " + std::generic_category().message(errno));
    }
    const MutexLock lock(mutex_);
    close_now();
    fd_ = fd;
  }
  void line(std::string text) {
    text += '\n';
    const MutexLock lock(mutex_);
    // One write a line, so that two never mix. A log that can't be written stops no answer.
    [[maybe_unused]] const ssize_t written = write(fd_ >= 0 ? fd_ : STDERR_FILENO, text.data(), text.size());
  }

 private:
  void close_now() TORPOR_REQUIRES(mutex_) {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

  Mutex mutex_;
  int fd_ TORPOR_GUARDED_BY(mutex_) = -1;
};

/// Signals that end or reload the server are taken by whoever waits for them, in threads made later too.
class SignalSet {
 public:
  SignalSet() {
    sigemptyset(&set_);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&set_, signal);
    pthread_sigmask(SIG_BLOCK, &set_, &before_);
    std::signal(SIGPIPE, SIG_IGN);
  }
  ~SignalSet() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalSet(const SignalSet&) = delete;
  SignalSet& operator=(const SignalSet&) = delete;

  int wait() const {
    int signal = 0;
    while (sigwait(&set_, &signal) != 0) {
    }
    return signal;
  }
  /// A second SIGINT or SIGTERM ends the process at once.
  void let_end() const {
    sigset_t ending;
    sigemptyset(&ending);
    for (const int signal : {SIGINT, SIGTERM}) sigaddset(&ending, signal);
    pthread_sigmask(SIG_UNBLOCK, &ending, nullptr);
  }

 private:
  sigset_t set_{}, before_{};
};

server::ModelPoolOptions pool_options(const ServeOptions& options, const std::filesystem::path& root) {
  server::ModelPoolOptions pool;
  for (const std::string& model : options.models) pool.models.push_back({server::served_name(model), model});
  for (const std::string& alias : options.aliases) pool.aliases.push_back(server::parse_alias(alias));
  // A worker that has lost its lease ends, and whoever watches over it starts another.
  pool.engine = options.engine(root, [] { kill(getpid(), SIGTERM); });
  pool.engine.max_stall_ms = options.max_stall;
  pool.share_prefixes = options.share_prefixes;
  return pool;
}

server::HttpEdgeOptions edge_options(const ServeOptions& options) {
  server::HttpEdgeOptions edge;
  edge.host = options.host;
  edge.port = static_cast<uint16_t>(options.port);
  edge.socket = options.socket;
  edge.max_body_bytes = options.max_body == 0 ? size_t(1) << 40 : options.max_body;
  edge.max_bodies_bytes = std::max(edge.max_bodies_bytes, 2 * edge.max_body_bytes);
  edge.max_connections = options.max_connections;
  edge.max_workers = options.queue + 64;  // those that compute nothing are answered beside a full queue
  edge.idle_timeout = std::chrono::milliseconds(int64_t(options.idle_timeout * 1000));
  return edge;
}

std::string url_of(const ServeOptions& options, uint16_t port) {
  const std::string host = options.host.find(':') == std::string::npos ? options.host : "[" + options.host + "]";
  return "http://" + host + ":" + std::to_string(port);
}

/// What a user needs to go on, on standard output.
void greet(const ServeOptions& options, uint16_t port, const std::string& first_key,
           const std::filesystem::path& key_file) {
  std::string text, served;
  for (const std::string& model : options.models) served += (served.empty() ? "" : ", ") + model;
  if (!options.host.empty()) {
    const std::string url = url_of(options, port);
    const std::string key = options.no_auth ? "none" : "$(cat '" + server::local_key_file(key_file).string() + "')";
    text += "Torpor serves " + served + " at " + url + "\n";
    text += "  export OPENAI_BASE_URL=" + url + "/v1 OPENAI_API_KEY=" + key + "\n";
    text += "  export ANTHROPIC_BASE_URL=" + url + " ANTHROPIC_AUTH_TOKEN=" + key + "\n";
    // The key stands behind '#', which browsers send nowhere.
    const std::string own = options.no_auth ? std::string() : server::local_key(key_file);
    const std::string bearer = options.no_auth ? std::string() : " -H \"authorization: Bearer " + key + "\"";
    text += "  curl -s " + url + "/v1/chat/completions" + bearer + " -d '" +
            dump_json(Json{{"model", server::served_name(options.model)},
                           {"max_tokens", 40},
                           {"messages", Json::array({Json{{"role", "user"}, {"content", "Who keeps the lamp?"}}})}}) +
            "'\n";
    text += "Dashboard, signed in: " + url + "/" + (own.empty() ? "" : "#key=" + own) + "\n";
  }
  if (!options.socket.empty())
    text += "Torpor serves " + served + " at the UNIX socket " + options.socket.string() + "\n";
  if (!first_key.empty())
    text += "A first key was made; it stands in " + server::local_key_file(key_file).string() + "\n";
  print(text);
  std::fflush(stdout);
}

/// Absolute: what is printed holds in other directories, too.
std::filesystem::path key_file_of(const ServeOptions& options) {
  return std::filesystem::absolute(options.api_key_file.empty() ? server::default_key_file() : options.api_key_file);
}

/// What a running server takes of its options: all that with_config can change and nothing was built of.
constexpr const char* kChangeable[] = {"api-key-file", "allow-host", "log", "drain-timeout", "idle-unload", "session-ttl"};

void take_up(const ServeOptions& options, LogFile& log_file, server::Server& server) {
  // What can fail comes first.
  std::optional<server::ApiKeys> keys;
  if (!options.no_auth) keys = server::ApiKeys::read(key_file_of(options));
  log_file.open_at(options.log);
  if (keys) server.service().set_keys(std::move(*keys));
  server.service().set_hosts(options.allow_hosts);
  server.models().set_times(std::chrono::milliseconds(int64_t(options.idle_unload * 1000)),
                            std::chrono::seconds(int64_t(std::ceil(options.session_ttl))));
}

/// Options that have changed and can't be taken up, by their names.
std::string left_for_a_restart(const ServeOptions& before, const ServeOptions& now) {
  std::set<std::string> names;
  for (const auto* said : {&before.said, &now.said}) {
    for (const auto& [name, values] : *said) names.insert(name);
  }
  std::string left;
  for (const std::string& name : names) {
    const auto values = [&](const ServeOptions& options) {
      const auto found = options.said.find(name);
      return found == options.said.end() ? std::vector<std::string>() : found->second;
    };
    if (std::find(std::begin(kChangeable), std::end(kChangeable), name) != std::end(kChangeable)) continue;
    if (values(before) != values(now)) left += (left.empty() ? "" : ", ") + name;
  }
  return left;
}

int serve(const CLI::App& given, std::filesystem::path config, const std::filesystem::path& root) {
  ServeOptions options = with_config(given, config);
  if (options.models.empty())
    throw Error(ErrorCode::kInvalidArgument, "no model is named; say which one to serve").with_field("model");
  if (options.no_auth && !is_loopback(options.host)) {
    throw Error(ErrorCode::kInvalidArgument,
                "a server without keys listens on loopback addresses only, and '" + options.host + "' is none");
  }
  const std::filesystem::path key_file = key_file_of(options);
  std::string first_key;
  if (!options.no_auth && !std::filesystem::exists(key_file)) first_key = server::make_key_file(key_file);
  if (!options.no_auth) server::ApiKeys::read(key_file);  // a mistake in there is told before a model is loaded

  const SignalSet signals;
  LogFile log_file(options.log);
  set_log_handler([&](LogLevel level, std::string_view sentence) {
    log_file.line(dump_json(Json{{"level", log_level_name(level)}, {"message", sentence}}, -1,
                            Json::error_handler_t::replace));
  });
  struct NoLog {
    ~NoLog() { set_log_handler(nullptr); }
  } no_log;

  server::ServerOptions parts{.pool = pool_options(options, root), .queue = options.queue};
  const std::shared_ptr<RemoteTier> remote = parts.pool.engine.remote;
  parts.vllm_names = options.metrics_alias == "vllm";
  parts.service.authenticate = !options.no_auth;
  parts.service.log = [&](const std::string& line) { log_file.line(line); };
  server::Server server(std::move(parts));
  take_up(options, log_file, server);
  std::optional<server::HttpEdge> edge(std::in_place, edge_options(options), server);
  server.metrics().add_source([&](std::string& out) {
    server::write_sample(out, "torpor_connections", "gauge", "Connections that are open.", edge->connections());
  });
  std::optional<ServerNote> note;
  try {
    if (!options.host.empty()) note.emplace(root, url_of(options, edge->port()), key_file);
  } catch (const Error& error) {
    log(LogLevel::kWarning, std::string("other processes won't hear of this server: ") + error.what());
  }
  greet(options, edge->port(), first_key, key_file);

  int signal = 0;
  while ((signal = signals.wait()) == SIGHUP) {
    try {
      ServeOptions changed = with_config(given, config);
      changed.no_auth = options.no_auth;
      take_up(changed, log_file, server);
      const std::string left = left_for_a_restart(options, changed);
      options.drain_timeout = changed.drain_timeout;
      log(LogLevel::kInfo, "keys, log and configuration were read anew");
      if (!left.empty()) log(LogLevel::kWarning, "what has changed of these options needs a restart: " + left);
    } catch (const Error& error) {
      log(LogLevel::kWarning, std::string("what was there before stays: ") + error.what());
    }
  }
  signals.let_end();
  server.service().drain();
  // What a server without a lease computes is committed by nobody: its clients ask elsewhere, the sooner the better.
  const bool is_lost = remote && !remote->alive();
  if (!edge->drain(std::chrono::milliseconds(is_lost ? 0 : int64_t(options.drain_timeout * 1000)))) {
    log(LogLevel::kWarning, "turns that did not end in time were taken back");
  }
  edge.reset();
  server.models().save_all();
  if (!remote || remote->alive()) return 0;
  log(LogLevel::kWarning, "the server has lost its lease in the bucket, and others may have its agents");
  return faces::error_mapping(ErrorCode::kBusy).exit_code;
}

}  // namespace

void add_serve_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<ServeOptions>();
  CLI::App* serve_app =
      app.add_subcommand("serve", "Serve agents over HTTP, to clients of OpenAI's and Anthropic's APIs");
  add_serve_options(*serve_app, *options);
  serve_app->callback([&invocation, options, serve_app] {
    invocation.run = [&invocation, options, serve_app] { return serve(*serve_app, options->config, invocation.store); };
  });
}

}  // namespace torpor::cli
