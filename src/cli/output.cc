#include "cli/output.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>

#include "base/environment.h"
#include "cli/text_input.h"
#include "torpor/error.h"

namespace torpor::cli {

namespace {

void write_out(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw Error(ErrorCode::kIo, std::string("can't write to standard output: ") + std::strerror(errno));
  }
}

/// What a terminal obeys (C0, DEL, C1), or what makes text read other than it is (bidirectional controls).
bool is_control(char32_t code) {
  return code < 0x20 || (code >= 0x7F && code < 0xA0) || code == 0x61C || code == 0x200E || code == 0x200F ||
         (code >= 0x2028 && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069);
}

std::string escaped(std::string_view text, std::string_view allowed) {
  std::string out;
  out.reserve(text.size());
  char escape[8];
  while (!text.empty()) {
    char32_t code = 0;
    const size_t length = decode_utf8(text, code);
    if (length == 0) {
      std::snprintf(escape, sizeof escape, "\\x%02x", unsigned(static_cast<unsigned char>(text[0])));
      out += escape;
    } else if (is_control(code) && (code > 0x7F || allowed.find(char(code)) == allowed.npos)) {
      std::snprintf(escape, sizeof escape, "\\u%04x", unsigned(code));
      out += escape;
    } else {
      out += text.substr(0, length);
    }
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return out;
}

}  // namespace

std::string printable(std::string_view text) { return escaped(text, "\n\t"); }
std::string printable_name(std::string_view name) { return escaped(name, ""); }

bool may_style(int fd) {
  const std::string terminal = environment("TERM");
  return isatty(fd) != 0 && !terminal.empty() && terminal != "dumb" && environment("NO_COLOR").empty();
}

void print(std::string_view text) { write_out(printable(text)); }

void print_json(const Json& value) {
  // In JSON control characters stand in strings alone, where their escapes mean the same.
  write_out(printable(dump_json(value, -1, Json::error_handler_t::replace)) + "\n");
}

void complain(std::string_view message) {
  const char* end = message.empty() || message.back() != '.' ? "." : "";
  std::fprintf(stderr, "torpor: %s%s\n", printable(message).c_str(), end);
}

void complain(const Error& error) {
  // The library's sentences name no options: each face has its own.
  struct Hint {
    ErrorCode code;
    std::string_view field, text;
  };
  static constexpr Hint kHints[] = {
      {ErrorCode::kInvalidArgument, "TurnRequest::raw", "--raw does"},
      {ErrorCode::kInvalidArgument, "TurnRequest::system", "see --system"},
      {ErrorCode::kInvalidArgument, "EngineOptions::store", "--store, or TORPOR_STORE"},
#ifdef TORPOR_REMOTE
      {ErrorCode::kNotFound, "EngineOptions::model", "or torpor pull"},
      {ErrorCode::kInvalidArgument, "RemoteOptions::key_command", "--key-command, or TORPOR_KEY_COMMAND"},
#endif
      {ErrorCode::kInvalidArgument, "kind", "torpor export"},
      {ErrorCode::kInvalidArgument, "force", "torpor rm --force"},
      {ErrorCode::kCorruption, "force", "or torpor rm --force"},
      {ErrorCode::kInvalidArgument, "Store::root", "--store, or TORPOR_STORE"},
      {ErrorCode::kInvalidArgument, "ComputeOptions::cpu_target", "--cpu-target, or TORPOR_CPU_TARGET"},
      {ErrorCode::kIncompatible, "kv", "--kv-dtype, --kv-bits, or torpor rebuild"},
      {ErrorCode::kIncompatible, "architecture", "--model, or torpor rebuild"},
      {ErrorCode::kIncompatible, "config", "--model, or torpor rebuild"},
      {ErrorCode::kIncompatible, "weights", "--model, or torpor rebuild"},
      {ErrorCode::kIncompatible, "rope", "--model, or torpor rebuild"},
      {ErrorCode::kIncompatible, "class", "torpor.load_prompt_cache"},
      {ErrorCode::kIncompatible, "made_by", "torpor.CachePersistence, torpor.save_prompt_cache"},
      {ErrorCode::kResourceExhausted, "DiskLimits", "--disk-budget, --min-free, torpor limits, torpor rm"},
      {ErrorCode::kResourceExhausted, "EngineOptions::memory_budget", "--memory-budget"},
  };
  std::string_view sentence = error.what();
  for (const Hint& hint : kHints) {
    if (hint.code != error.code() || hint.field != error.field()) continue;
    if (sentence.ends_with('.')) sentence.remove_suffix(1);
    return complain(std::string(sentence) + " (" + std::string(hint.text) + ")");
  }
  complain(sentence);
}

std::string table(const std::vector<std::vector<std::string>>& given, const std::vector<bool>& right) {
  std::vector<std::vector<std::string>> rows = given;
  std::vector<size_t> widths;
  for (auto& row : rows) {
    for (std::string& cell : row) cell = printable_name(cell);
  }
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      if (i > 0) line += "  ";
      const std::string pad(widths[i] - row[i].size(), ' ');
      line += right[i] ? pad + row[i] : row[i] + pad;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
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

std::optional<int64_t> age_in_seconds(const std::string& rfc3339) {
  std::tm tm{};
  if (std::sscanf(rfc3339.c_str(), "%d-%d-%dT%d:%d:%d", &tm.tm_year, &tm.tm_mon, &tm.tm_mday, &tm.tm_hour, &tm.tm_min,
                  &tm.tm_sec) != 6) {
    return std::nullopt;
  }
  tm.tm_year -= 1900;
  tm.tm_mon -= 1;
  const std::time_t then = timegm(&tm);
  return std::max<int64_t>(0, std::time(nullptr) - then);
}

std::string human_age(const std::string& rfc3339) {
  const std::optional<int64_t> age = age_in_seconds(rfc3339);
  if (!age) return "?";
  const int64_t seconds = *age;
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
