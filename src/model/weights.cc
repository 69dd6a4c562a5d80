#include "model/weights.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "base/env.h"
#include "base/gguf.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/model_file.h"
#include "base/parallel.h"
#include "base/safetensors.h"
#include "model/gguf_names.h"
#include "model/known_digests.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

constexpr size_t kDigestPiece = size_t(8) << 20;

[[noreturn]] void damaged(const std::filesystem::path& path, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "'" + path.string() + "' is damaged: " + what + ".");
}

/// All model*.safetensors, as mlx-lm takes them; a file of a numbered set without the others is an error.
std::vector<std::string> files_without_index(const std::filesystem::path& dir) {
  std::set<std::string> names;
  std::string others;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("model") && name.ends_with(".safetensors")) names.insert(name);
    if (name.ends_with(".bin") || name.ends_with(".gguf") || name.ends_with(".npz")) others = name;
  }
  if (names.contains("model.safetensors")) return {"model.safetensors"};
  if (names.empty()) {
    const std::string what_to_do =
        others.empty()              ? "; fetch the model again."
        : others.ends_with(".gguf") ? "; name the file " + others + " in it as the model."
                                    : ", and " + others +
                                          " is not read; convert the model to safetensors (mlx_lm.convert), or fetch a "
                                          "repository that has them.";
    throw Error(ErrorCode::kNotFound, dir.string() + " has no model*.safetensors" + what_to_do);
  }
  for (const std::string& name : names) {
    int at = 0, of = 0;
    if (std::sscanf(name.c_str(), "model-%d-of-%d.safetensors", &at, &of) == 2 && size_t(of) != names.size()) {
      throw Error(ErrorCode::kNotFound, dir.string() + " has " + std::to_string(names.size()) +
                                            " files of weights, and the name of " + name + " says that there are " +
                                            std::to_string(of) + "; fetch the model again.");
    }
  }
  return {names.begin(), names.end()};
}

std::vector<std::string> weight_files(const std::filesystem::path& dir) {
  const std::filesystem::path index = dir / "model.safetensors.index.json";
  if (!std::filesystem::exists(index)) return files_without_index(dir);
  std::set<std::string> names;
  std::ifstream in(index, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  refuse_lfs_pointer(text.str(), index);
  try {
    const json parsed = parse_json<json>(plain_json(text.str()));
    for (const auto& [tensor, file] : parsed.at("weight_map").items()) names.insert(file.get<std::string>());
  } catch (const json::exception&) {
    damaged(index, "it has no readable weight_map");
  }
  std::vector<std::string> missing;
  for (const std::string& name : names) {
    if (name.empty() || name.find('/') != std::string::npos) damaged(index, "it names the file \"" + name + "\"");
    if (!std::filesystem::exists(dir / name)) missing.push_back(name);
  }
  // Converters leave the index of the model that they began with: of no file here.
  if (missing.size() == names.size()) return files_without_index(dir);
  if (!missing.empty()) {
    throw Error(ErrorCode::kNotFound,
                dir.string() + " lacks " + missing.front() + ", which its index names" +
                    (missing.size() > 1 ? ", and " + std::to_string(missing.size() - 1) + " more" : "") +
                    "; fetch the model again.");
  }
  return {names.begin(), names.end()};
}

/// Whole pages of [data, data + size).
void release(const std::byte* data, size_t size) {
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace

void release_pages(const TensorView& tensor) { release(tensor.data, tensor.nbytes); }

Weights Weights::open(const std::filesystem::path& dir) {
  Weights weights;
  weights.dir_ = dir;
  if (is_gguf(dir)) {
    weights.add_gguf(dir);
    return weights;
  }
  for (const std::string& name : weight_files(dir)) weights.add_file(dir / name);
  return weights;
}

void Weights::add_file(const std::filesystem::path& path) {
  const File file = Env::posix().open(path, OpenMode::kRead);
  const uint64_t size = file.stat().size;
  if (size == 0) damaged(path, "it is empty");
  std::shared_ptr<const std::byte> memory = file.map(size, MapFrom::kAnywhere);
  if (memory == nullptr) {
    throw Error(ErrorCode::kIo, "Can't map " + path.string() +
                                    " into memory; free some address space, or copy the model "
                                    "to a local disk.");
  }
  refuse_lfs_pointer({reinterpret_cast<const char*>(memory.get()), size_t(std::min<uint64_t>(size, 128))}, path);
  const SafetensorsHeader header = parse_safetensors_header({memory.get(), size}, size, path.string());
  for (const SafetensorsTensor& entry : header.tensors) {
    TensorView tensor;
    tensor.name = entry.name;
    tensor.dtype = entry.dtype;
    tensor.shape.assign(entry.shape.begin(), entry.shape.end());
    tensor.data = memory.get() + header.data_start + entry.begin;
    tensor.nbytes = entry.size();
    if (!tensors_.emplace(entry.name, std::move(tensor)).second) {
      damaged(path, "tensor " + entry.name + " is in another file too");
    }
  }
  paths_.push_back(path);
  files_.push_back(std::move(memory));
}

void Weights::add_gguf(const std::filesystem::path& path) {
  const GgufModel model = GgufModel::open(path);
  for (const GgufFile& piece : model.pieces()) {
    for (const GgufTensor& entry : piece.tensors()) {
      TensorView tensor{.name = entry.name, .dtype = entry.type->name, .shape = entry.shape, .data = entry.data.data(),
                        .nbytes = entry.data.size()};
      tensors_.emplace(gguf_tensor_name(model.metadata(), entry.name).value_or(entry.name), std::move(tensor));
    }
  }
  files_ = model.memory();
  paths_ = model.paths();
}

void Weights::find_layers_as(const std::string& prefix) {
  // transformers from 4.52 on, mlx-lm and older transformers, text models; and Nemotron-H.
  for (const std::string own :
       {prefix.c_str(), "model.language_model.", "language_model.model.", "model.", "backbone."}) {
    if (find(own + "embed_tokens.weight") == nullptr && find(own + "embeddings.weight") == nullptr) continue;
    asked_prefix_ = prefix;
    own_prefix_ = own;
    return;
  }
}

const TensorView* Weights::find(const std::string& name) const {
  auto it = tensors_.find(name);
  if (it == tensors_.end() && asked_prefix_ != own_prefix_) {
    // "language_model.model.norm.weight" is "model.language_model.norm.weight". The head stands beside the layers.
    const std::string beside = asked_prefix_.substr(0, asked_prefix_.size() - std::string_view("model.").size());
    if (name.starts_with(asked_prefix_)) {
      it = tensors_.find(own_prefix_ + name.substr(asked_prefix_.size()));
    } else if (name.starts_with(beside + "lm_head.")) {
      const std::string head = name.substr(beside.size());
      it = tensors_.find(own_prefix_ == "language_model.model." ? "language_model." + head : head);
    }
  }
  return it == tensors_.end() ? nullptr : &it->second;
}

const TensorView& Weights::get(const std::string& name, const std::vector<int64_t>& shape) const {
  const TensorView* tensor = find(name);
  if (tensor == nullptr)
    throw Error(ErrorCode::kCorruption, "The weights in " + dir_.string() + " lack the tensor " + name + ".");
  if (tensor->shape != shape) {
    throw Error(ErrorCode::kCorruption, "The weights in " + dir_.string() + " have " + name + " with shape " +
                                            shape_text(tensor->shape) + " where the config asks for " +
                                            shape_text(shape) + ".");
  }
  return *tensor;
}

bool Weights::has_blocks() const {
  return std::ranges::any_of(tensors_, [](const auto& entry) {
    const GgmlTypeInfo* type = find_ggml_type(entry.second.dtype);
    return type != nullptr && type->columns > 1;
  });
}

int64_t Weights::nbytes() const noexcept {
  int64_t total = 0;
  for (const auto& [name, tensor] : tensors_) total += int64_t(tensor.nbytes);
  return total;
}

std::string Weights::digest() const {
  return digest_of_files(paths_, [this] { return compute_digest(); });
}

std::string Weights::compute_digest() const {
  // In pieces, so that one huge embedding does not keep a single core busy while the others idle.
  std::vector<std::span<const std::byte>> pieces;
  for (const auto& [name, tensor] : tensors_) {
    for (size_t at = 0; at < tensor.nbytes; at += kDigestPiece) {
      pieces.emplace_back(tensor.data + at, std::min(kDigestPiece, tensor.nbytes - at));
    }
  }
  std::vector<std::string> hashes(pieces.size());
  parallel_for(pieces.size(), reader_threads(), [&](size_t i) {
    hashes[i] = hash_hex(pieces[i]);
    release(pieces[i].data(), pieces[i].size());
  });

  Hasher hasher;
  size_t piece = 0;
  for (const auto& [name, tensor] : tensors_) {
    hasher.update_field(tensor.name).update_field(tensor.dtype).update_field(shape_text(tensor.shape));
    for (size_t at = 0; at < tensor.nbytes; at += kDigestPiece) hasher.update_field(hashes[piece++]);
  }
  return hasher.hex();
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace torpor::model
