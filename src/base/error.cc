#include "torpor/error.h"

namespace torpor {

const ErrorMapping& error_mapping(ErrorCode code) noexcept {
  static constexpr ErrorMapping kTable[] = {
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
  for (const ErrorMapping& row : kTable) {
    if (row.code == code) return row;
  }
  return kTable[sizeof(kTable) / sizeof(kTable[0]) - 1];
}

}  // namespace torpor
