#include "cli/output.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>

#include "torpor/error.h"

namespace torpor::cli {

void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw Error(ErrorCode::kIo, std::string("can't write to standard output: ") + std::strerror(errno));
  }
}

void print_json(const Json& value) {
  print(value.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
}

void complain(std::string_view message) {
  const char* end = message.empty() || message.back() != '.' ? "." : "";
  std::fprintf(stderr, "torpor: %.*s%s\n", int(message.size()), message.data(), end);
}

std::string human_bytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  double value = double(bytes);
  size_t unit = 0;
  while (value >= 1000 && unit + 1 < std::size(kUnits)) {
    value /= 1000;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text;
}

std::string human_age(const std::string& rfc3339) {
  std::tm tm{};
  if (std::sscanf(rfc3339.c_str(), "%d-%d-%dT%d:%d:%d", &tm.tm_year, &tm.tm_mon, &tm.tm_mday, &tm.tm_hour, &tm.tm_min,
                  &tm.tm_sec) != 6) {
    return "?";
  }
  tm.tm_year -= 1900;
  tm.tm_mon -= 1;
  const std::time_t then = timegm(&tm);
  const long long seconds = std::max<long long>(0, std::time(nullptr) - then);
  if (seconds < 120) return std::to_string(seconds) + " s";
  if (seconds < 120 * 60) return std::to_string(seconds / 60) + " min";
  if (seconds < 48 * 3600) return std::to_string(seconds / 3600) + " h";
  return std::to_string(seconds / 86400) + " d";
}

std::string human_ms(double ms) {
  char text[32];
  if (ms < 1000) {
    std::snprintf(text, sizeof text, ms < 10 ? "%.1f ms" : "%.0f ms", ms);
  } else {
    std::snprintf(text, sizeof text, "%.2f s", ms / 1000);
  }
  return text;
}

size_t find_invalid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    size_t length = 1;
    uint32_t low = 0, code = lead;
    if (lead >= 0x80) {
      if (lead >= 0xC2 && lead <= 0xDF) {
        length = 2, code = lead & 0x1F, low = 0x80;
      } else if (lead >= 0xE0 && lead <= 0xEF) {
        length = 3, code = lead & 0x0F, low = 0x800;
      } else if (lead >= 0xF0 && lead <= 0xF4) {
        length = 4, code = lead & 0x07, low = 0x10000;
      } else {
        return i;
      }
      if (text.size() - i < length) return i;
      for (size_t k = 1; k < length; ++k) {
        const auto next = static_cast<unsigned char>(text[i + k]);
        if ((next & 0xC0) != 0x80) return i;
        code = code << 6 | (next & 0x3F);
      }
      if (code < low || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF)) return i;
    }
    i += length;
  }
  return std::string_view::npos;
}

std::unique_ptr<Store> open_existing_store(const std::filesystem::path& root) {
  std::error_code error;
  const auto status = std::filesystem::status(root, error);
  if (status.type() == std::filesystem::file_type::not_found) return nullptr;
  if (status.type() != std::filesystem::file_type::directory) {
    throw Error(ErrorCode::kIo, "can't use '" + root.string() + "' as a store: " +
                                    (error ? error.message() : std::string("it is not a directory")));
  }
  return std::make_unique<Store>(root);
}

std::unique_ptr<Store> open_store_of(const std::filesystem::path& root, const std::string& agent_id) {
  check_agent_id(agent_id);
  auto store = open_existing_store(root);
  if (!store) {
    throw Error(ErrorCode::kNotFound,
                "no agent '" + agent_id + "': there is no store at '" + root.string() + "'");
  }
  return store;
}

}  // namespace torpor::cli
