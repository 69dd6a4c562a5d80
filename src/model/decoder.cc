#include "model/decoder.h"

#include <algorithm>
#include <set>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "kernels/compute.h"
#include "torpor/error.h"

namespace torpor::model {
namespace {

/// Rows computed at once: enough to amortise reading the weights, few enough that activations stay small.
constexpr int kChunkRows = 512;

KvDtype checkpoint_dtype(const Projection& embedding) {
  return parse_kv_dtype(activation_dtype(embedding)).value_or(KvDtype::kF32);
}

/// How far one sequence has come.
struct Progress {
  const ForwardSequence* sequence;
  std::span<const KvBuffer> runs;
  int start = 0, done = 0;

  int left() const { return int(sequence->tokens.size()) - done; }
};

}  // namespace

Projection find_embedding(const Checkpoint& checkpoint) {
  const ModelConfig& c = checkpoint.config;
  return find_projection(checkpoint.weights, c, c.weight_prefix + "model.embed_tokens", c.vocab_size, c.hidden_size, false);
}

Decoder::Decoder(const Checkpoint& checkpoint)
    : config_(checkpoint.config), backend_(checkpoint.backend), dtype_(checkpoint_dtype(find_embedding(checkpoint))),
      ops_(backend_ == Backend::kKernels ? make_kernel_ops(config_) : make_mlx_ops(config_, dtype_)) {
  info_ = {.name = checkpoint.name, .dir = checkpoint.dir, .architecture = config_.architecture,
           .n_layers = config_.n_layers, .n_heads = config_.n_heads, .n_kv_heads = config_.n_kv_heads,
           .head_dim = config_.head_dim, .vocab_size = config_.vocab_size, .max_context = config_.max_context,
           .weight_bytes = checkpoint.weights.nbytes(), .eos_token_ids = config_.eos_token_ids};
  identity_.architecture = config_.architecture;
  identity_.config = config_.digest();
  // Rows computed from activations of 8 bits are other rows.
  if (backend_ == Backend::kKernels && kernels::activations() == kernels::Activations::kInt8) identity_.config += "+int8";
  identity_.weights = checkpoint.weights.digest();
  identity_.rope = config_.rope_description();
}

KvLayout Decoder::kv_layout(const KvFormat& format) const {
  const KvDtype dtype = format.dtype;
  if (format.bits != 0) throw Error(ErrorCode::kInvalidArgument, "Quantized KV is not there yet.");
  if (dtype == KvDtype::kU32) throw Error(ErrorCode::kInvalidArgument, "KV dtype must be f32, f16 or bf16.");
  KvLayout layout;
  for (int i = 0; i < config_.n_layers; ++i) {
    for (const char* part : {"keys", "values"}) {
      layout.tensors.push_back({.name = "layer_" + std::to_string(i) + "_" + part, .dtype = dtype,
                                .n_kv_heads = config_.n_kv_heads, .dim = config_.head_dim,
                                .window = config_.windows[size_t(i)]});
    }
  }
  return layout;
}

const KvLayout& Decoder::known_layout(KvDtype dtype) {
  const auto [it, added] = layouts_.try_emplace(dtype);
  if (added) it->second = kv_layout(dtype);
  return it->second;
}

void Decoder::check(std::span<const ForwardSequence> batch) const {
  if (batch.empty()) throw Error(ErrorCode::kInvalidArgument, "A forward pass needs at least one sequence.");
  std::set<const KvAccess*> caches;
  for (const ForwardSequence& sequence : batch) {
    if (sequence.tokens.empty()) throw Error(ErrorCode::kInvalidArgument, "A sequence needs at least one token.");
    if (sequence.kv == nullptr || sequence.kv->layout().tensors.empty()) {
      throw Error(ErrorCode::kInvalidArgument, "A sequence needs a KV cache of this model.");
    }
    if (!caches.insert(sequence.kv).second) {
      throw Error(ErrorCode::kInvalidArgument, "Two sequences of a batch share one KV cache.");
    }
    for (int32_t token : sequence.tokens) {
      if (token < 0 || token >= config_.vocab_size) {
        throw Error(ErrorCode::kInvalidArgument, "Token id " + std::to_string(token) + " is outside the vocabulary of " +
                                                     std::to_string(config_.vocab_size) + ".");
      }
    }
  }
}

mx::array Decoder::forward(std::span<const ForwardSequence> batch) {
  check(batch);
  try {
    return compute(batch);
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kResourceExhausted, "Out of memory in the forward pass.");
  } catch (const std::exception& e) {
    throw Error(ErrorCode::kInternal, std::string("MLX failed in the forward pass: ") + e.what());
  }
}

mx::array Decoder::compute(std::span<const ForwardSequence> batch) {
  std::vector<Progress> progress;
  const KvLayout& layout = known_layout(batch.front().kv->layout().tensors.front().dtype);
  for (const ForwardSequence& sequence : batch) {
    if (sequence.kv->layout() != layout) {
      throw Error(ErrorCode::kInvalidArgument,
                  "A KV cache of the batch was not made for this model, or has another dtype than the first.");
    }
    const auto runs = ops_->reserve(*sequence.kv, int(sequence.tokens.size()));
    progress.push_back({.sequence = &sequence, .runs = runs, .start = sequence.kv->length()});
  }

  // Chunks take the sequences in order, so their logits come in the order of the result.
  std::vector<mx::array> results;
  for (auto next = progress.begin(); next != progress.end();) {
    Batch chunk;
    chunk.kv_layout = &layout;
    std::vector<int32_t> logit_rows;
    std::vector<std::pair<KvAccess*, int>> advances;
    while (next != progress.end() && int(chunk.tokens.size()) < kChunkRows) {
      const int row = int(chunk.tokens.size());
      const int n = std::min(next->left(), kChunkRows - row);
      const auto tokens = next->sequence->tokens.subspan(size_t(next->done), size_t(n));
      chunk.tokens.insert(chunk.tokens.end(), tokens.begin(), tokens.end());
      chunk.sequences.push_back({.kv = next->sequence->kv, .runs = next->runs, .row = row, .n = n,
                                 .position = next->start + next->done});
      next->done += n;
      const int first_logit = next->sequence->all_logits ? row : next->left() == 0 ? row + n - 1 : row + n;
      for (int i = first_logit; i < row + n; ++i) logit_rows.push_back(i);
      if (ops_->advances_per_chunk()) advances.emplace_back(next->sequence->kv, n);
      if (next->left() > 0) break;
      ++next;
    }

    mx::array hidden = layers(chunk);
    if (logit_rows.empty()) {
      mx::eval({hidden});
    } else {
      if (logit_rows.size() < chunk.tokens.size()) {
        const mx::array rows(logit_rows.data(), {int(logit_rows.size())}, mx::int32);
        // The rows that get no logits are evaluated with them: their keys and values are what they are for.
        hidden = mx::take(hidden, rows, 0, ops_->device());
      }
      results.push_back(logits(hidden));
      mx::eval({results.back()});
    }
    for (const auto& [kv, n] : advances) kv->advance(n);
  }
  mx::array result = results.size() == 1 ? results.front() : mx::concatenate(results, 0, ops_->device());
  mx::eval({result});
  // All at the end where the backend allows it, so that an error leaves every sequence where it was.
  if (!ops_->advances_per_chunk()) {
    for (const Progress& p : progress) p.sequence->kv->advance(int(p.sequence->tokens.size()));
  }
  return result;
}

}  // namespace torpor::model
