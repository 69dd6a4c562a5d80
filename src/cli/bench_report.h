#pragma once
/// What `torpor bench` measured: as a table, as JSON that a later run is compared with, and drawn.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cli/disk_probe.h"
#include "cli/output.h"

namespace torpor::cli {

struct BenchRow {
  enum Kind { kPrefill, kDecode, kWake, kSave };
  Kind kind;
  int tokens;            ///< read, held already, woken or saved
  int agents;            ///< that decode; 1 of the others
  double figure;         ///< tokens a second, of all agents together; of kWake and kSave milliseconds
  int64_t bytes = 0;     ///< of kWake and kSave: read or written
  std::optional<double> ratio{};  ///< how many times as fast as a saved run

  bool is_speed() const { return kind == kPrefill || kind == kDecode; }
  bool operator==(const BenchRow& other) const = default;
};

/// What holds a part of the work back.
struct BenchLimit {
  BenchRow::Kind kind;
  const char* by;  ///< "bandwidth", "arithmetic" or "disk"
  double share;    ///< of what the memory gives, or of a save the part of its time that the disk needs
};

struct BenchReport {
  std::vector<BenchRow> rows;  ///< in the order of their kinds
  int64_t peak_bytes = 0;
  double memory_bytes_per_s = 0;
  DiskProbe disk;
  std::vector<BenchLimit> limits;

  /// Finds `limits` from the rows, the machine's figures, the bytes of weights, and those of a token in the cache. With
  /// `flushed` a save is on the disk when it ends.
  void find_limits(int64_t weight_bytes, double bytes_per_token, bool flushed);
  /// Gives each row that the saved run has, too, its ratio.
  void compare(const std::vector<BenchRow>& saved);

  Json json() const;
  /// With `blocks` a bar stands behind each row, as long as its figure beside the largest of its kind.
  std::string table(bool blocks) const;
  /// Bars of all rows; where there are ratios, with the saved run's in grey.
  std::string svg(const std::string& title) const;
};

/// The rows of what BenchReport::json made. kInvalidArgument, naming `path`, when it is anything else.
std::vector<BenchRow> parse_bench(std::string_view text, const std::string& path);

}  // namespace torpor::cli
