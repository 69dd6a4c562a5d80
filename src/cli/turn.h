#pragma once
/// What run and chat have in common: their options, and one turn with its streaming, progress bar and report.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cli/interrupt.h"
#include "cli/markdown.h"
#include "cli/model_options.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "torpor/engine.h"

namespace torpor::cli {

struct TurnOptions : AnswerOptions {
  std::string agent, system;
  bool has_system = false;
  std::string tools_file, tools, template_args;  ///< `tools`: the file's text
  bool special = false;
  bool raw = false, json = false, no_speculate = false;
  bool markdown = false;  ///< a terminal that may have colours shows the answer as Markdown
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
/// Of an agent that has begun, and holds these messages: it keeps the system prompt that it began with. kInvalidArgument.
void check_system(const TurnOptions& options, const std::vector<StoredMessage>& held);
/// --logit-bias as it is written. kInvalidArgument.
std::vector<std::pair<int32_t, float>> parse_bias(const std::string& text);
/// What the options say of a turn. Without --seed each has another one.
TurnRequest turn_request(const TurnOptions& options);

/// What a turn tells on the standard streams as it goes: a bar, then text or one JSON object, then a summary.
class TurnPrinter {
 public:
  TurnPrinter(const TurnOptions& options, InterruptScope& interrupt);
  ~TurnPrinter() { end_text(); }
  TurnPrinter(const TurnPrinter&) = delete;
  TurnPrinter& operator=(const TurnPrinter&) = delete;
  void prefill(int done, int total) { progress_.update(done, total); }
  /// Interrupts the turn once nobody reads standard output.
  void text(std::string_view text);
  /// The whole turn, as faces::turn_json has it. kIo when nobody read its text.
  void result(const Json& result, bool saved);
  /// kIo when nobody reads standard output.
  void check_read() const;
  /// The turn was taken back, with the text that it has told.
  void stopped();

 private:
  void write(const std::string& shown);
  /// Shows what is held back, and leaves the terminal its own style.
  void end_text();

  const bool json_, terminal_;
  InterruptScope& interrupt_;
  std::optional<MarkdownStream> markdown_;
  ProgressBar progress_;
  bool closed_ = false;
};

/// Streams the answer or prints the turn's object. Throws the error of a save that failed, after the answer.
TurnResult take_turn(Engine& engine, const TurnOptions& options, TurnRequest request, InterruptScope& interrupt);

}  // namespace torpor::cli
