// A team's file: whatever it says, it is a team that can be written and read again, or an Error.
#include <string>

#include "require.h"
#include "teams/team_file.h"

using namespace torpor;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  try {
    const Team team = decode_team(text, "crew");
    const std::string written = encode_team(team);
    require(encode_team(decode_team(written, "crew")) == written);
  } catch (const Error& error) {
    require(error.what()[0] != '\0');
  }
  return 0;
}
