#pragma once
/// The one exception type of the library and its closed set of codes.
///
/// Expected outcomes (a miss, a shorter prefix) are return values; everything else that goes wrong is an Error.
/// The library never prints, exits or aborts. Each room translates foreign exceptions at its wall.

#include <memory>
#include <stdexcept>
#include <string>

namespace torpor {

enum class ErrorCode {
  kNotFound,           ///< no such agent, model or file
  kCorruption,         ///< bytes on disk are not what was written
  kIncompatible,       ///< intact, but of another model, dtype or format version; Error::field says which
  kInvalidArgument,    ///< the caller asked for something that can't be
  kIo,                 ///< the operating system refused: full, read-only, EIO
  kBusy,               ///< the agent is awake in another process (or turn)
  kResourceExhausted,  ///< a budget or limit would be exceeded
  kCancelled,          ///< stopped on request
  kInternal,           ///< a defect of Torpor's own
};

/// One sentence for the user: what failed, on what, and what to do. It names no command and no option of a face.
///
/// The same as data, for programs: each part is empty where it does not apply.
///
///     throw Error(ErrorCode::kIncompatible, sentence).with_agent("ada").with_field("kv", "f16", "f32");
///
/// Copies share their data; copying never throws. An Error that was thrown is not changed any more, so its copies may
/// be read by any thread.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

  ErrorCode code() const noexcept { return code_; }
  /// Id of the agent that could not be worked on.
  const std::string& agent() const noexcept { return data().agent; }
  /// File or directory, as it was opened.
  const std::string& path() const noexcept { return data().path; }
  /// What is wrong: a field of the identity or of a file, or a member of an options struct ("TurnRequest::system").
  const std::string& field() const noexcept { return data().field; }
  /// What `field` would have to be, and what it is.
  const std::string& expected() const noexcept { return data().expected; }
  const std::string& found() const noexcept { return data().found; }

  // Each changes this error and returns it.
  Error& with_agent(std::string id);
  Error& with_path(std::string path);
  Error& with_field(std::string field, std::string expected = {}, std::string found = {});

 private:
  struct Data {
    std::string agent, path, field, expected, found;
  };
  const Data& data() const noexcept;
  Data& own();

  ErrorCode code_;
  std::shared_ptr<const Data> data_;  // null: all empty
};

}  // namespace torpor
