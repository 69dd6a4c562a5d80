#include "torpor/error.h"

#include <utility>

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

}  // namespace torpor
