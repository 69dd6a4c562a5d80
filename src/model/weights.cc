#include "model/weights.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>

#include <nlohmann/json.hpp>

#include "base/hash.h"
#include "kernels/thread_pool.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

using nlohmann::json;

constexpr size_t kMaxHeader = 100'000'000;  // the limit of Hugging Face's reader
constexpr size_t kDigestPiece = size_t(8) << 20;

[[noreturn]] void damaged(const std::filesystem::path& path, const std::string& what) {
  throw Error(ErrorCode::kCorruption, "The weights file " + path.string() + " is damaged: " + what + ".");
}

/// Bytes of one element, 0 for a dtype that safetensors does not have.
size_t element_size(const std::string& dtype) {
  static const std::map<std::string, size_t> kSizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}, {"U16", 2}, {"I16", 2},
      {"F16", 2},  {"BF16", 2}, {"U32", 4}, {"I32", 4},     {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8}};
  const auto it = kSizes.find(dtype);
  return it == kSizes.end() ? 0 : it->second;
}

/// The tensors a header lists, in file order, `data` still to be set from `begin`.
struct HeaderEntry {
  TensorView tensor;
  size_t begin = 0;
};

std::vector<HeaderEntry> parse_header(std::string_view text, size_t data_size, const std::filesystem::path& path) {
  std::vector<HeaderEntry> entries;
  try {
    const json header = json::parse(text);
    if (!header.is_object()) damaged(path, "its header is not a JSON object");
    for (const auto& [name, spec] : header.items()) {
      if (name == "__metadata__") continue;
      HeaderEntry entry;
      entry.tensor.name = name;
      entry.tensor.dtype = spec.at("dtype").get<std::string>();
      const size_t element = element_size(entry.tensor.dtype);
      if (element == 0) damaged(path, "tensor " + name + " has the unknown dtype " + entry.tensor.dtype);
      size_t nbytes = element;
      for (const json& dim : spec.at("shape")) {
        const uint64_t size = dim.is_number_unsigned() ? dim.get<uint64_t>() : uint64_t(-1);
        if (size > data_size || (size != 0 && nbytes > data_size / size)) {
          damaged(path, "tensor " + name + " is larger than the file");
        }
        nbytes *= size;
        entry.tensor.shape.push_back(int64_t(size));
      }
      const json& offsets = spec.at("data_offsets");
      if (offsets.size() != 2 || !offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) {
        damaged(path, "the offsets of tensor " + name + " are no pair of numbers");
      }
      const auto begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
      if (begin > end || end > data_size) damaged(path, "tensor " + name + " reaches beyond the end of the file");
      if (end - begin != nbytes) damaged(path, "the size of tensor " + name + " does not fit its shape");
      entry.begin = begin;
      entry.tensor.nbytes = nbytes;
      entries.push_back(std::move(entry));
    }
  } catch (const json::exception&) {
    damaged(path, "its header is not what safetensors writes");
  }
  std::ranges::sort(entries, {}, [](const HeaderEntry& e) { return std::pair(e.begin, e.tensor.nbytes); });
  size_t expected = 0;
  for (const HeaderEntry& entry : entries) {
    if (entry.begin != expected) damaged(path, "tensor " + entry.tensor.name + " does not start where the one before it ends");
    expected += entry.tensor.nbytes;
  }
  if (expected != data_size) {
    damaged(path, "its tensors have " + std::to_string(expected) + " bytes, the file " + std::to_string(data_size));
  }
  return entries;
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

}  // namespace

/// A whole file, read-only.
class Weights::MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw Error(ErrorCode::kIo, "Can't read " + path.string() + ": " + std::strerror(errno) + ".");
    struct stat info {};
    if (::fstat(fd, &info) == 0) size_ = size_t(info.st_size);
    if (size_ > 0) data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    ::close(fd);
    if (data_ == MAP_FAILED) throw Error(ErrorCode::kIo, "Can't map " + path.string() + ": " + std::strerror(error) + ".");
  }
  ~MappedFile() {
    if (data_ != nullptr && data_ != MAP_FAILED) ::munmap(data_, size_);
  }
  MappedFile(const MappedFile&) = delete;

  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

Weights::Weights() = default;
Weights::Weights(Weights&&) noexcept = default;
Weights::~Weights() = default;

Weights Weights::open(const std::filesystem::path& dir) {
  Weights weights;
  weights.dir_ = dir;
  for (const std::string& name : weight_files(dir)) weights.add_file(dir / name);
  return weights;
}

void Weights::add_file(const std::filesystem::path& path) {
  auto file = std::make_unique<MappedFile>(path);
  if (file->size() < 8) damaged(path, "it is shorter than a header");
  uint64_t header_size = 0;
  for (int i = 0; i < 8; ++i) header_size |= uint64_t(file->data()[i]) << (8 * i);
  if (header_size > std::min(kMaxHeader, file->size() - 8)) damaged(path, "its header reaches beyond the end of the file");
  const std::string_view header(reinterpret_cast<const char*>(file->data()) + 8, header_size);
  const std::byte* data = file->data() + 8 + header_size;

  for (HeaderEntry& entry : parse_header(header, file->size() - 8 - header_size, path)) {
    TensorView& tensor = entry.tensor;
    tensor.data = data + entry.begin;
    if (reinterpret_cast<uintptr_t>(tensor.data) % element_size(tensor.dtype) != 0) {
      copies_.push_back(std::make_unique_for_overwrite<std::byte[]>(tensor.nbytes));
      std::memcpy(copies_.back().get(), tensor.data, tensor.nbytes);
      tensor.data = copies_.back().get();
    }
    const std::string name = tensor.name;
    if (!tensors_.emplace(name, std::move(tensor)).second) damaged(path, "tensor " + name + " is in another file too");
  }
  files_.push_back(std::move(file));
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
  kernels::ThreadPool::shared().parallel_for(pieces.size(), [&](size_t i, int) { hashes[i] = hash_hex(pieces[i]); });

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
