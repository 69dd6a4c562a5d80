#include "server/agents_turn.h"

#include <unistd.h>

#include <algorithm>
#include <climits>
#include <filesystem>
#include <fstream>
#include <optional>
#include <utility>

#include "base/env.h"
#include "faces/error_table.h"
#include "faces/turn_json.h"
#include "server/keys.h"
#include "server/request.h"
#include "torpor/error.h"
#include "torpor/message.h"

namespace torpor::server {
namespace {

/// A tenant's own words for its agents: the store's ids stay inside.
std::string own_words(std::string text, const std::string& tenant) {
  const std::string prefix =
      tenant == kLocalTenant ? std::string() : agent_id_of(tenant, "x").substr(0, agent_id_of(tenant, "x").size() - 1);
  for (size_t at = 0; !prefix.empty() && (at = text.find(prefix, at)) != std::string::npos;)
    text.erase(at, prefix.size());
  return text;
}

TurnRequest turn_of(const AgentName& agent, const Json& body, int vocab_size) {
  TurnRequest turn;
  turn.agent = agent.id;
  turn.salt = agent.salt;
  turn.prompt = body.at("prompt");
  if (body.contains("system")) turn.system = body["system"].get<std::string>();
  turn.generate = generate_options(body, vocab_size);
  return turn;
}

/// A directory for one file, which goes with this.
class ScratchDirectory {
 public:
  ScratchDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "torpor-export-XXXXXX").string();
    if (!mkdtemp(name.data()))
      throw Error(ErrorCode::kIo, "can't make a directory for the export in '" +
                                      std::filesystem::temp_directory_path().string() +
                                      "'; free some space there, or set TMPDIR");
    path = name;
  }
  ~ScratchDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  std::filesystem::path path;
};

}  // namespace

GenerateOptions generate_options(const Json& body, int vocab_size) {
  GenerateOptions generate;
  if (body.contains("max_tokens"))
    generate.max_tokens = int(std::clamp<int64_t>(body["max_tokens"].get<int64_t>(), INT_MIN, INT_MAX));
  const Field members(body);
  Sampling asked;
  read_sampling(members, asked);
  asked.penalty_context = members["penalty_context"].integer(0);
  // 32 bits: a number that every reader of JSON keeps.
  if (!asked.seed) asked.seed = random_bits() & 0xFFFFFFFFu;
  generate.sampling = sampling_options(asked, {}, vocab_size);
  generate.stop = read_stop(members["stop"]);
  return generate;
}

Json error_json(const Error& error, const std::string& tenant) {
  Json said{{"code", faces::error_mapping(error.code()).name}, {"message", own_words(error.what(), tenant)}};
  if (!error.agent().empty()) said["agent"] = own_words(error.agent(), tenant);
  if (!error.field().empty()) said["field"] = error.field() == kAgentTaken ? "agent" : error.field();
  if (!error.expected().empty()) said["expected"] = error.expected();
  if (!error.found().empty()) said["found"] = error.found();
  return Json{{"error", std::move(said)}};
}

Json run_agent_turn(Engine& engine, Metrics& metrics, const AgentName& agent, TurnRequest::Presence presence,
                    const HttpRequest& request, const Json& body, HttpResponse& response) {
  TurnRequest turn = turn_of(agent, body, engine.model().vocab_size);
  turn.share = request.share;
  turn.id = request.turn_id();
  turn.background = request.background();
  turn.presence = presence;
  turn.give_up = &response.gone();
  const bool stream = body.value("stream", false);
  TurnEvents events(response);
  std::optional<CountedTurn> counted(std::in_place, metrics, agent);
  turn.generate.on_prefill = [&](int done, int total) {
    counted->turn.reads(done, total);
    if (stream) events.send("prefill", {{"done", done}, {"total", total}});
  };
  turn.generate.on_text = [&](std::string_view text) {
    counted->turn.answers();
    if (stream) events.send("text", {{"text", text}});
  };
  Json result;
  try {
    const TurnResult done = engine.turn(turn);
    counted->complete(done);
    if (done.save_error) throw *done.save_error;
    const SamplingOptions& sampling = turn.generate.sampling;
    result = faces::turn_json(done, sampling.temperature > 0 ? std::optional(sampling.seed) : std::nullopt);
    result["agent"] = agent.name;
  } catch (const Error& error) {
    if (response.gone()) counted->reason = "cancelled";
    if (!events.begun()) throw;
    counted.reset();
    events.send("error", error_json(error, agent.tenant));
    response.end();
    return nullptr;
  }
  if (!stream) return result;
  counted.reset();  // before the client hears the end, who may look at the counts
  response.ending(true);
  events.send("result", result);
  response.end();
  return nullptr;
}

Json compare_messages(Engine& engine, const AgentName& agent, const Json& messages) {
  TurnRequest turn;
  turn.messages = messages_from_json(to_text(messages));
  if (turn.messages.empty()) throw Error(ErrorCode::kInvalidArgument, "'messages' is empty").with_field("messages");
  const std::vector<StoredMessage> held = engine.store().agent_messages(agent.id);
  size_t common = 0;
  while (common < held.size() && common < turn.messages.size() &&
         says_the_same(message_from_json(held[common].json), turn.messages[common]))
    ++common;
  Json found{{"agent", agent.name},
             {"held_tokens", engine.store().agent_info(agent.id).cache_size},
             {"prompt_tokens", engine.prompt_tokens(turn).size()},
             {"held_messages", held.size()},
             {"common_messages", common},
             {"common_tokens", common == 0 ? 0 : held[common - 1].end}};
  // Where one side has no more, nothing differs.
  const bool part = common < held.size() && common < turn.messages.size();
  found["held"] = part ? parse_json<Json>(held[common].json) : Json();
  found["given"] = part ? parse_json<Json>(message_to_json(turn.messages[common])) : Json();
  return found;
}

void send_export(Engine& engine, const AgentName& agent, HttpResponse& response) {
  engine.save(agent.id);
  const ScratchDirectory scratch;
  const std::filesystem::path path = scratch.path / "agent.safetensors";
  engine.store().export_agent(agent.id, path, agent.name);
  std::ifstream file(path, std::ios::binary);
  response.begin(200, {{"content-type", "application/octet-stream"},
                       {"content-disposition", "attachment; filename=\"" + agent.name + ".safetensors\""}});
  std::string piece(size_t(1) << 20, '\0');
  while (file.read(piece.data(), std::streamsize(piece.size())), file.gcount() > 0) {
    if (!response.write(std::string_view(piece).substr(0, size_t(file.gcount())))) return;
  }
  if (file.bad()) throw Error(ErrorCode::kIo, "can't read the export of agent '" + agent.name + "' back");
  response.end();
}

}  // namespace torpor::server
