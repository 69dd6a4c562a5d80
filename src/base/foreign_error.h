#pragma once
/// Exceptions of others, made Torpor's own at a room's wall.

#include <exception>
#include <string>

#include "torpor/error.h"

namespace torpor {

/// An Error as it is. Else "`what` failed: ...": kResourceExhausted where memory, threads or file descriptors have run
/// out, kIo for what else the system refused, kInternal for the rest.
Error to_error(const std::exception_ptr& exception, const std::string& what);

}  // namespace torpor
