#pragma once
/// What each face of Torpor says for an error code: the one table of exit codes, HTTP statuses and Python classes.

#include <iterator>

#include "torpor/error.h"
#include "torpor/model_info.h"
#include "torpor/store.h"

namespace torpor::faces {

struct ErrorMapping {
  ErrorCode code;
  const char* name;         ///< "kBusy"
  int exit_code;            ///< of the command line; 0 is success, 1 is left to crashes, 2 to usage errors
  int http_status;
  const char* python_name;  ///< class in torpor.errors
};

inline constexpr ErrorMapping kErrorTable[] = {
    {ErrorCode::kNotFound, "kNotFound", 3, 404, "NotFoundError"},
    {ErrorCode::kCorruption, "kCorruption", 4, 500, "CorruptionError"},
    {ErrorCode::kIncompatible, "kIncompatible", 5, 409, "IncompatibleError"},
    {ErrorCode::kInvalidArgument, "kInvalidArgument", 6, 400, "InvalidArgumentError"},
    {ErrorCode::kIo, "kIo", 7, 500, "IoError"},
    {ErrorCode::kBusy, "kBusy", 8, 423, "BusyError"},
    {ErrorCode::kResourceExhausted, "kResourceExhausted", 9, 507, "ResourceExhaustedError"},
    {ErrorCode::kCancelled, "kCancelled", 10, 499, "CancelledError"},
    {ErrorCode::kInternal, "kInternal", 11, 500, "InternalError"},
};

/// The row of `code`; an unknown one is kInternal's.
constexpr const ErrorMapping& error_mapping(ErrorCode code) noexcept {
  for (const ErrorMapping& row : kErrorTable) {
    if (row.code == code) return row;
  }
  return kErrorTable[std::size(kErrorTable) - 1];
}

/// The HTTP status of `error`: its code's, but for mistakes of the client's that share a code with others.
inline int http_status(const Error& error) noexcept {
  if (error.field() == kAgentTaken || error.field() == kTeamTaken) return 409;
  if (error.field() == kContextFull) return 400;
  return error_mapping(error.code()).http_status;
}

}  // namespace torpor::faces
