#pragma once
/// What the library did about something that is no error of the caller's: a sidecar that could not be written, a
/// prefetch that failed. The library prints nothing; without a handler such sentences are dropped.

#include <functional>
#include <string_view>

namespace torpor {

enum class LogLevel {
  kDebug,    ///< for whoever follows what is done
  kInfo,     ///< worth knowing, and nothing is amiss
  kWarning,  ///< something did not work; Torpor goes on without it
};
/// "debug", "info", "warning".
const char* log_level_name(LogLevel level) noexcept;

/// Gets one sentence for people. It is called on whichever thread has something to say, by several at a time. What it
/// throws is dropped, and so is what the library would say to it while it runs on the same thread.
using LogHandler = std::function<void(LogLevel level, std::string_view sentence)>;

/// Of the whole process; nullptr: none, as at the start. Any thread. When it returns, the handler before it is not
/// running and will not be called again. kInvalidArgument from within a handler.
void set_log_handler(LogHandler handler);

/// Whether someone listens, for whoever would have to make a sentence first.
bool log_wanted() noexcept;
/// Says `sentence` to the handler.
void log(LogLevel level, std::string_view sentence) noexcept;

}  // namespace torpor
