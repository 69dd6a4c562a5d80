#include "model/weights.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <set>

#include <nlohmann/json.hpp>

#include "base/env.h"
#include "base/hash.h"
#include "base/safetensors.h"
#include "kernels/thread_pool.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

constexpr size_t kDigestPiece = size_t(8) << 20;

[[noreturn]] void damaged(const std::filesystem::path& path, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "'" + path.string() + "' is damaged: " + what + ".");
}

/// Files named in the index, else the one file a small model has.
std::vector<std::string> weight_files(const std::filesystem::path& dir) {
  const std::filesystem::path index = dir / "model.safetensors.index.json";
  if (!std::filesystem::exists(index)) {
    if (std::filesystem::exists(dir / "model.safetensors")) return {"model.safetensors"};
    throw Error(ErrorCode::kNotFound, dir.string() + " has no model.safetensors and no model.safetensors.index.json.");
  }
  std::set<std::string> names;
  try {
    std::ifstream in(index, std::ios::binary);
    const json parsed = json::parse(in);
    for (const auto& [tensor, file] : parsed.at("weight_map").items()) names.insert(file.get<std::string>());
  } catch (const json::exception&) {
    damaged(index, "it has no readable weight_map");
  }
  for (const std::string& name : names) {
    if (name.empty() || name.find('/') != std::string::npos) damaged(index, "it names the file \"" + name + "\"");
    if (!std::filesystem::exists(dir / name)) {
      throw Error(ErrorCode::kNotFound, dir.string() + " lacks " + name + ", which its index names.");
    }
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
  for (const std::string& name : weight_files(dir)) weights.add_file(dir / name);
  return weights;
}

void Weights::add_file(const std::filesystem::path& path) {
  const File file = Env::posix().open(path, OpenMode::kRead);
  const uint64_t size = file.stat().size;
  if (size == 0) damaged(path, "it is empty");
  std::shared_ptr<const std::byte> memory = file.map(size, MapFrom::kAnywhere);
  if (memory == nullptr) {
    throw Error(ErrorCode::kIo, "Can't map " + path.string() + " into memory; free some address space, or copy the model "
                                "to a local disk.");
  }
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
  files_.push_back(std::move(memory));
}

const TensorView* Weights::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

const TensorView& Weights::get(const std::string& name, const std::vector<int64_t>& shape) const {
  const TensorView* tensor = find(name);
  if (tensor == nullptr) throw Error(ErrorCode::kCorruption, "The weights in " + dir_.string() + " lack the tensor " + name + ".");
  if (tensor->shape != shape) {
    throw Error(ErrorCode::kCorruption, "The weights in " + dir_.string() + " have " + name + " with shape " +
                                            shape_text(tensor->shape) + " where the config asks for " + shape_text(shape) + ".");
  }
  return *tensor;
}

int64_t Weights::nbytes() const noexcept {
  int64_t total = 0;
  for (const auto& [name, tensor] : tensors_) total += int64_t(tensor.nbytes);
  return total;
}

std::string Weights::digest() const {
  // In pieces, so that one huge embedding does not keep a single core busy while the others idle.
  std::vector<std::span<const std::byte>> pieces;
  for (const auto& [name, tensor] : tensors_) {
    for (size_t at = 0; at < tensor.nbytes; at += kDigestPiece) {
      pieces.emplace_back(tensor.data + at, std::min(kDigestPiece, tensor.nbytes - at));
    }
  }
  std::vector<std::string> hashes(pieces.size());
  kernels::ThreadPool::shared().parallel_for(pieces.size(), [&](size_t i, int) {
    hashes[i] = hash_hex(pieces[i]);
    release(pieces[i].data(), pieces[i].size());
  });

  Hasher hasher;
  size_t piece = 0;
  for (const auto& [name, tensor] : tensors_) {
    hasher.update_field(name).update_field(tensor.dtype).update_field(shape_text(tensor.shape));
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
