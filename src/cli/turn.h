#pragma once
/// What run and chat have in common: their options, and one turn with its streaming, progress bar and report.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cli/interrupt.h"
#include "cli/model_options.h"
#include "torpor/engine.h"

namespace torpor::cli {

struct TurnOptions : AnswerOptions {
  std::string agent, system;
  bool has_system = false;
  std::string tools_file, tools, template_args;  ///< `tools`: the file's text
  bool special = false;
  bool raw = false, json = false, no_speculate = false;
  SaveMode save = SaveMode::kWait;
  int max_tokens = 256;
  SamplingOptions sampling;      ///< but for the seed
  std::string logit_bias;  ///< JSON
  int logprobs = -1;       ///< none
  std::optional<uint64_t> seed;  ///< unless given another one for each turn
  std::vector<std::string> stop;
};

void add_turn_options(CLI::App& app, TurnOptions& options);
/// --tools, whose file's text is put in `tools`, and --template-args.
void add_template_options(CLI::App& app, std::string& tools_file, std::string& tools, std::string& template_args);

/// Everything that can be known to be wrong before the model's weights are read; settles the model. Changes nothing on disk.
void check_early(TurnOptions& options, const std::filesystem::path& root);
/// What the options say of a turn. Without --seed each has another one.
TurnRequest turn_request(const TurnOptions& options);
/// Streams the answer or prints the turn's object. Throws the error of a save that failed, after the answer.
TurnResult take_turn(Engine& engine, const TurnOptions& options, TurnRequest request, InterruptScope& interrupt);

}  // namespace torpor::cli
