#pragma once
/// The one exception type of the library and its closed set of codes.
///
/// Expected outcomes (a miss, a shorter prefix) are return values; everything else that goes wrong is an Error.
/// The library never prints, exits or aborts. Each room translates foreign exceptions at its wall.

#include <stdexcept>
#include <string>
#include <string_view>

namespace torpor {

enum class ErrorCode {
  kNotFound,           ///< no such agent, model or file
  kCorruption,         ///< bytes on disk are not what was written
  kIncompatible,       ///< intact, but of another model, dtype or format version; the message names the field
  kInvalidArgument,    ///< the caller asked for something that can't be
  kIo,                 ///< the operating system refused: full, read-only, EIO
  kBusy,               ///< the agent is awake in another process (or turn)
  kResourceExhausted,  ///< a budget or limit would be exceeded
  kCancelled,          ///< stopped on request
  kInternal,           ///< a defect of Torpor's own
};

/// One sentence for the user: what failed, on what, and what to do. Immutable, safe to copy across threads.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

/// What each face of Torpor says for a code: the one table.
struct ErrorMapping {
  ErrorCode code;
  const char* name;         ///< "kBusy"
  int exit_code;            ///< of the command line; 0 is success, 1 is left to crashes, 2 to usage errors
  int http_status;
  const char* python_name;  ///< exception class in the Python module
};

/// The row of `code`. Never fails.
const ErrorMapping& error_mapping(ErrorCode code) noexcept;

}  // namespace torpor
