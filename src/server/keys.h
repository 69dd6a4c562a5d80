#pragma once
/// API keys and tenants.
///
/// A key file has one key a line, `tenant:name:hash`: hash is the SHA-256 of the key, 64 hexadecimal digits. Empty
/// lines and lines that begin with '#' are skipped. Keys of one tenant see the same agents, so a key can be replaced
/// without losing any.

#include <array>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torpor::server {

/// The tenant that the command line and an open server (--no-auth) work for.
inline constexpr const char* kLocalTenant = "local";

/// The store's id of a tenant's agent. Of kLocalTenant it is the name itself. Throws Failure::kInvalid for names that
/// no agent of the tenant can have.
std::string agent_id_of(const std::string& tenant, const std::string& name);
/// The name by which a tenant knows the agent of that id; nullopt when it is another tenant's.
std::optional<std::string> agent_name_of(const std::string& tenant, const std::string& id);
/// What keeps rows of the tenant's agents from others' (TurnRequest::salt).
std::string salt_of(const std::string& tenant);

/// Whose a key is. Agents belong to the tenant, a share of the engine to the key.
struct KeyOwner {
  std::string tenant, name;
};

/// Immutable after `read`; any thread.
class ApiKeys {
 public:
  /// No key at all: nobody is let in.
  ApiKeys() = default;
  /// kIo when the file can't be read; kInvalidArgument names a line that is no key, or a file without any.
  static ApiKeys read(const std::filesystem::path& file);
  /// Whose key it is. Takes the same time for every wrong key.
  std::optional<KeyOwner> owner_of(std::string_view key) const;
  /// How many there are.
  size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    KeyOwner owner;
    std::array<uint8_t, 32> hash;
  };
  std::vector<Entry> entries_;
};

/// `$XDG_CONFIG_HOME/torpor/api-keys`, else below `~/.config`.
std::filesystem::path default_key_file();
/// Where `make_key_file` leaves the key itself: beside the key file.
std::filesystem::path local_key_file(const std::filesystem::path& key_file);
/// The key in there; empty when there is none that can be read.
std::string local_key(const std::filesystem::path& key_file);
/// Makes a key of kLocalTenant: its hash into `key_file`, which must not exist, and the key into local_key_file; both
/// 0600, in a directory of 0700 if there is none. Returns the key. kIo.
std::string make_key_file(const std::filesystem::path& key_file);

}  // namespace torpor::server
