#pragma once
/// The tensors of a checkpoint, mapped from one or many files, safetensors or GGUF, and checked against their headers.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace torpor::model {

struct TensorView {
  std::string name;
  std::string dtype;  ///< as safetensors writes it: "F32", "F16", "BF16", "U32", ...; of GGUF's blocks: "Q4_K", ...
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  ///< where its file is mapped, aligned to nothing; lives as long as the Weights
  size_t nbytes = 0;
};

/// Lets go of the memory of a tensor's pages: reading it again reads the file. What is packed need not be held twice.
void release_pages(const TensorView& tensor);

class Weights {
 public:
  /// The files that the index names, or all `model*.safetensors` where there is none or it is of other files. kNotFound when `dir`
  /// has no safetensors or only some of the files, kCorruption naming the damaged file, kIo.
  /// Or those of the GGUF file `dir`, by their names in Hugging Face's files.
  static Weights open(const std::filesystem::path& dir);

  /// Names that begin with `prefix` ("language_model.model.") find the text model's tensors, whatever a writer put before their
  /// names. The digest is over the names in the files.
  void find_layers_as(const std::string& prefix);
  /// nullptr when there is none of that name.
  const TensorView* find(const std::string& name) const;
  /// kCorruption naming the tensor when it is missing or has another shape.
  const TensorView& get(const std::string& name, const std::vector<int64_t>& shape) const;

  /// Some tensor is of GGUF's blocks.
  bool has_blocks() const;
  int64_t nbytes() const noexcept;
  /// Those that were opened.
  const std::vector<std::filesystem::path>& files() const noexcept { return paths_; }
  /// Over the names, dtypes, shapes and bytes of all tensors; independent of how they are spread over files. Reads
  /// everything, unless the digest of these files is known (digest_of_files).
  std::string digest() const;
  /// The same, and reads everything.
  std::string compute_digest() const;

 private:
  void add_file(const std::filesystem::path& path);
  void add_gguf(const std::filesystem::path& path);

  std::filesystem::path dir_;
  std::vector<std::filesystem::path> paths_;
  std::vector<std::shared_ptr<const std::byte>> files_;  // mapped whole
  std::map<std::string, TensorView> tensors_;
  std::string asked_prefix_, own_prefix_;  // of the layers; equal unless find_layers_as found others
};

/// "[576, 72]".
std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace torpor::model
