#pragma once
/// Which servers work on a store: each keeps a note in ROOT/.locks, locked while it lives (docs/format.md, "Files").

#include <filesystem>
#include <map>
#include <string>

#include "base/held_note.h"
#include "torpor/error.h"

namespace torpor::cli {

/// A server's own note, from its construction to its destruction. A process has one at most.
class ServerNote {
 public:
  /// `root` is a directory. `url` is where the server answers, `api_key_file` an absolute path. Removes notes of servers that
  /// were killed. kIo.
  ServerNote(const std::filesystem::path& root, const std::string& url, const std::filesystem::path& api_key_file);

 private:
  HeldNote note_;
};

/// The agents that are awake in running servers of this store, each with its server's URL. A server that doesn't answer within
/// two seconds, or takes no key of this user's, is left out.
std::map<std::string, std::string> agents_in_servers(const std::filesystem::path& root);

/// `error`; one that says that an agent is awake elsewhere names the server that has it, and how to talk with it there.
Error with_server(const Error& error, const std::filesystem::path& root);

}  // namespace torpor::cli
