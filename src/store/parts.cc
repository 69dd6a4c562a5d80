#include "store/parts.h"

#include <algorithm>
#include <charconv>

#include "base/hash.h"
#include "store/torpor_file.h"

namespace torpor {

std::vector<std::string> part_names(std::span<const PartRef> parts) {
  std::vector<std::string> names;
  for (const PartRef& part : parts) names.push_back(part.name);
  return names;
}

std::string part_claim(const std::string& uid, const std::string& name) { return hash_hex(part_stem(uid, name)); }

std::string encode_parts(std::span<const PartRef> parts) {
  std::string text;
  for (const PartRef& part : parts) {
    if (!text.empty()) text += ',';
    text += part.name + ":" + std::to_string(part.first) + ":" + std::to_string(part.tokens) + ":" +
            std::to_string(part.rows);
  }
  return text;
}

std::optional<std::vector<PartRef>> decode_parts(std::string_view text) {
  constexpr size_t kDigest = 32;
  constexpr int64_t kMostTokens = int64_t(1) << 40;  // no sum overflows
  std::vector<PartRef> parts;
  int64_t end = 0;
  for (const std::string& entry : split(text)) {
    PartRef& part = parts.emplace_back();
    part.name = entry.substr(0, kDigest);
    if (!is_hex_digest(part.name)) return std::nullopt;
    const char* at = entry.data() + kDigest;
    const char* const stop = entry.data() + entry.size();
    for (int64_t* number : {&part.first, &part.tokens, &part.rows}) {
      if (at == stop || *at != ':') return std::nullopt;
      const auto [next, error] = std::from_chars(at + 1, stop, *number);
      if (error != std::errc() || *number < 0) return std::nullopt;
      at = next;
    }
    if (at != stop || part.first != end || part.tokens > kMostTokens - end || part.rows > part.tokens)
      return std::nullopt;
    end = part.end();
  }
  return parts;
}

PartsPlan plan_parts(std::span<const HeldPart> held, int64_t sealed, int64_t n_tokens, bool has_state) {
  PartsPlan plan;
  size_t keep = held.size();
  plan.first = keep > 0 ? held.back().end() : 0;
  const auto first_with_rows =
      std::find_if(held.begin(), held.end(), [](const HeldPart& part) { return part.rows > 0; });
  if (first_with_rows != held.end() && plan.first <= sealed) {
    // Their rows are in a segment now. What stays of them goes together with as much as it is itself, and so on.
    keep = size_t(first_with_rows - held.begin());
    int64_t ids = plan.first - first_with_rows->first;
    for (; keep > 0 && held[keep - 1].tokens <= ids; --keep) ids += held[keep - 1].tokens;
    plan.history_first = plan.first - ids;
    plan.history_end = plan.first;
    plan.keep = keep;
    plan.rows = n_tokens - sealed;
    return plan;
  }
  const auto parts_with_rows =
      std::count_if(held.begin(), held.end(), [](const HeldPart& part) { return part.rows > 0; });
  int64_t ids = n_tokens - plan.first, rows = n_tokens - std::max(sealed, plan.first), again = 0;
  for (; keep > 0; --keep) {
    const HeldPart& part = held[keep - 1];
    const bool newest = keep == held.size();
    bool take = part.again;
    if (part.rows > 0) {
      take |= has_state ||
              (again + part.rows <= kMostRowsAgain && (part.rows <= rows || (newest && parts_with_rows >= kManyParts)));
    } else {
      take |= part.tokens <= ids;
    }
    if (!take) break;
    again += part.rows;
    rows += part.rows;
    ids += part.tokens;
  }
  plan.keep = keep;
  plan.first = n_tokens - ids;
  plan.rows = rows;
  return plan;
}

}  // namespace torpor
