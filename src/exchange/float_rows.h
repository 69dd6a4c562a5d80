#pragma once
/// Quantized rows as other programs read them.

#include "torpor/exchange.h"
#include "torpor/kv_snapshot.h"

namespace torpor {

/// The agent with its rows as floats of the dtype of their scales: turned back where `format` rotates them, keys
/// restored where `restore` is set. The layout must be the engine's for `format`.
KvSnapshot float_rows(const KvSnapshot& snapshot, const KvFormat& format, const RestoreAgentKeys& restore);

}  // namespace torpor
