#include "torpor/error.h"

#include <cerrno>
#include <new>
#include <system_error>
#include <utility>

#include "base/foreign_error.h"

namespace torpor {

const Error::Data& Error::data() const noexcept {
  static const Data none;
  return data_ ? *data_ : none;
}

Error::Data& Error::own() {
  auto copy = std::make_shared<Data>(data());  // whoever holds a copy of this error keeps what it has read
  Data& own = *copy;
  data_ = std::move(copy);
  return own;
}

Error& Error::with_agent(std::string id) {
  own().agent = std::move(id);
  return *this;
}

Error& Error::with_path(std::string path) {
  own().path = std::move(path);
  return *this;
}

Error& Error::with_field(std::string field, std::string expected, std::string found) {
  Data& data = own();
  data.field = std::move(field);
  data.expected = std::move(expected);
  data.found = std::move(found);
  return *this;
}

Error to_error(const std::exception_ptr& exception, const std::string& what) {
  try {
    std::rethrow_exception(exception);
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::kResourceExhausted, what + " failed: out of memory; free some and try again.");
  } catch (const std::system_error& error) {
    // What threads, locks and streams throw: the system's own refusal.
    const int code = error.code().value();
    if (code == EAGAIN) {
      return Error(ErrorCode::kResourceExhausted,
                   what +
                       " failed: the system refuses another thread; raise its limit or end some "
                       "processes.");
    }
    const bool exhausted = code == ENOMEM || code == EMFILE || code == ENFILE;
    return Error(exhausted ? ErrorCode::kResourceExhausted : ErrorCode::kIo, what + " failed: " + error.what() + ".");
  } catch (const std::exception& error) {
    return Error(ErrorCode::kInternal, what + " failed: " + error.what());
  } catch (...) {
    return Error(ErrorCode::kInternal, what + " failed with an exception of no known type.");
  }
}

}  // namespace torpor
