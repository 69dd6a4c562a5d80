#pragma once
/// Where the models and goldens are, and a cache to run a model's forward pass with.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include <mlx/mlx.h>

#include "base/json.h"
#include "torpor/model.h"

namespace torpor {

namespace fs = std::filesystem;
using nlohmann::json;

inline const fs::path kSource = TORPOR_SOURCE_DIR;
inline const fs::path kGoldens = kSource / "tests/goldens/model";

inline json read_json(const fs::path& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("no " + path.string());
  return json::parse(in);
}

/// The least a cache has to do, for both backends.
class TestCache : public KvAccess {
 public:
  TestCache(const Model& model, KvDtype dtype)
      : format_(dtype), layout_(model.kv_layout(dtype)), state_layout_(model.state_layout()) {}

  int length() const override { return length_; }
  const KvFormat& format() const noexcept override { return format_; }
  const KvLayout& layout() const noexcept override { return layout_; }
  std::span<const KvBuffer> reserve(int n) override {
    while (int(runs_.size()) * kSegmentTokens < length_ + n) {
      const size_t size = layout_.offset(layout_.tensors.size(), kSegmentTokens);
      const std::shared_ptr<std::byte> buffer = allocate_heap_buffer(size);
      runs_.push_back({buffer.get(), size, buffer});
    }
    return runs_;
  }
  std::pair<mx::array, mx::array> update_and_fetch(int layer, const mx::array& k, const mx::array& v) override {
    return {append(2 * layer, k), append(2 * layer + 1, v)};
  }
  void advance(int n) override {
    length_ += n;
    state_ = std::exchange(next_state_, {});
  }
  const StateLayout& state_layout() const noexcept override { return state_layout_; }
  std::span<const std::byte> state() const override { return state_; }
  std::span<std::byte> next_state() override {
    next_state_.resize(state_layout_.bytes(), std::byte{0xff});  // NaNs
    return next_state_;
  }

  /// The rows held, tensor by tensor and head by head (kernels backend).
  std::vector<std::byte> rows() const {
    std::vector<std::byte> bytes;
    for (size_t t = 0; t < layout_.tensors.size(); ++t) {
      const KvTensorSpec& spec = layout_.tensors[t];
      const size_t row = size_t(spec.dim) * kv_dtype_size(spec.dtype);
      for (int at = 0; at < length_; ++at) {
        const auto* run = runs_[size_t(at / kSegmentTokens)].data;
        for (int head = 0; head < spec.n_kv_heads; ++head) {
          const std::byte* from = run + layout_.offset(t, kSegmentTokens) +
                                  (size_t(head) * kSegmentTokens + size_t(at % kSegmentTokens)) * row;
          bytes.insert(bytes.end(), from, from + row);
        }
      }
    }
    return bytes;
  }

 private:
  mx::array append(int tensor, const mx::array& rows) {
    const KvDtype dtype = layout_.tensors[size_t(tensor)].dtype;
    const mx::array stored = mx::astype(
        rows, dtype == KvDtype::kF32 ? mx::float32 : dtype == KvDtype::kF16 ? mx::float16 : mx::bfloat16);
    const auto [it, added] = tensors_.emplace(tensor, stored);
    if (!added) it->second = mx::concatenate({it->second, stored}, 2);
    return it->second;
  }

  KvFormat format_;
  KvLayout layout_;
  StateLayout state_layout_;
  std::vector<std::byte> state_, next_state_;
  int length_ = 0;
  std::vector<KvBuffer> runs_;
  std::map<int, mx::array> tensors_;
};

inline std::vector<float> forward(Model& model, TestCache& cache, std::span<const int32_t> tokens, bool all = false) {
  const ForwardSequence sequence{.tokens = tokens, .kv = &cache, .all_logits = all};
  mx::array logits = model.forward({&sequence, 1});
  EXPECT_EQ(logits.shape(), (mx::Shape{all ? int(tokens.size()) : 1, model.info().vocab_size}));
  EXPECT_EQ(logits.dtype(), mx::float32);
  return {logits.data<float>(), logits.data<float>() + logits.size()};
}

inline int argmax(std::span<const float> row) { return int(std::ranges::max_element(row) - row.begin()); }

/// A model of scripts/fetch-model, computed in f32 unless told otherwise.
inline std::unique_ptr<Model> load_fetched(const std::string& name, Activations activations = Activations::kF32) {
  const fs::path dir = kSource / ".models" / name;
  if (!fs::exists(dir)) throw std::runtime_error("no .models/" + name + "; run scripts/fetch-model " + name);
  return Model::load(dir.string(), {.backend = Backend::kKernels, .activations = activations});
}

}  // namespace torpor
