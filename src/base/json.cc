#include "base/json.h"

namespace torpor {

template <class J>
J parse_json(std::string_view text, typename J::parser_callback_t look, bool throws, bool comments) {
  return J::parse(text, std::move(look), throws, comments);
}

template <class J>
std::string dump_json(const J& value, int indent, typename J::error_handler_t utf8) {
  return value.dump(indent, ' ', false, utf8);
}

template nlohmann::json parse_json(std::string_view, nlohmann::json::parser_callback_t, bool, bool);
template nlohmann::ordered_json parse_json(std::string_view, nlohmann::ordered_json::parser_callback_t, bool, bool);
template std::string dump_json(const nlohmann::json&, int, nlohmann::json::error_handler_t);
template std::string dump_json(const nlohmann::ordered_json&, int, nlohmann::ordered_json::error_handler_t);

}  // namespace torpor
