#include "cli/bench_report.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "torpor/error.h"
#include "torpor/kv_snapshot.h"

namespace torpor::cli {
namespace {

constexpr std::array kKinds{"prefill", "decode", "wake", "save"};
constexpr double kMost = 0.5;   // the share from which something is what limits
constexpr double kMore = 1.25;  // more than memory gives: the processor's cache holds it, or not all is read

double rounded(double value) { return std::round(value * 1000) / 1000; }

template <class... Values>
std::string formatted(const char* format, Values... values) {
  char text[256];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

std::string figure(const BenchRow& row) {
  return row.is_speed() ? formatted("%.1f tokens/s", row.figure) : human_ms(row.figure);
}

std::string name(const BenchRow& row) {
  return row.agents == 1 ? kKinds[row.kind] : "by " + std::to_string(row.agents);
}

double largest(const std::vector<BenchRow>& rows, BenchRow::Kind kind) {
  double most = 0;
  for (const BenchRow& row : rows) {
    if (row.kind == kind) most = std::max(most, row.figure);
  }
  return most;
}

/// A bar of at most `width` cells, in eighths of one.
std::string bar(double part, int width) {
  static constexpr std::array kEighths{"", "\u258f", "\u258e", "\u258d", "\u258c", "\u258b", "\u258a", "\u2589"};
  const int eighths = std::clamp(int(std::lround(part * width * 8)), 1, width * 8);
  std::string text;
  for (int i = 0; i < eighths / 8; ++i) text += "\u2588";
  return text + kEighths[size_t(eighths % 8)];
}

std::string xml(const std::string& text) {
  std::string out;
  for (const char c : printable_name(text)) {
    out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : std::string(1, c);
  }
  return out;
}

/// The saved run's figure of a row that has a ratio.
double saved_figure(const BenchRow& row) { return row.is_speed() ? row.figure / *row.ratio : row.figure * *row.ratio; }

}  // namespace

void BenchReport::find_limits(int64_t weight_bytes, double bytes_per_token, bool flushed) {
  const auto find = [this](BenchRow::Kind kind, bool last) {
    const BenchRow* found = nullptr;
    for (const BenchRow& row : rows) {
      if (row.kind == kind && (found == nullptr || last)) found = &row;
    }
    return found;
  };
  const auto add = [this](BenchRow::Kind kind, double read_per_s) {
    if (memory_bytes_per_s <= 0) return;
    const double share = read_per_s / memory_bytes_per_s;
    limits.push_back({kind, share >= kMost && share <= kMore ? "bandwidth" : "arithmetic", share});
  };
  // Each weight is read at least once, and a token's step reads what is held.
  if (const BenchRow* row = find(BenchRow::kPrefill, true)) {
    add(row->kind, (double(weight_bytes) / row->tokens + bytes_per_token) * row->figure);
  }
  if (const BenchRow* row = find(BenchRow::kDecode, false)) {
    add(row->kind, (double(weight_bytes) / row->agents + bytes_per_token * row->tokens) * row->figure);
  }
  const BenchRow* row = find(BenchRow::kSave, true);
  if (row != nullptr && disk.measured && row->figure > 0) {
    // One after the other (docs/format.md, "Writing"): segments, their directory, the agent file, its directory.
    const int flushes = row->tokens >= kSegmentTokens ? 4 : 2;
    const double disk_ms = double(row->bytes) / disk.write_bytes_per_s * 1000 + flushes * disk.flush_ms;
    const double share = flushed ? disk_ms / row->figure : 0;
    limits.push_back({row->kind, share >= kMost ? "disk" : "arithmetic", share});
  }
}

void BenchReport::compare(const std::vector<BenchRow>& saved) {
  for (BenchRow& row : rows) {
    const auto then = std::ranges::find_if(saved, [&row](const BenchRow& old) {
      return old.kind == row.kind && old.tokens == row.tokens && old.agents == row.agents;
    });
    if (then == saved.end() || row.figure <= 0) continue;
    row.ratio = row.is_speed() ? row.figure / then->figure : then->figure / row.figure;
  }
}

Json BenchReport::json() const {
  Json all;
  for (const char* kind : kKinds) all[kind] = Json::array();
  for (const BenchRow& row : rows) {
    Json one;
    one[row.kind == BenchRow::kDecode ? "depth" : "tokens"] = row.tokens;
    if (row.kind == BenchRow::kDecode) one["agents"] = row.agents;
    one[row.is_speed() ? "tokens_per_s" : "ms"] = rounded(row.figure);
    if (!row.is_speed()) one["bytes"] = row.bytes;
    if (row.ratio) one["ratio"] = rounded(*row.ratio);
    all[kKinds[row.kind]].push_back(std::move(one));
  }
  all["peak_bytes"] = peak_bytes;
  Json limit{{"memory_bytes_per_s", int64_t(memory_bytes_per_s)}};
  if (disk.measured) {
    limit.update({{"write_bytes_per_s", int64_t(disk.write_bytes_per_s)}, {"flush_ms", rounded(disk.flush_ms)}});
  }
  for (const BenchLimit& one : limits) limit[kKinds[one.kind]] = {{"by", one.by}, {"share", rounded(one.share)}};
  all["limits"] = std::move(limit);
  return all;
}

std::string BenchReport::table(bool blocks) const {
  const bool compared = std::ranges::any_of(rows, [](const BenchRow& row) { return row.ratio.has_value(); });
  std::string text;
  const auto add = [&](const std::string& what, const std::string& tokens, const std::string& value,
                       const std::string& bytes, const std::string& ratio, const std::string& blocks_of) {
    text += formatted("%-8s %7s %16s %10s", what.c_str(), tokens.c_str(), value.c_str(), bytes.c_str());
    if (compared) text += formatted(" %7s", ratio.c_str());
    text += "  " + blocks_of;
    text.erase(text.find_last_not_of(' ') + 1);
    text += '\n';
  };
  add("", "TOKENS", "MEDIAN", "SIZE", "RATIO", "");
  for (const BenchRow& row : rows) {
    add(name(row), std::to_string(row.tokens), figure(row), row.is_speed() ? "" : human_bytes(row.bytes),
        row.ratio ? formatted("%.2f", *row.ratio) : "",
        blocks ? bar(row.figure / std::max(largest(rows, row.kind), 1e-9), 24) : "");
  }
  add("peak", "", "", human_bytes(peak_bytes), "", "");
  if (limits.empty()) return text;
  text += "limits  ";
  for (const BenchLimit& limit : limits) {
    text += std::string(&limit == limits.data() ? " " : "; ") + kKinds[limit.kind] + ": " + limit.by +
            formatted(" (%.0f%% of %s)", limit.share * 100,
                      limit.kind == BenchRow::kSave ? "its time is the disk's"
                                                    : (human_bytes(int64_t(memory_bytes_per_s)) + "/s").c_str());
  }
  return text + "\n";
}

std::string BenchReport::svg(const std::string& title) const {
  constexpr int kLine = 22, kLeft = 150, kBar = 440, kWidth = 760;
  std::string bars;
  int y = 48;
  const BenchRow* before = nullptr;
  for (const BenchRow& row : rows) {
    if (before != nullptr && before->kind != row.kind) y += kLine / 2;
    before = &row;
    double most = 0;
    for (const BenchRow& other : rows) {
      if (other.kind == row.kind) most = std::max({most, other.figure, other.ratio ? saved_figure(other) : 0});
    }
    const double scale = most > 0 ? kBar / most : 0;
    const std::string what = name(row) + (row.kind == BenchRow::kDecode ? " at " : " of ") + std::to_string(row.tokens);
    bars += formatted("<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>\n", kLeft - 8, y + 12, what.c_str());
    if (row.ratio) {
      bars += formatted("<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"17\" fill=\"#ccc\"/>\n", kLeft, y - 1,
                        saved_figure(row) * scale);
    }
    bars += formatted("<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"11\" fill=\"%s\"/>\n", kLeft, y + 2,
                      row.figure * scale, row.is_speed() ? "#2a6f97" : "#b5651d");
    bars += formatted("<text x=\"%d\" y=\"%d\">%s%s</text>\n", kLeft + kBar + 8, y + 12, figure(row).c_str(),
                      row.ratio ? formatted(" (%.2f)", *row.ratio).c_str() : "");
    y += kLine;
  }
  return formatted("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" "
                   "font-size=\"13\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
                   kWidth, y + 8) +
         "<text x=\"16\" y=\"28\" font-size=\"16\">" + xml(title) + "</text>\n" + bars + "</svg>\n";
}

std::vector<BenchRow> parse_bench(std::string_view text, const std::string& path) {
  const auto refuse = [&path]() {
    return Error(ErrorCode::kInvalidArgument, "'" + path + "' is no run that torpor bench saved");
  };
  const Json all = parse_json<Json>(text, nullptr, false);
  if (!all.is_object()) throw refuse();
  std::vector<BenchRow> rows;
  for (size_t kind = 0; kind < kKinds.size(); ++kind) {
    const auto list = all.find(kKinds[kind]);
    if (list == all.end() || !list->is_array()) throw refuse();
    for (const Json& one : *list) {
      BenchRow row{BenchRow::Kind(kind), 0, 1, 0};
      const auto number = [&](const char* field) {
        const auto found = one.find(field);
        if (found == one.end() || !found->is_number()) throw refuse();
        return found->get<double>();
      };
      const auto count = [&](const char* field) {
        const double value = number(field);
        if (!(value >= 0 && value <= double(1 << 30)) || value != std::floor(value)) throw refuse();
        return int(value);
      };
      if (!one.is_object()) throw refuse();
      row.tokens = count(row.kind == BenchRow::kDecode ? "depth" : "tokens");
      if (row.kind == BenchRow::kDecode) row.agents = count("agents");
      row.figure = number(row.is_speed() ? "tokens_per_s" : "ms");
      if (!(row.figure > 0) || !std::isfinite(row.figure)) throw refuse();
      rows.push_back(row);
    }
  }
  return rows;
}

}  // namespace torpor::cli
