#include "store/marker.h"

#include "base/json.h"
#include "store/sidecar.h"
#include "torpor/error.h"
#include "torpor/version.h"

namespace torpor {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kVersion = "torpor_store";

int64_t bytes_of(const Json& limits, const char* key) {
  const auto found = limits.find(key);
  if (found == limits.end()) return 0;
  const bool fits = found->is_number_unsigned() && found->get<uint64_t>() <= uint64_t(INT64_MAX);
  if (!fits) throw std::invalid_argument(std::string("'limits.") + key + "' is no number of bytes");
  return found->get<int64_t>();
}

}  // namespace

std::string encode_marker(const DiskLimits& limits, const Marker& before) {
  Json json = before.text.empty() ? Json{{kVersion, kNewestFormat}} : parse_json<Json>(before.text);
  Json& kept = json["limits"];
  for (const auto& [key, bytes] : {std::pair{"disk_budget", limits.budget}, {"min_free", limits.min_free}}) {
    if (bytes > 0) {
      kept[key] = bytes;
    } else if (kept.is_object()) {
      kept.erase(key);
    }
  }
  if (kept.empty()) json.erase("limits");
  return dump_json(json, 2, Json::error_handler_t::replace) + "\n";
}

std::optional<Marker> decode_marker(const std::string& text, const std::string& file_name) {
  if (text.size() > kSidecarBeginning && is_sidecar(text)) return std::nullopt;
  // A power cut leaves this of a marker that was not flushed. One with limits was.
  if (text.find_first_not_of('\0') == std::string::npos) return Marker{};
  std::string problem;
  try {
    const Json json = parse_json<Json>(text);
    const auto version = json.is_object() ? json.find(kVersion) : json.end();
    if (!json.is_object() || version == json.end() || !version->is_number_unsigned() || version->get<uint64_t>() < 1) {
      throw std::invalid_argument(std::string("it has no '") + kVersion + "'");
    }
    if (version->get<uint64_t>() > uint64_t(kNewestFormat)) {
      const std::string found = std::to_string(version->get<uint64_t>()), newest = std::to_string(kNewestFormat);
      throw Error(ErrorCode::kIncompatible, "The store of '" + file_name + "' is of version " + found +
                                                ", and this Torpor knows versions up to " + newest +
                                                "; use a newer Torpor.")
          .with_path(file_name)
          .with_field(kVersion, newest, found);
    }
    Marker marker{.text = text};
    if (const auto limits = json.find("limits"); limits != json.end()) {
      if (!limits->is_object()) throw std::invalid_argument("'limits' is no object");
      marker.limits = {bytes_of(*limits, "disk_budget"), bytes_of(*limits, "min_free")};
    }
    return marker;
  } catch (const Json::exception&) {
    problem = "it is no JSON";
  } catch (const std::invalid_argument& error) {
    problem = error.what();
  }
  throw Error(ErrorCode::kCorruption, "'" + file_name + "' is damaged: " + problem +
                                          ". Restore it from a copy, or remove it; "
                                          "the next save to the store makes another, without limits.")
      .with_path(file_name);
}

}  // namespace torpor
