/// ps: what a running server does.

#include <netdb.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <optional>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/output.h"
#include "cli/serve_options.h"
#include "server/keys.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

constexpr int kTimeoutSeconds = 30;

struct PsOptions {
  std::string server = "http://127.0.0.1:8080";
  std::filesystem::path api_key_file;
  bool json = false;
};

/// A server's address: "http://HOST[:PORT]", or the same with an IPv6 address in brackets.
struct Address {
  std::string url, host, port = "80";

  explicit Address(std::string given) : url(std::move(given)) {
    while (url.ends_with('/')) url.pop_back();
    std::string rest = url;
    if (rest.starts_with("http://")) rest.erase(0, 7);
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
  std::string authority() const { return (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + port; }
};

/// A connected socket, which closes with this.
class Connection {
 public:
  explicit Connection(const Address& address) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    if (getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &found) == 0) {
      const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, freeaddrinfo);
      for (const addrinfo* at = found; at != nullptr && fd_ < 0; at = at->ai_next) {
        fd_ = socket(at->ai_family, at->ai_socktype, at->ai_protocol);
        const timeval limit{kTimeoutSeconds, 0};
        setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
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

  /// What comes back until the server closes; empty after an error.
  std::string ask(std::string_view request) const {
    while (!request.empty()) {
      const ssize_t sent = send(fd_, request.data(), request.size(), MSG_NOSIGNAL);
      if (sent <= 0) return {};
      request.remove_prefix(size_t(sent));
    }
    std::string answer;
    char piece[16384];
    ssize_t got = 0;
    while ((got = recv(fd_, piece, sizeof piece, 0)) > 0) answer.append(piece, size_t(got));
    return got == 0 ? answer : std::string();
  }

 private:
  int fd_ = -1;
};

/// The JSON of one of the server's own routes. They are answered whole, so the body is all that follows the head.
Json get_json(const Address& address, const std::string& path, const std::string& key,
              const std::filesystem::path& key_file) {
  std::string request = "GET " + path + " HTTP/1.1\r\nhost: " + address.authority() + "\r\nconnection: close\r\n";
  if (!key.empty()) request += "authorization: Bearer " + key + "\r\n";
  const std::string answer = Connection(address).ask(request + "\r\n");
  const size_t body = answer.find("\r\n\r\n");
  const std::string status = answer.starts_with("HTTP/1.1 ") ? answer.substr(9, 3) : "";
  if (status == "401") {
    throw Error(ErrorCode::kInvalidArgument, "the server at " + address.url + " takes no key of " +
                                                 server::local_key_file(key_file).string() +
                                                 "; name its own file by --api-key-file")
        .with_field("api-key-file");
  }
  const Json parsed = body == std::string::npos ? Json() : Json::parse(answer.substr(body + 4), nullptr, false);
  if (status != "200" || !parsed.is_object())
    throw Error(ErrorCode::kIo, "what answers at " + address.url + " is no server of Torpor's" +
                                    (status.empty() ? "" : " (status " + status + ")"));
  return parsed;
}

int ps(const PsOptions& options) {
  const Address address(options.server);
  const std::filesystem::path key_file = options.api_key_file.empty() ? default_key_file() : options.api_key_file;
  const std::string key = server::local_key(key_file);
  Json now = get_json(address, "/torpor/v1/now", key, key_file);
  if (options.json) {
    Json printed{{"server", address.url}};
    printed.update(now);
    print_json(printed);
    return 0;
  }
  int waiting = 0;
  std::vector<std::vector<std::string>> rows{{"AGENT", "STATE", "PROMPT", "CACHED", "READ", "FOR"}};
  const int64_t clock = std::chrono::duration_cast<std::chrono::milliseconds>(
                            std::chrono::system_clock::now().time_since_epoch())
                            .count();
  for (const Json& turn : now.at("turns")) {
    const std::string state = turn.at("state"), agent = turn.at("agent");
    if (state == "waiting") ++waiting;
    rows.push_back({agent.empty() ? "-" : agent, state == "waiting" ? "waiting, " + std::to_string(waiting) : state,
                    std::to_string(turn.at("prompt_tokens").get<int64_t>()),
                    std::to_string(turn.at("cached_tokens").get<int64_t>()),
                    std::to_string(turn.at("done").get<int64_t>()) + "/" +
                        std::to_string(turn.at("total").get<int64_t>()),
                    human_ms(double(clock - turn.at("begun_at_ms").get<int64_t>()))});
  }
  const std::string model = now.at("model").at("name");
  std::string text = address.url + ": " + model + ", " + std::to_string(rows.size() - 1 - size_t(waiting)) +
                     " turns run, " + std::to_string(waiting) + " wait";
  if (const auto others = now.at("others").get<int64_t>(); others > 0) text += ", " + std::to_string(others) + " of others";
  print(text + "\n");
  if (rows.size() > 1) print(table(rows, {false, false, true, true, true, true}));
  return 0;
}

}  // namespace

void add_ps_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<PsOptions>();
  CLI::App* command = app.add_subcommand("ps", "Tell what a running server does: its model, turns and queue");
  command->add_option("--server", options->server, "The server's address")->capture_default_str()->type_name("URL");
  command
      ->add_option("--api-key-file", options->api_key_file,
                   "The server's key file, beside which the first key stands (default: ~/.config/torpor/api-keys)")
      ->type_name("FILE");
  command->add_flag("--json", options->json, "Print a JSON object");
  command->callback([&invocation, options] { invocation.run = [options] { return ps(*options); }; });
}

}  // namespace torpor::cli
