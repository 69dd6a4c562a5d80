/// models: what lies in the local caches, and what of it runs here.

#include <algorithm>

#include <CLI/CLI.hpp>

#include "base/large_pages.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "torpor/error.h"
#include "torpor/model_info.h"

namespace torpor::cli {
namespace {

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
    print("no models in the caches of Hugging Face, LM Studio or Ollama; fetch one with `hf download ORG/NAME`\n");
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

}  // namespace

void add_models_command(CLI::App& app, Invocation& invocation) {
  const auto json = std::make_shared<bool>(false);
  CLI::App* models =
      app.add_subcommand("models", "List the models in the local caches: what runs here, and how many tokens fit");
  models->add_flag("--json", *json, "Print a JSON object");
  models->callback([&invocation, json] { invocation.run = [json] { return list_models(*json); }; });
}

}  // namespace torpor::cli
