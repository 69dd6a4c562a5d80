#pragma once
/// What is kept of an agent beside its rows and tokens: the conversation and how far it has come. It is cut together with
/// the rows when an agent is rewound or forked.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "agents/conversation.h"
#include "torpor/store.h"

namespace torpor {

struct AgentRecord {
  std::vector<HeldMessage> messages;
  std::string variables;  ///< of the template, that the conversation began with (template_variables)
  /// Tokens up to the end of the last whole turn. Fewer than the rows held after a cancelled prefill (kept, so that the
  /// same prompt goes on from there), more after a salvage (computed again from the ids).
  size_t history = 0;
  /// Cuts to fewer tokens, but not none, are refused: rows that windows would attend again were not in the file that the agent
  /// was imported from.
  size_t shortest_cut = 0;
  bool pinned = false;  ///< never evicted from memory to make room

  /// As if nothing after the first `n_tokens` tokens had been said. A message that the cut goes through is left out of the
  /// conversation, its first tokens stay. kInvalidArgument below shortest_cut.
  void cut(size_t n_tokens);
};

/// `history` is written only if it differs from `n_tokens`, the agent's number of ids. kInvalidArgument: a message is
/// not UTF-8.
AgentNotes encode_record(const AgentRecord& record, size_t n_tokens);
/// kCorruption when a key or message can't be read.
AgentRecord decode_record(const AgentNotes& notes, size_t n_tokens);

}  // namespace torpor
