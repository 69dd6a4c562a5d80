#pragma once
/// Small things that commands print with.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace torpor::cli {

/// Keeps keys in the order they were written.
using Json = nlohmann::ordered_json;

/// `text` with what a terminal would obey or be misled by written as in JSON: control characters other than tabs and ends of
/// lines, and those that turn the direction of writing. Bytes that are no UTF-8 become \xNN. Whatever comes from a file goes
/// through this.
std::string printable(std::string_view text);
/// The same for a name, which is one line: ends of lines too.
std::string printable_name(std::string_view name);

/// Whether what goes to `fd` may have colours and other styles: it is a terminal, TERM is neither empty nor "dumb", and NO_COLOR
/// is empty.
bool may_style(int fd);

/// Prints `value` as one line on standard output. kIo when it can't be written.
void print_json(const Json& value);
/// Prints text on standard output, made printable. kIo when it can't be written.
void print(std::string_view text);
/// "torpor: <message>." on standard error.
void complain(std::string_view message);
/// The same of an error's sentence, with a hint at the option or command that helps, where there is one.
void complain(const Error& error);

/// Columns padded to their widest cell; the first row is the heading. Those marked `right` (numbers) are aligned there. Cells
/// are made printable names.
std::string table(const std::vector<std::vector<std::string>>& rows, const std::vector<bool>& right);

/// "512 B", "1.4 MB".
std::string human_bytes(int64_t bytes);
/// How long ago an RFC 3339 UTC time was; nullopt when it can't be read.
std::optional<int64_t> age_in_seconds(const std::string& rfc3339);
/// The same as "12 s", "3 h", "5 d", or "?".
std::string human_age(const std::string& rfc3339);
/// "0.25 s", "840 ms".
std::string human_ms(double ms);

/// Opens the store if its directory is there; null otherwise, and nothing is made.
std::unique_ptr<Store> open_existing_store(const std::filesystem::path& root);
/// The same for commands that name an agent: the id is checked, and a missing store is kNotFound.
std::unique_ptr<Store> open_store_of(const std::filesystem::path& root, const std::string& agent_id);

}  // namespace torpor::cli
