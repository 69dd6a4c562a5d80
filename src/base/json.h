#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace torpor {

/// JSON's parser and writer, compiled once. nlohmann's are templates: each file that calls `parse` or `dump` would hold
/// copies of its own, and take twice as long to compile, more with sanitizers.
/// `J` is nlohmann::json or nlohmann::ordered_json. The arguments mean what they mean to J::parse: `look` may leave
/// out what it is shown; without `throws`, what is no JSON is a discarded value; `comments` are skipped where allowed.
/// Throws J::parse_error, and what `look` throws.
template <class J>
J parse_json(std::string_view text, typename J::parser_callback_t look = nullptr, bool throws = true,
             bool comments = false);

/// `value` as JSON; on one line when `indent` is -1. Throws J::type_error when a string is no UTF-8, unless `utf8` says
/// otherwise.
template <class J>
std::string dump_json(const J& value, int indent = -1, typename J::error_handler_t utf8 = J::error_handler_t::strict);

extern template nlohmann::json parse_json(std::string_view, nlohmann::json::parser_callback_t, bool, bool);
extern template nlohmann::ordered_json parse_json(std::string_view, nlohmann::ordered_json::parser_callback_t, bool,
                                                  bool);
extern template std::string dump_json(const nlohmann::json&, int, nlohmann::json::error_handler_t);
extern template std::string dump_json(const nlohmann::ordered_json&, int, nlohmann::ordered_json::error_handler_t);

}  // namespace torpor
