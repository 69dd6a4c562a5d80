#pragma once
/// A running server of Torpor's, as the commands ask it: HTTP/1.1 without TLS, a connection for each request.

#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "cli/output.h"

namespace CLI {
class App;
}

namespace torpor::cli {

/// How a command finds the server and signs in.
struct ServerOptions {
  std::string server = "http://127.0.0.1:8080";
  std::filesystem::path api_key_file;  ///< empty: the default one
};

/// Adds --server and --api-key-file.
void add_server_options(CLI::App& app, ServerOptions& options);

/// A server's address: "http://HOST[:PORT]", or the same with an IPv6 address in brackets.
struct ServerAddress {
  std::string url, host, port = "80";

  /// kInvalidArgument for what is no address.
  explicit ServerAddress(std::string given);
  std::string authority() const;
};

/// One thread at a time.
class ServerClient {
 public:
  /// The key is TORPOR_API_KEY's, else the one that the server's first start left beside the key file.
  explicit ServerClient(const ServerOptions& options);

  const std::string& url() const { return address_.url; }
  /// The key that requests carry; "none" without one, since clients want some.
  std::string key() const { return key_.empty() ? "none" : key_; }
  /// As a shell reads the key, which is not to be shown.
  std::string key_for_shell() const;
  /// How long the server may be silent, streams aside; 30 s at first.
  void set_timeout(std::chrono::seconds timeout) { timeout_ = timeout; }

  /// The answer's object; null where it has no body. What the server refuses is thrown as it would throw it itself: the same
  /// code, sentence, agent and field. kNotFound also where no server answers, kIo where something else does.
  Json get(const std::string& path) const { return ask("GET", path, nullptr); }
  Json post(const std::string& path, const Json& body) const { return ask("POST", path, body); }

  using OnEvent = std::function<void(const std::string& event, const Json& data)>;
  /// Posts, and hands over each event of the answer until the server ends it. True `cancel` closes the connection, which the
  /// server takes for a client that has gone: kCancelled.
  void stream(const std::string& path, const Json& body, const std::atomic<bool>& cancel, const OnEvent& on_event) const;

 private:
  std::string head(std::string_view method, const std::string& path, const std::string& body) const;
  Json ask(std::string_view method, const std::string& path, const Json& body) const;
  [[noreturn]] void refuse(int status, const std::string& body) const;

  ServerAddress address_;
  std::filesystem::path key_file_;
  std::string key_;
  bool key_given_ = false;  ///< by TORPOR_API_KEY
  std::chrono::seconds timeout_{30};
};

/// The error that the server told as {"error": {"code", "message", ...}}; nullopt when `body` is no such thing.
std::optional<Error> server_error(const Json& body);

}  // namespace torpor::cli
