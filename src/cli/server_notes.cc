#include "cli/server_notes.h"

#include <unistd.h>

#include <span>

#include "cli/server_client.h"
#include "torpor/error.h"

namespace torpor::cli {
namespace {

constexpr std::string_view kPrefix = ".server-";  // no agent's lock begins so
constexpr uint64_t kLongest = 16'384;

std::vector<std::filesystem::path> notes_of(const std::filesystem::path& root) {
  std::vector<std::filesystem::path> notes;
  for (const std::string& name : Env::posix().list_own(root / ".locks")) {
    if (name.starts_with(kPrefix)) notes.push_back(root / ".locks" / name);
  }
  return notes;
}

FileLock make_note(const std::filesystem::path& root) {
  Env& env = Env::posix();
  if (const auto locks = root / ".locks"; !env.is_own_directory(locks)) env.make_directory(locks);
  for (const auto& note : notes_of(root)) {
    if (const auto left = env.lock(note, LockMode::kExclusive, {})) env.remove(note);
  }
  const std::filesystem::path path = root / ".locks" / (std::string(kPrefix) + std::to_string(getpid()) + ".lock");
  auto lock = env.lock(path, LockMode::kExclusive, {});
  if (!lock) throw Error(ErrorCode::kBusy, "another process has the note '" + path.string() + "'");
  return std::move(*lock);
}

}  // namespace

ServerNote::ServerNote(const std::filesystem::path& root, const std::string& url,
                       const std::filesystem::path& api_key_file)
    : lock_(make_note(root)) {
  const std::string text = dump_json(Json{{"url", url}, {"api_key_file", api_key_file.string()}});
  lock_.file().write_all({std::as_bytes(std::span(text))});
}

ServerNote::~ServerNote() {
  try {
    Env::posix().remove(lock_.path());
  } catch (const std::exception&) {
    // The next server finds it.
  }
}

std::map<std::string, std::string> agents_in_servers(const std::filesystem::path& root) {
  std::map<std::string, std::string> agents;
  Env& env = Env::posix();
  for (const auto& note : notes_of(root)) {
    try {
      if (env.lock(note, LockMode::kShared, {}, OpenMode::kRead)) continue;  // its server was killed
      const Json written = parse_json<Json>(env.read_file(note, kLongest), nullptr, false);
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
