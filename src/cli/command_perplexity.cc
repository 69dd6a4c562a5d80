/// perplexity: how well a model predicts a text, with the cache as it would be kept.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/model_options.h"
#include "cli/output.h"
#include "cli/text_input.h"
#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/text.h"

namespace torpor::cli {
namespace {

struct PerplexityOptions : ModelOptions {
  std::string file;
  int tokens = 0, chunk = 64;
  bool json = false;
};

/// Natural log of the probability that `logits` give `token`.
double log_probability(std::span<const float> logits, int32_t token) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(double(logit) - top);
  return double(logits[size_t(token)]) - top - std::log(sum);
}

int perplexity(const PerplexityOptions& options) {
  const std::string text = read_prompt_file(options.file);
  check_text(text, "the text");
  const auto model = Model::load(options.model, options.compute());  // this thread is the one that computes
  std::vector<int32_t> tokens = Tokenizer::load(model->info().dir)->encode(text, /*add_special=*/true);
  if (options.tokens > 0 && size_t(options.tokens) < tokens.size()) tokens.resize(size_t(options.tokens));
  if (tokens.size() < 2) throw Error(ErrorCode::kInvalidArgument, "the text is too short; perplexity needs two tokens at least");
  if (const int limit = model->info().max_context; limit > 0 && tokens.size() > size_t(limit)) {
    throw Error(ErrorCode::kResourceExhausted, std::to_string(tokens.size()) + " tokens do not fit the model's context of " +
                                                   std::to_string(limit) + "; ask for fewer with --tokens");
  }

  const KvFormat format = model->refined(options.kv_format().value_or(model->default_kv_format()));
  const auto cache = KvCache::create(model->kv_layout(format), format, model->backend(), model->state_layout());
  const size_t vocab = size_t(model->info().vocab_size);
  InterruptScope interrupt;
  double sum = 0;
  for (size_t first = 0; first + 1 < tokens.size();) {
    if (interrupt.signal() != 0) return 128 + interrupt.signal();
    const size_t n = std::min(size_t(options.chunk), tokens.size() - 1 - first);
    const ForwardSequence sequence{std::span(tokens).subspan(first, n), cache.get(), /*all_logits=*/true};
    const mx::array logits = model->forward({&sequence, 1});
    cache->record_tokens(sequence.tokens);
    for (size_t i = 0; i < n; ++i) sum += log_probability({logits.data<float>() + i * vocab, vocab}, tokens[first + i + 1]);
    first += n;
  }
  const double value = std::exp(-sum / double(tokens.size() - 1));

  if (options.json) {
    print_json(Json{{"model", options.model}, {"kv", format.name()}, {"tokens", tokens.size()}, {"perplexity", value},
                    {"kv_bytes_per_token", cache->layout().bytes_per_token()}});
  } else {
    char line[128];
    std::snprintf(line, sizeof line, "perplexity %.4f over %zu tokens, kv %s\n", value, tokens.size(), format.name().c_str());
    print(line);
  }
  return 0;
}

}  // namespace

void add_perplexity_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<PerplexityOptions>();
  CLI::App* perplexity_app = app.add_subcommand("perplexity", "Measure how well a model predicts a text");
  add_model_options(*perplexity_app, *options);
  perplexity_app->add_option("--file", options->file, "The text, UTF-8; - is standard input")->required()->type_name("F");
  perplexity_app->add_option("--tokens", options->tokens, "Only the first so many tokens")
      ->check(CLI::Range(2, 1 << 30))
      ->type_name("N");
  perplexity_app->add_option("--chunk", options->chunk, "Tokens computed at once; what comes before them is read from the cache")
      ->capture_default_str()
      ->check(CLI::Range(1, 512))
      ->type_name("N");
  perplexity_app->add_flag("--json", options->json, "Print one JSON object (docs/cli.md)");
  perplexity_app->callback([&invocation, options] {
    invocation.run = [&invocation, options] {
      settle_model(*options, invocation.store, "");
      return perplexity(*options);
    };
  });
}

}  // namespace torpor::cli
