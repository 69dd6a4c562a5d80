/// models and setup: what lies in the local caches, what of it runs here, and how.

#include <algorithm>
#include <functional>

#include <CLI/CLI.hpp>

#include "base/large_pages.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "cli/text_input.h"
#include "torpor/error.h"
#include "torpor/model_info.h"

namespace torpor::cli {
namespace {

#ifdef TORPOR_REMOTE
const std::string kFetch = "torpor pull ORG/NAME";
#else
const std::string kFetch = "hf download ORG/NAME";
#endif

/// Of the formats that people choose between: their bytes for a token, and how many tokens the memory holds beside the
/// weights.
struct Format {
  std::string name;
  int64_t bytes_per_token = 0, tokens = 0;
};

std::vector<Format> formats_of(const LocalModel& model, int64_t memory) {
  std::vector<Format> formats;
  const int64_t left = std::max<int64_t>(0, memory - model.info.weight_bytes - model.state_bytes);
  for (const KvBits bits : {KvBits(0), KvBits(8), KvBits(8, 4), KvBits(4)}) {
    const KvFormat format = bits == KvBits(0) ? model.kv_format : KvFormat(KvDtype::kF16, bits);
    try {
      const int64_t bytes = int64_t(model.kv_layout(format).bytes_per_token());
      formats.push_back({format.name(), bytes, bytes > 0 ? left / bytes : 0});
    } catch (const Error&) {
      // Its heads can't be quantized so.
    }
  }
  return formats;
}

int list_models(bool json) {
  const auto memory = int64_t(available_memory());
  const std::vector<LocalModel> models = find_local_models();
  if (json) {
    Json list = Json::array();
    for (const LocalModel& model : models) {
      Json entry{{"model", model.name},
                 {"place", model.place},
                 {"path", model.path.string()},
                 {"bytes", model.bytes},
                 {"runs", model.problem.empty()}};
      if (!model.problem.empty()) {
        entry["problem"] = model.problem;
        list.push_back(std::move(entry));
        continue;
      }
      entry["family"] = model.info.architecture;
      entry["context"] = model.info.max_context;
      entry["weight_bytes"] = model.info.weight_bytes;
      entry["state_bytes"] = model.state_bytes;
      Json formats = Json::array();
      for (const Format& format : formats_of(model, memory)) {
        formats.push_back(
            {{"kv", format.name}, {"bytes_per_token", format.bytes_per_token}, {"tokens_in_memory", format.tokens}});
      }
      entry["kv_formats"] = std::move(formats);
      list.push_back(std::move(entry));
    }
    print_json(Json{{"available_memory", memory}, {"models", std::move(list)}});
    return 0;
  }
  if (models.empty()) {
    print("no models in the caches of Hugging Face, LM Studio or Ollama; fetch one with `" + kFetch + "`\n");
    return 0;
  }
  std::vector<std::vector<std::string>> rows{
      {"MODEL", "SIZE", "FAMILY", "CONTEXT", "KV/TOKEN", "FITS", "4 BITS", "FITS"}};
  std::string others;
  for (const LocalModel& model : models) {
    const std::string name = model.place.starts_with("Ollama ") ? model.place + " (" + model.name + ")" : model.name;
    if (!model.problem.empty()) {
      others += printable_name(name) + ": " + model.problem + "\n";
      continue;
    }
    const std::vector<Format> formats = formats_of(model, memory);
    const auto bytes = [&](size_t i) {
      return formats[i].bytes_per_token == 0 ? "-" : human_bytes(formats[i].bytes_per_token);
    };
    const auto tokens = [&](size_t i) {
      return std::to_string(std::min<int64_t>(formats[i].tokens, model.info.max_context));
    };
    const bool quantizes = formats.back().name != formats.front().name;
    rows.push_back({name, human_bytes(model.bytes), model.info.architecture, std::to_string(model.info.max_context),
                    bytes(0), tokens(0), quantizes ? bytes(formats.size() - 1) : "-",
                    quantizes ? tokens(formats.size() - 1) : "-"});
  }
  std::string text = rows.size() > 1 ? table(rows, {false, true, false, true, true, true, true, true}) : "";
  if (!others.empty()) text += (text.empty() ? "" : "\n") + std::string("not run here:\n") + others;
  print(text);
  return 0;
}

/// How a model goes with the memory that is available now.
struct Fit {
  const LocalModel* model = nullptr;
  std::string options;  ///< beside --model: empty, or what makes the rows small enough
  int64_t tokens = 0;   ///< that fit, up to the context
};

/// So many tokens at least are a conversation.
constexpr int64_t kFewTokens = 4096;

/// With the model's own format if that leaves room for a conversation, else with the format that holds most.
Fit fit_of(const LocalModel& model, int64_t memory) {
  Fit fit{.model = &model};
  const int64_t context = model.info.max_context, enough = std::min(kFewTokens, context);
  const std::vector<Format> formats = formats_of(model, memory);
  if (formats.empty() || memory < model.info.weight_bytes + model.state_bytes) return fit;
  const auto held = [&](const Format& format) {
    return format.bytes_per_token == 0 ? context : std::min(format.tokens, context);
  };
  if (held(formats.front()) >= enough || formats.size() == 1) {
    fit.tokens = held(formats.front());
  } else {
    fit.tokens = held(formats.back());
    fit.options = " --kv-bits 4";
  }
  if (fit.tokens < enough) fit.tokens = 0;
  return fit;
}

std::string command_of(const Fit& fit) {
  return "torpor chat --model " + shell_word(fit.model->name) + fit.options + " --agent ada";
}

/// The largest first: of models that fit it is most likely the best.
int set_up(bool json) {
  const auto memory = int64_t(available_memory());
  const std::vector<LocalModel> models = find_local_models();
  std::vector<Fit> fitting, large;
  size_t others = 0;
  for (const LocalModel& model : models) {
    if (!model.problem.empty()) {
      ++others;
      continue;
    }
    const Fit fit = fit_of(model, memory);
    (fit.tokens > 0 ? fitting : large).push_back(fit);
  }
  for (auto* list : {&fitting, &large}) {
    std::ranges::stable_sort(*list, std::greater(), [](const Fit& fit) { return fit.model->info.weight_bytes; });
  }
  if (json) {
    const auto names = [](const std::vector<Fit>& fits) {
      Json list = Json::array();
      for (const Fit& fit : fits) {
        Json one{{"model", fit.model->name},
                 {"place", fit.model->place},
                 {"weight_bytes", fit.model->info.weight_bytes}};
        if (fit.tokens > 0) one.update({{"tokens", fit.tokens}, {"command", command_of(fit)}});
        list.push_back(std::move(one));
      }
      return list;
    };
    print_json(Json{{"available_memory", memory},
                    {"fits", names(fitting)},
                    {"too_large", names(large)},
                    {"not_run", others}});
    return 0;
  }
  std::string text = human_bytes(memory) + " of memory are available.\n";
  const auto title = [](const LocalModel& model) {
    return "\n  " + printable_name(model.name) + " (" + model.place + ", " + human_bytes(model.bytes);
  };
  if (!fitting.empty()) text += "\nThese models fit, each with room for so many tokens:\n";
  for (const Fit& fit : fitting) {
    text += title(*fit.model) + ", " + std::to_string(fit.tokens) + " tokens)\n    " +
            printable_name(command_of(fit)) + "\n";
  }
  if (!large.empty()) text += "\nThese need more memory than there is:\n";
  for (const Fit& fit : large) text += title(*fit.model) + ")\n";
  if (others > 0) text += "\n" + std::to_string(others) + " more can't be run here; `torpor models` says why.\n";
  if (fitting.empty()) {
    text += "\nNone of the caches of Hugging Face, LM Studio and Ollama has a model that fits. Fetch one of at most " +
            human_bytes(std::max<int64_t>(0, memory - (int64_t(1) << 30))) + ":\n\n  " + kFetch + "\n";
  } else {
    text += "\nTo leave out --model from now on: export TORPOR_MODEL=" +
            printable_name(shell_word(fitting.front().model->name)) + "\n";
  }
  print(text);
  return 0;
}

}  // namespace

void add_models_command(CLI::App& app, Invocation& invocation) {
  const auto json = std::make_shared<bool>(false);
  CLI::App* models =
      app.add_subcommand("models", "List the models in the local caches: what runs here, and how many tokens fit");
  models->add_flag("--json", *json, "Print a JSON object");
  models->callback([&invocation, json] { invocation.run = [json] { return list_models(*json); }; });
  CLI::App* setup =
      app.add_subcommand("setup", "Say which models in the local caches fit this machine, and how to run each");
  setup->add_flag("--json", *json, "Print a JSON object");
  setup->callback([&invocation, json] { invocation.run = [json] { return set_up(*json); }; });
}

}  // namespace torpor::cli
