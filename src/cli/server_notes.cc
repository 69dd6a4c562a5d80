#include "cli/server_notes.h"

#include <unistd.h>

#include "cli/server_client.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

constexpr std::string_view kPrefix = ".server-";  // no agent's lock begins so

/// Where they are, without those of servers that were killed.
std::filesystem::path cleared(const std::filesystem::path& root) {
  clear_notes(root / ".locks", kPrefix, [](const std::string&) { return true; });
  return root / ".locks";
}

}  // namespace

ServerNote::ServerNote(const std::filesystem::path& root, const std::string& url,
                       const std::filesystem::path& api_key_file)
    : note_(cleared(root), std::string(kPrefix) + std::to_string(getpid()),
            dump_json(Json{{"url", url}, {"api_key_file", api_key_file.string()}})) {}

std::map<std::string, std::string> agents_in_servers(const std::filesystem::path& root) {
  std::map<std::string, std::string> agents;
  Env& env = Env::posix();
  for (const auto& note : notes_in(root / ".locks", kPrefix)) {
    try {
      if (env.lock(note, LockMode::kShared, {}, OpenMode::kRead)) continue;  // its server was killed
      const Json written = parse_json<Json>(env.read_file(note, kLongestNote), nullptr, false);
      if (!written.is_object()) continue;
      ServerOptions options;
      options.server = written.at("url");
      options.api_key_file = written.at("api_key_file").get<std::string>();
      ServerClient client(options);
      client.set_timeout(std::chrono::seconds(2));
      const Json told = client.get("/torpor/v1/agents");
      for (const Json& agent : told.at("agents")) {
        if (agent.at("awake").get<bool>()) agents.emplace(agent.at("agent").get<std::string>(), client.url());
      }
    } catch (const std::exception&) {
      // What can't be asked is not known to have any.
    }
  }
  return agents;
}

Error with_server(const Error& error, const std::filesystem::path& root) {
  if (error.code() != ErrorCode::kBusy || error.agent().empty()) return error;
  const auto agents = agents_in_servers(root);
  const auto found = agents.find(error.agent());
  if (found == agents.end()) return error;
  return Error(ErrorCode::kBusy, "The agent '" + error.agent() + "' is awake in the server at " + found->second +
                                     "; talk with it by `torpor chat --server " + found->second + " --agent " +
                                     error.agent() + "`.")
      .with_agent(error.agent());
}

}  // namespace torpor::cli
