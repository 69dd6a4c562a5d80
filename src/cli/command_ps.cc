/// ps: what a running server does.

#include <chrono>
#include <memory>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/output.h"
#include "cli/server_client.h"

namespace torpor::cli {
namespace {

struct PsOptions : ServerOptions {
  bool json = false;
};

int ps(const PsOptions& options) {
  const ServerClient client(options);
  const Json now = client.get("/torpor/v1/now");
  if (options.json) {
    Json printed{{"server", client.url()}};
    printed.update(now);
    print_json(printed);
    return 0;
  }
  int waiting = 0;
  std::vector<std::vector<std::string>> rows{{"AGENT", "STATE", "PROMPT", "CACHED", "READ", "FOR"}};
  const int64_t clock = std::chrono::duration_cast<std::chrono::milliseconds>(
                            std::chrono::system_clock::now().time_since_epoch())
                            .count();
  for (const Json& turn : now.at("turns")) {
    const std::string state = turn.at("state"), agent = turn.at("agent");
    if (state == "waiting") ++waiting;
    rows.push_back({agent.empty() ? "-" : agent, state == "waiting" ? "waiting, " + std::to_string(waiting) : state,
                    std::to_string(turn.at("prompt_tokens").get<int64_t>()),
                    std::to_string(turn.at("cached_tokens").get<int64_t>()),
                    std::to_string(turn.at("done").get<int64_t>()) + "/" +
                        std::to_string(turn.at("total").get<int64_t>()),
                    human_ms(double(clock - turn.at("begun_at_ms").get<int64_t>()))});
  }
  const std::string model = now.at("model").at("name");
  std::string text = client.url() + ": " + model + ", " + std::to_string(rows.size() - 1 - size_t(waiting)) +
                     " turns run, " + std::to_string(waiting) + " wait";
  if (const auto others = now.at("others").get<int64_t>(); others > 0) text += ", " + std::to_string(others) + " of others";
  print(text + "\n");
  if (rows.size() > 1) print(table(rows, {false, false, true, true, true, true}));
  return 0;
}

}  // namespace

void add_ps_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<PsOptions>();
  CLI::App* command = app.add_subcommand("ps", "Tell what a running server does: its model, turns and queue");
  add_server_options(*command, *options);
  command->add_flag("--json", options->json, "Print a JSON object");
  command->callback([&invocation, options] { invocation.run = [options] { return ps(*options); }; });
}

}  // namespace torpor::cli
