#include "cli/server_client.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <memory>
#include <utility>

#include <CLI/CLI.hpp>

#include "base/environment.h"
#include "cli/serve_options.h"
#include "faces/error_table.h"
#include "server/keys.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

using std::chrono::milliseconds;

/// A connected socket, which closes with this.
class Connection {
 public:
  explicit Connection(const ServerAddress& address) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    if (getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &found) == 0) {
      const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, freeaddrinfo);
      for (const addrinfo* at = found; at != nullptr && fd_ < 0; at = at->ai_next) {
        fd_ = socket(at->ai_family, at->ai_socktype, at->ai_protocol);
        if (fd_ >= 0 && connect(fd_, at->ai_addr, at->ai_addrlen) != 0) {
          close(fd_);
          fd_ = -1;
        }
      }
    }
    if (fd_ < 0) {
      throw Error(ErrorCode::kNotFound,
                  "no server answers at " + address.url + "; start one with `torpor serve`, or name it by --server");
    }
  }
  ~Connection() { close(fd_); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  void send_all(std::string_view text) const {
    while (!text.empty()) {
      const ssize_t sent = send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
      if (sent < 0 && errno == EINTR) continue;
      if (sent <= 0) return;  // the server may have answered all the same
      text.remove_prefix(size_t(sent));
    }
  }

  /// What has come, at least a byte; empty at the end, after `timeout` (negative: none), or once `cancel` is true.
  std::string receive(milliseconds timeout, const std::atomic<bool>* cancel) const {
    // A signal sets `cancel` and ends the wait; one that comes just before it is seen at the next look.
    constexpr milliseconds kLook{200};
    milliseconds waited{0};
    while (cancel == nullptr || !*cancel) {
      pollfd ready{fd_, POLLIN, 0};
      const int found = poll(&ready, 1, int(kLook.count()));
      if (found > 0) {
        char piece[16384];
        const ssize_t got = recv(fd_, piece, sizeof piece, 0);
        if (got < 0 && errno == EINTR) continue;
        return std::string(piece, size_t(std::max<ssize_t>(got, 0)));
      }
      if (found == 0 && timeout >= milliseconds(0) && (waited += kLook) >= timeout) break;
    }
    return {};
  }

 private:
  int fd_ = -1;
};

/// An answer as it arrives: head, then a body that is either sent in chunks or ends with the connection.
class Answer {
 public:
  Answer(const Connection& connection, milliseconds timeout, const std::atomic<bool>* cancel)
      : connection_(connection), timeout_(timeout), cancel_(cancel) {
    size_t end = 0;
    while ((end = raw_.find("\r\n\r\n")) == std::string::npos) {
      if (!more()) return;
    }
    std::string head = raw_.substr(0, end + 2);
    raw_.erase(0, end + 4);
    if (!head.starts_with("HTTP/1.1 ") || head.size() < 12) return;
    std::from_chars(head.data() + 9, head.data() + 12, status_);
    for (char& c : head) c = char(std::tolower(static_cast<unsigned char>(c)));
    chunked_ = head.find("\r\ntransfer-encoding: chunked\r\n") != std::string::npos;
  }

  /// 0: what answered is no server of HTTP.
  int status() const { return status_; }

  /// The next piece of the body; empty at its end.
  std::string piece() {
    if (!chunked_) {
      if (raw_.empty()) more();
      return std::exchange(raw_, {});
    }
    size_t line = 0;
    while ((line = raw_.find("\r\n")) == std::string::npos) {
      if (!more()) return {};
    }
    size_t size = 0;
    std::from_chars(raw_.data(), raw_.data() + line, size, 16);
    if (size == 0) return {};
    while (raw_.size() < line + 2 + size + 2) {
      if (!more()) return {};
    }
    std::string piece = raw_.substr(line + 2, size);
    raw_.erase(0, line + 2 + size + 2);
    return piece;
  }

  std::string rest() {
    std::string text;
    for (std::string next; !(next = piece()).empty();) text += next;
    return text;
  }

 private:
  bool more() {
    const std::string got = connection_.receive(timeout_, cancel_);
    raw_ += got;
    return !got.empty();
  }

  const Connection& connection_;
  const milliseconds timeout_;
  const std::atomic<bool>* cancel_;
  std::string raw_;
  int status_ = 0;
  bool chunked_ = false;
};

}  // namespace

void add_server_options(CLI::App& app, ServerOptions& options) {
  app.add_option("--server", options.server, "The server's address")->capture_default_str()->type_name("URL");
  app.add_option("--api-key-file", options.api_key_file,
                 "The server's key file, beside which the first key stands (default: ~/.config/torpor/api-keys); "
                 "TORPOR_API_KEY is a key itself")
      ->type_name("FILE");
}

ServerAddress::ServerAddress(std::string given) : url(std::move(given)) {
  while (url.ends_with('/')) url.pop_back();
  std::string rest = url;
  if (rest.starts_with("http://")) {
    rest.erase(0, 7);
  } else if (rest.find("://") == std::string::npos) {
    url = "http://" + url;
  }
  const size_t colon = rest.rfind(':');
  if (colon != std::string::npos && rest.find(']', colon) == std::string::npos) {
    port = rest.substr(colon + 1);
    rest.erase(colon);
  }
  host = rest.starts_with('[') && rest.ends_with(']') ? rest.substr(1, rest.size() - 2) : rest;
  if (host.empty() || port.empty() || host.find_first_of("/@?# ") != std::string::npos ||
      port.find_first_not_of("0123456789") != std::string::npos) {
    throw Error(ErrorCode::kInvalidArgument, "'" + url + "' is no address of a server; write http://HOST:PORT")
        .with_field("server");
  }
}

std::string ServerAddress::authority() const {
  return (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + port;
}

ServerClient::ServerClient(const ServerOptions& options)
    : address_(options.server),
      key_file_(options.api_key_file.empty() ? server::default_key_file() : options.api_key_file),
      key_(environment("TORPOR_API_KEY")),
      key_given_(!key_.empty()) {
  if (!key_given_) key_ = server::local_key(key_file_);
}

std::string ServerClient::key_for_shell() const {
  if (key_.empty()) return "none";
  return key_given_ ? "\"$TORPOR_API_KEY\""
                    : "\"$(cat '" + std::filesystem::absolute(server::local_key_file(key_file_)).string() + "')\"";
}

std::string ServerClient::head(std::string_view method, const std::string& path, const std::string& body) const {
  std::string request = std::string(method) + " " + path + " HTTP/1.1\r\nhost: " + address_.authority() +
                        "\r\nconnection: close\r\n";
  if (!key_.empty()) request += "authorization: Bearer " + key_ + "\r\n";
  if (!body.empty()) request += "content-type: application/json\r\n";
  if (!body.empty() || method == "POST") request += "content-length: " + std::to_string(body.size()) + "\r\n";
  return request + "\r\n";
}

void ServerClient::refuse(int status, const std::string& body) const {
  if (status == 401) {
    const std::string from = key_given_ ? "TORPOR_API_KEY" : server::local_key_file(key_file_).string();
    throw Error(ErrorCode::kInvalidArgument, "the server at " + address_.url + " takes no key of " + from +
                                                 "; name its own file by --api-key-file")
        .with_field("api-key-file");
  }
  if (const auto told = server_error(parse_json<Json>(body, nullptr, false))) throw *told;
  throw Error(ErrorCode::kIo, "what answers at " + address_.url + " is no server of Torpor's" +
                                  (status == 0 ? "" : " (status " + std::to_string(status) + ")"));
}

Json ServerClient::ask(std::string_view method, const std::string& path, const Json& body) const {
  const std::string text = body.is_null() ? "" : dump_json(body);
  const Connection connection(address_);
  connection.send_all(head(method, path, text) + text);
  Answer answer(connection, timeout_, nullptr);
  const std::string said = answer.rest();
  if (answer.status() == 204) return nullptr;
  const Json parsed = parse_json<Json>(said, nullptr, false);
  if (answer.status() < 200 || answer.status() > 299 || !parsed.is_object()) refuse(answer.status(), said);
  return parsed;
}

void ServerClient::stream(const std::string& path, const Json& body, const std::atomic<bool>& cancel,
                          const OnEvent& on_event) const {
  const std::string text = dump_json(body);
  const Connection connection(address_);
  connection.send_all(head("POST", path, text) + text);
  Answer answer(connection, milliseconds(-1), &cancel);
  const auto check = [&] {
    if (cancel) throw Error(ErrorCode::kCancelled, "the answer was stopped, and the turn taken back");
  };
  check();
  if (answer.status() != 200) refuse(answer.status(), answer.rest());
  std::string pending;
  for (std::string piece; !(piece = answer.piece()).empty();) {
    pending += piece;
    for (size_t end = 0; (end = pending.find("\n\n")) != std::string::npos; pending.erase(0, end + 2)) {
      std::string event, data;
      for (size_t at = 0; at < end;) {
        const size_t line_end = std::min(pending.find('\n', at), end);
        const std::string_view line = std::string_view(pending).substr(at, line_end - at);
        if (line.starts_with("event: ")) event = line.substr(7);
        if (line.starts_with("data: ")) data += line.substr(6);
        at = line_end + 1;
      }
      if (!event.empty()) on_event(event, parse_json<Json>(data, nullptr, false));  // else a comment, which keeps alive
    }
  }
  check();
}

std::optional<Error> server_error(const Json& body) {
  if (!body.is_object() || !body.contains("error") || !body["error"].is_object()) return std::nullopt;
  const Json& told = body["error"];
  const auto text = [&told](const char* name) {
    const auto found = told.find(name);
    return found != told.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  if (text("message").empty()) return std::nullopt;
  // What is not the agents' routes', as a full queue, has a code of OpenAI's or none.
  ErrorCode code = ErrorCode::kIo;
  for (const faces::ErrorMapping& row : faces::kErrorTable) {
    if (text("code") == row.name) code = row.code;
  }
  Error error(code, text("message"));
  if (!text("agent").empty()) error.with_agent(text("agent"));
  if (!text("field").empty()) error.with_field(text("field"), text("expected"), text("found"));
  return error;
}

}  // namespace torpor::cli
