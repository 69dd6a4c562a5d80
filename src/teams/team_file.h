#pragma once
/// A team as its file has it (docs/format.md, "Teams").

#include <cstddef>
#include <string>

#include "torpor/teams.h"

namespace torpor {

/// kInvalidArgument: `what`, of a field of the request.
[[noreturn]] void refuse_team(const std::string& what, const std::string& field);
/// kInvalidArgument: what can't be a team.
void check_team(const TeamSpec& spec);
/// kInvalidArgument: a text is not UTF-8.
std::string encode_team(const Team& team);
/// Of what encode_team gives before a step: what its end adds fits the file (Store::save_team), too.
inline constexpr size_t kMostTeamBytes = (size_t(16) << 20) - 1024;
/// `json`: what Store::read_team gives. kCorruption: it is not what encode_team wrote. kNotFound: it is of another id.
/// kIncompatible: a newer version's.
Team decode_team(const std::string& json, const std::string& id);

/// kInvalidArgument for another name.
StepKind parse_step_kind(const std::string& name);

}  // namespace torpor
