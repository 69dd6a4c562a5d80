/// What lies in the caches of Hugging Face, LM Studio and Ollama, by its files' headers.

#include <algorithm>
#include <fstream>
#include <regex>
#include <set>

#include "base/environment.h"
#include "base/json.h"
#include "model/local_models.h"

namespace torpor {
namespace {

namespace fs = std::filesystem;

/// Names in a directory, sorted; none where there is no such directory.
std::vector<fs::path> entries(const fs::path& directory) {
  std::vector<fs::path> paths;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error))
    paths.push_back(it->path());
  std::ranges::sort(paths);
  return paths;
}

/// Of files, and of all in a directory. A file that has two names there counts once.
int64_t bytes_of(const fs::path& path) {
  std::error_code error;
  if (!fs::is_directory(path, error)) {
    const uintmax_t size = fs::file_size(path, error);
    return error ? 0 : int64_t(size);
  }
  int64_t bytes = 0;
  std::set<fs::path> seen;
  for (fs::recursive_directory_iterator it(path, error), end; !error && it != end; it.increment(error)) {
    std::error_code ignored;
    const fs::path real = fs::canonical(it->path(), ignored);
    if (!ignored && fs::is_regular_file(real, ignored) && seen.insert(real).second)
      bytes += int64_t(fs::file_size(real, ignored));
  }
  return bytes;
}

class Finder {
 public:
  std::vector<LocalModel> models;

  void hugging_face() {
    for (const fs::path& repo : entries(hub_cache())) {
      std::string name = repo.filename().string();
      if (!name.starts_with("models--")) continue;
      name.erase(0, std::string_view("models--").size());
      if (const size_t dashes = name.find("--"); dashes != std::string::npos) name.replace(dashes, 2, "/");
      if (const fs::path snapshot = hub_snapshot(repo); !snapshot.empty())
        add_directory("Hugging Face", name, snapshot, name + ":");
    }
  }
  void lm_studio() {
    for (const char* root : {"~/.lmstudio/models", "~/.cache/lm-studio/models"}) {
      for (const fs::path& owner : entries(expand_home(root))) {
        for (const fs::path& model : entries(owner))
          add_directory("LM Studio", model.string(), model, model.string() + "/");
      }
    }
  }
  /// Manifests name blobs, of which one is a GGUF file.
  void ollama() {
    const std::string given = environment("OLLAMA_MODELS");
    const fs::path root = given.empty() ? fs::path(expand_home("~/.ollama/models")) : fs::path(given);
    std::error_code error;
    for (fs::recursive_directory_iterator it(root / "manifests", error), end; !error && it != end;
         it.increment(error)) {
      std::error_code ignored;
      if (!it->is_regular_file(ignored)) continue;
      std::ifstream in(it->path());
      const std::string said(std::istreambuf_iterator<char>(in), {});
      const auto manifest = parse_json<nlohmann::json>(said, nullptr, false);
      if (!manifest.is_object() || !manifest.value("layers", nlohmann::json()).is_array()) continue;
      for (const auto& layer : manifest["layers"]) {
        std::string blob = text(layer, "digest");
        if (text(layer, "mediaType") != "application/vnd.ollama.image.model") continue;
        if (const size_t colon = blob.find(':'); colon != std::string::npos) blob[colon] = '-';
        if (blob.empty() || blob.find('/') != std::string::npos) continue;
        const fs::path path = root / "blobs" / blob;
        add("Ollama " + it->path().parent_path().filename().string() + ":" + it->path().filename().string(),
            path.string(), path);
      }
    }
  }

 private:
  static std::string text(const nlohmann::json& object, const char* key) {
    const auto found = object.is_object() ? object.find(key) : object.end();
    return object.is_object() && found != object.end() && found->is_string() ? found->get<std::string>() : "";
  }
  /// The digits of a piece: "m-00002-of-00003.gguf" gives "00002"; empty for a file that is no piece.
  static std::string piece_of(const std::string& file) {
    static const std::regex pattern(".*-([0-9]{5})-of-[0-9]{5}\\.gguf");
    std::smatch match;
    return std::regex_match(file, match, pattern) ? match[1].str() : "";
  }
  /// A model of safetensors, and each GGUF file; the first of those that a model is split into stands for all.
  void add_directory(const std::string& place, const std::string& name, const fs::path& directory,
                     const std::string& prefix) {
    std::vector<fs::path> files;
    std::error_code error;
    for (fs::recursive_directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
      const std::string file = it->path().filename().string();
      if (file.ends_with(".gguf") && !file.starts_with("mmproj")) files.push_back(it->path());
    }
    std::ranges::sort(files);
    // Files beside a config.json are often its GGUF versions alone.
    const auto has_safetensors = [&] {
      return std::ranges::any_of(entries(directory),
                                 [](const fs::path& path) { return path.extension() == ".safetensors"; });
    };
    if (fs::exists(directory / "config.json", error) && (files.empty() || has_safetensors()))
      add(place, name, directory);
    for (const fs::path& file : files) {
      const std::string piece = piece_of(file.filename().string());
      if (!piece.empty() && piece != "00001") continue;
      const std::string stem = file.filename().string().substr(0, file.filename().string().find("-00001-of-"));
      LocalModel& added = add(place, prefix + file.lexically_relative(directory).string(), file);
      for (const fs::path& other : files) {
        const bool of_it = !piece.empty() && other != file && other.parent_path() == file.parent_path() &&
                           !piece_of(other.filename().string()).empty() &&
                           other.filename().string().starts_with(stem + "-");
        if (of_it) added.bytes += bytes_of(other);
      }
    }
  }
  LocalModel& add(const std::string& place, const std::string& name, const fs::path& path) {
    LocalModel found{.name = name, .place = place, .path = path, .bytes = bytes_of(path)};
    describe_headers(found);
    models.push_back(std::move(found));
    return models.back();
  }
};

}  // namespace

fs::path hub_home() {
  const auto expanded = [](const std::string& path) { return fs::path(expand_variables(expand_home(path))); };
  if (const std::string home = environment("HF_HOME"); !home.empty()) return expanded(home);
  if (const std::string cache = environment("XDG_CACHE_HOME"); !cache.empty()) return expanded(cache) / "huggingface";
  return fs::path(home_directory()) / ".cache/huggingface";
}

fs::path hub_cache() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (const std::string cache = environment(name); !cache.empty()) return expand_variables(expand_home(cache));
  }
  return hub_home() / "hub";
}

fs::path hub_snapshot(const fs::path& repo) {
  std::string revision;
  std::ifstream(repo / "refs/main") >> revision;
  if (revision.empty() || revision.find('/') != std::string::npos || revision.front() == '.') return {};
  std::error_code ignored;
  fs::path snapshot = repo / "snapshots" / revision;
  return fs::is_directory(snapshot, ignored) ? snapshot : fs::path();
}

std::vector<LocalModel> find_local_models() {
  Finder finder;
  finder.hugging_face();
  finder.lm_studio();
  finder.ollama();
  return std::move(finder.models);
}

}  // namespace torpor
