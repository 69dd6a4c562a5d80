/// rebuild: an agent's rows computed again, from its token ids or, for a model with another tokenizer, from its messages.

#include <algorithm>

#include <CLI/CLI.hpp>

#include "agents/conversation.h"
#include "agents/record.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/model_options.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "torpor/agents.h"
#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/model.h"
#include "torpor/text.h"

namespace torpor::cli {
namespace {

constexpr size_t kChunk = 256;  // tokens computed at once

struct RebuildOptions : ModelOptions {
  std::string id;
  bool json = false;
};

/// nullopt: a signal came.
std::optional<KvSnapshot> compute(Model& model, const KvFormat& format, const std::vector<int32_t>& tokens) {
  const auto cache = KvCache::create(model.kv_layout(format), format, model.backend(), model.state_layout());
  ProgressBar progress;
  InterruptScope interrupt;
  for (size_t first = 0; first < tokens.size(); first += kChunk) {
    if (interrupt.signal() != 0) return std::nullopt;
    const auto rows = std::span(tokens).subspan(first, std::min(kChunk, tokens.size() - first));
    const ForwardSequence sequence{.tokens = rows, .kv = cache.get(), .no_logits = true};
    model.forward({&sequence, 1});
    cache->record_tokens(rows);
    progress.update(int(first + rows.size()), int(tokens.size()));
  }
  Identity identity = model.identity();
  identity.kv = format.name();
  KvSnapshot snapshot = cache->snapshot(identity);
  snapshot.lineage.ranges = {{0, model.numerics()}};
  return snapshot;
}

int rebuild(RebuildOptions options, const std::filesystem::path& root) {
  const auto store = open_store_of(root, options.id);
  const AgentInfo info = store->agent_info(options.id);
  settle_model(options, root, options.id);
  const auto lock = store->lock_agent(options.id);
  std::vector<int32_t> tokens = store->agent_tokens(options.id);
  AgentRecord record = decode_record({store->agent_messages(options.id), info.record}, tokens.size());
  const auto model = Model::load(options.model, options.compute());  // this thread is the one that computes
  const auto tokenizer = Tokenizer::load(model->info().dir);
  const auto chat_template = ChatTemplate::load(model->info().dir);
  if (tokenizer->digest() != info.conversation.tokenizer || has_unknown_tokens(tokens)) {
    if (record.messages.empty() || chat_template == nullptr) {
      throw Error(ErrorCode::kInvalidArgument, "agent '" + options.id + "' can't be computed again by this model: its token ids are of "
                                               "another tokenizer, and it has no messages that a chat template could write anew");
    }
    tokens = encode_history({*tokenizer, *chat_template, record.variables}, record.messages);
    record.history = tokens.size();
  }
  if (const int limit = model->info().max_context; limit > 0 && tokens.size() > size_t(limit)) {
    throw Error(ErrorCode::kResourceExhausted, std::to_string(tokens.size()) + " tokens do not fit the model's context of " +
                                                   std::to_string(limit) + "; rewind the agent first");
  }
  const KvFormat own = KvFormat::parse(info.identity.kv).value_or(model->default_kv_format());
  std::optional<KvSnapshot> snapshot = compute(*model, model->refined(options.kv_format().value_or(own)), tokens);
  if (!snapshot) return 130;
  snapshot->lineage.salt = info.lineage.salt;
  snapshot->conversation = {tokenizer->digest(), chat_template != nullptr ? chat_template->digest() : ""};
  record.shortest_cut = 0;  // all rows are there
  const SaveResult saved = store->save_agent_cache(options.id, *snapshot, options.model, info.user, options.durability(),
                                                   encode_record(record, tokens.size()));
  if (options.json) {
    print_json(Json{{"agent", options.id}, {"model", options.model}, {"tokens", tokens.size()},
                    {"bytes_written", saved.bytes_written}});
  } else {
    print(options.id + ": " + std::to_string(tokens.size()) + " tokens computed again, " + human_bytes(saved.bytes_written) +
          " written\n");
  }
  return 0;
}

}  // namespace

void add_rebuild_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<RebuildOptions>();
  CLI::App* command = app.add_subcommand("rebuild", "Compute an agent again, with its model or another one");
  command->add_option("ID", options->id, "The agent")->required()->type_name("");
  add_model_options(*command, *options);
  command->add_flag("--json", options->json, "Print a JSON object");
  command->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return rebuild(*options, invocation.store); };
  });
}

}  // namespace torpor::cli
