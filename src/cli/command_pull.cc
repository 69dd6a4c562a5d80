/// pull: a model from the Hugging Face Hub, into huggingface_hub's own cache.

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <sstream>

#include <CLI/CLI.hpp>

#include "base/environment.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "cli/text_input.h"
#include "model/local_models.h"
#include "torpor_hub_shim.h"

namespace torpor::cli {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct PullOptions {
  std::string name, revision = "main";
  bool json = false;
};

/// What huggingface_hub would send, by its own rules; empty: nothing. kInvalidArgument for what can't be sent.
std::string hub_token() {
  std::string token, place;
  for (const char* name : {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}) {
    if (token.empty()) std::istringstream(environment(name)) >> token;
    if (place.empty() && !token.empty()) place = name;
  }
  if (token.empty()) {
    const std::string given = environment("HF_TOKEN_PATH");
    const fs::path path = given.empty() ? hub_home() / "token" : fs::path(expand_variables(expand_home(given)));
    std::ifstream(path) >> token;
    place = path.string();
  }
  if (!std::ranges::all_of(token, [](char c) { return c > ' ' && c <= '~'; })) {
    throw Error(ErrorCode::kInvalidArgument,
                "the token in " + place + " has characters that no token of the Hub has; copy it there once more");
  }
  return token;
}

bool is_set(const char* name) {
  std::string value = environment(name);
  for (char& c : value) c = char(std::toupper(static_cast<unsigned char>(c)));
  return value == "1" || value == "ON" || value == "YES" || value == "TRUE";
}

/// A line on a terminal, drawn anew a few times a second and wiped in the end.
class Meter {
 public:
  ~Meter() {
    if (drawn_) std::fputs("\r\033[K", stderr);
  }
  void update(std::string_view file, int64_t done, int64_t total) {
    const auto now = Clock::now();
    if (first_ < 0) first_ = done;
    if (!terminal_ || now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    drawn_ = true;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const auto rate = int64_t(seconds > 0 ? double(done - first_) / seconds : 0);
    std::fprintf(stderr, "\r%s of %s, %s/s, %s\033[K", human_bytes(done).c_str(), human_bytes(total).c_str(),
                 human_bytes(rate).c_str(), printable_name(file).c_str());
    std::fflush(stderr);
  }

 private:
  const bool terminal_ = isatty(STDERR_FILENO) != 0;
  const Clock::time_point start_ = Clock::now();
  Clock::time_point last_{};
  int64_t first_ = -1;  ///< bytes that an earlier process fetched
  bool drawn_ = false;
};

void show_progress(void* meter, const char* file, size_t file_size, uint64_t done, uint64_t total) {
  static_cast<Meter*>(meter)->update({file, file_size}, int64_t(done), int64_t(total));
}

/// Text of the shim's.
std::string taken(torpor_text_bytes bytes) {
  std::string text = bytes.data ? std::string(bytes.data, bytes.size) : std::string();
  torpor_text_bytes_free(bytes);
  return text;
}

ErrorCode code_of(torpor_text_status status) {
  switch (status) {
    case TORPOR_TEXT_INVALID: return ErrorCode::kInvalidArgument;
    case TORPOR_HUB_NOT_FOUND: return ErrorCode::kNotFound;
    case TORPOR_HUB_FAILED: return ErrorCode::kIo;
    case TORPOR_HUB_CORRUPT: return ErrorCode::kCorruption;
    default: return ErrorCode::kInternal;
  }
}

int pull(const PullOptions& options) {
  const size_t colon = options.name.find(':');
  const std::string repo = options.name.substr(0, colon);
  const std::string file = colon == std::string::npos ? "" : options.name.substr(colon + 1);
  if (is_set("HF_HUB_OFFLINE")) {
    throw Error(ErrorCode::kIo, "can't fetch " + repo + ": HF_HUB_OFFLINE is set; unset it");
  }
  check_text(options.name, "the model's name");
  check_text(options.revision, "the revision");
  check_text(hub_cache().string(), "the path of the Hugging Face cache");
  const std::string endpoint = environment("HF_ENDPOINT");
  check_text(endpoint, "HF_ENDPOINT");
  const std::string described = dump_json(Json{{"endpoint", endpoint.empty() ? "https://huggingface.co" : endpoint},
                                               {"token", hub_token()},
                                               {"cache", hub_cache().string()},
                                               {"repo", repo},
                                               {"file", file},
                                               {"revision", options.revision}});
  torpor_text_bytes report{}, error{};
  torpor_text_status status = TORPOR_TEXT_OK;
  {
    Meter meter;
    status = torpor_hub_pull(described.data(), described.size(), show_progress, &meter, &report, &error);
  }
  if (status != TORPOR_TEXT_OK) throw Error(code_of(status), "can't fetch " + repo + ": " + taken(error));
  const Json done = parse_json<Json>(taken(report));
  if (options.json) {
    Json printed{{"model", options.name}};
    printed.update(done);
    print_json(printed);
    return 0;
  }
  // --model finds no other revision by the model's name.
  const fs::path snapshot = done.at("snapshot").get<std::string>();
  const fs::path own = file.empty() ? snapshot : snapshot / file;
  const std::string model = options.revision == "main" ? options.name : own.string();
  const int64_t came = done.at("downloaded"), bytes = done.at("bytes");
  print(options.name + " is here: " + std::to_string(done.at("files").get<int64_t>()) + " files, " +
        human_bytes(bytes) + (came == bytes ? "" : ", of which " + human_bytes(came) + " came now") +
        "\n  torpor chat --model " + shell_word(model) + " --agent ada\n");
  return 0;
}

}  // namespace

void add_pull_command(CLI::App& app, Invocation& invocation) {
  const auto options = std::make_shared<PullOptions>();
  CLI::App* command = app.add_subcommand("pull", "Fetch a model from the Hugging Face Hub into its local cache");
  command->add_option("NAME", options->name, "ORG/NAME, or ORG/NAME:FILE for a GGUF file")->required()->type_name("");
  command->add_option("--revision", options->revision, "A branch, tag or commit (default: main, which --model takes)")
      ->type_name("R");
  command->add_flag("--json", options->json, "Print a JSON object");
  command->callback([&invocation, options] { invocation.run = [options] { return pull(*options); }; });
}

}  // namespace torpor::cli
