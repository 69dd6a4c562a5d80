#pragma once
/// Stop strings over streamed text.

#include <string>
#include <string_view>
#include <vector>

namespace torpor {

/// Lets text through once it can no longer become part of a stop string.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stops);
  /// Text that is certain after `piece`. After stopped() it is always empty.
  std::string push(std::string_view piece);
  /// What was held back, at the end of generation.
  std::string finish();
  bool stopped() const noexcept { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace torpor
