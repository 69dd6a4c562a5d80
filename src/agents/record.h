#pragma once
/// What is kept of an agent beside its rows and tokens: the conversation and how far it has come. It is cut together
/// with the rows when an agent is rewound or forked.

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
  /// Tokens up to the end of the last whole turn. After a cancelled prefill there are more rows, kept for when the same
  /// prompt comes again. After a salvage there are fewer: the rest is computed again from the ids.
  size_t history = 0;
  /// Cuts to fewer tokens are refused, but for a cut to none. Windows would attend rows again that the file lacked from
  /// which the agent was imported.
  size_t shortest_cut = 0;
  bool pinned = false;  ///< never evicted from memory to make room
  /// After which tokens the rows are kept that windows see from there, ascending (KvTensorSpec::apart).
  std::vector<int64_t> checkpoints;

  /// As if nothing after the first `n_tokens` tokens had been said. A message that the cut goes through is left out of
  /// the conversation, its first tokens stay. kInvalidArgument below shortest_cut.
  void cut(size_t n_tokens);
};

/// `history` is written only if it differs from `n_tokens`, the agent's number of ids. kInvalidArgument: a message is
/// not UTF-8.
AgentNotes encode_record(const AgentRecord& record, size_t n_tokens);
/// kCorruption when a key or message can't be read.
AgentRecord decode_record(const AgentNotes& notes, size_t n_tokens);

}  // namespace torpor
