#include "model/decoder.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <numbers>
#include <set>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "base/hash.h"
#include "base/large_pages.h"
#include "kernels/compute.h"
#include "kernels/cpu_target.h"
#include "model/modules.h"
#include "torpor/error.h"

namespace torpor {

const StateLayout& KvAccess::state_layout() const noexcept {
  static const StateLayout none;
  return none;
}

}  // namespace torpor

namespace torpor::model {
namespace {

/// Rows computed at once: enough to amortise reading the weights, few enough that activations stay small.
constexpr int kChunkRows = 512;

/// Changes whenever packed weights lie otherwise in memory, or are packed in another order.
constexpr const char* kPackVersion = "2";

std::unique_ptr<PackFile> open_pack(const Checkpoint& checkpoint, const Identity& identity) {
  if (!checkpoint.pack_cache || checkpoint.backend != Backend::kKernels) return nullptr;
  return PackFile::open(pack_key(identity), checkpoint.weights.files(), uint64_t(checkpoint.weights.nbytes()));
}

/// Experts are mapped where the model would take a large part of the memory: of these a token reads few.
std::unique_ptr<Ops> make_ops(const Checkpoint& checkpoint, KvDtype dtype, PackFile* pack) {
  const float eps = checkpoint.config.norm_eps;
  if (checkpoint.backend == Backend::kMlx) return make_mlx_ops(eps, dtype);
  kernels::WeightMemory& plain = kernels::WeightMemory::plain();
  if (pack == nullptr) return make_kernel_ops(eps, checkpoint.activations, plain, plain);
  const bool large = uint64_t(checkpoint.weights.nbytes()) > physical_memory() / 4;
  return make_kernel_ops(eps, checkpoint.activations, pack->resident(), large ? pack->mapped() : pack->resident());
}

/// How far one sequence has come.
struct Progress {
  const ForwardSequence* sequence;
  std::span<const KvBuffer> runs;
  int start = 0, done = 0;

  int left() const { return int(sequence->tokens.size()) - done; }
};

}  // namespace

KvDtype checkpoint_dtype(const Projection& embedding) {
  return parse_kv_dtype(activation_dtype(embedding)).value_or(KvDtype::kF32);
}

ModelInfo info_of(const Checkpoint& checkpoint) {
  const ModelConfig& c = checkpoint.config;
  const Attention& first = c.layers.front().attention;
  return {.name = checkpoint.name, .dir = checkpoint.dir, .architecture = c.architecture, .n_layers = int(c.layers.size()),
          .n_heads = first.n_heads, .n_kv_heads = first.n_kv_heads, .head_dim = first.key_dim, .vocab_size = c.vocab_size,
          .max_context = c.max_context, .weight_bytes = checkpoint.weights.nbytes(), .eos_token_ids = c.eos_token_ids};
}

std::string pack_key(const Identity& identity) {
  Hasher key;
  for (const std::string& field : {std::string(kPackVersion), identity.architecture, identity.config, identity.weights}) {
    key.update_field(field);
  }
  return key.hex();
}

Identity identity_of(const Checkpoint& checkpoint) {
  Identity identity;
  identity.architecture = checkpoint.config.architecture;
  identity.config = checkpoint.config.digest();
  identity.weights = checkpoint.weights.digest();
  identity.rope = checkpoint.config.rope_description;
  return identity;
}

namespace {

/// Rows of windows this long are kept apart. Those of shorter ones are few, and any boundary can be rewound to.
constexpr int kLeastWindowApart = 1024;

/// Keeps the tensors of long windows apart, where others are left and no recurrent layer has states. That depends on
/// the model alone, so a prefix has the same names whoever wrote it.
void keep_windows_apart(KvLayout& layout, const ModelConfig& config) {
  if (std::ranges::any_of(config.layers, [](const LayerSpec& layer) { return layer.recurrent.has_value(); })) return;
  const auto is_long = [](const KvTensorSpec& tensor) { return tensor.window >= kLeastWindowApart; };
  if (std::ranges::all_of(layout.tensors, is_long)) return;
  for (KvTensorSpec& tensor : layout.tensors) tensor.apart = is_long(tensor);
  std::ranges::stable_partition(layout.tensors, [](const KvTensorSpec& tensor) { return !tensor.apart; });
}

}  // namespace

KvLayout kv_layout_of(const ModelConfig& config, const KvFormat& format) {
  if (!KvFormat::parse(format.name())) {
    throw Error(ErrorCode::kInvalidArgument, "There is no KV format '" + format.name() +
                                                 "': rows are f32, f16 or bf16, or of 8 or 4 bits in groups of 32, 64 or 128.");
  }
  if (format.bias_free && !config.key_bias()) {
    throw Error(ErrorCode::kInvalidArgument, "The model's keys have no bias, so no KV format can be without it.");
  }
  KvLayout layout;
  int i = -1;
  for (const LayerSpec& layer : config.layers) {
    const Attention& attention = layer.attention;
    if (attention.reads_rows_of || !layer.mixes) continue;
    ++i;
    if (layer.recurrent) continue;
    const auto add_rows = [&](const char* part, int dim, int bits) {
      if (format.quantized() && dim % format.group != 0) {
        throw Error(ErrorCode::kInvalidArgument, "The model's heads of " + std::to_string(dim) +
                                                     " dims can't be quantized in groups of " + std::to_string(format.group) +
                                                     "; choose a group that divides them, or no KV quantization.");
      }
      const std::string name = "layer_" + std::to_string(i) + "_" + part;
      const auto add = [&](const char* suffix, KvDtype dtype, int width) {
        layout.tensors.push_back({.name = name + suffix, .dtype = dtype, .n_kv_heads = attention.n_kv_heads, .dim = width,
                                  .window = attention.window});
      };
      if (!format.quantized()) {
        add("", format.dtype, dim);
      } else {
        add("", KvDtype::kU32, dim * bits / 32);
        add("_scales", format.dtype, dim / format.group);
        add("_biases", format.dtype, dim / format.group);
      }
    };
    add_rows("keys", attention.key_dim, format.bits.keys);
    add_rows("values", attention.value_dim, format.bits.values);
  }
  keep_windows_apart(layout, config);
  return layout;
}

StateLayout state_layout_of(const ModelConfig& config) {
  StateLayout layout;
  int i = -1;
  for (const LayerSpec& layer : config.layers) {
    i += layer.attention.reads_rows_of || !layer.mixes ? 0 : 1;
    if (!layer.recurrent) continue;
    const kernels::RecurrentShape& shape = layer.recurrent->shape;
    const std::string name = "layer_" + std::to_string(i);
    layout.tensors.push_back({name + "_conv", KvDtype::kF32, {shape.taps - 1, shape.channels()}});
    if (shape.n_heads == 0) continue;
    layout.tensors.push_back({name + "_recurrent", KvDtype::kF32, {shape.n_heads, shape.key_dim, shape.value_dim}});
  }
  return layout;
}

std::vector<int> cache_layers_of(const ModelConfig& config) {
  std::vector<int> of;
  int own = 0;
  for (const LayerSpec& layer : config.layers) {
    const Attention& attention = layer.attention;
    const bool has_rows = layer.mixes && !layer.recurrent;
    of.push_back(attention.reads_rows_of ? of[size_t(*attention.reads_rows_of)] : has_rows ? own++ : -1);
  }
  return of;
}

KvFormat refined_format(const ModelConfig& config, const KvFormat& asked) {
  KvFormat format = asked;
  format.bias_free = config.key_bias() && asked.quantized();
  format.rotated = asked.bits.keys == 4 || asked.bits.values == 4;
  return format;
}

Projection find_embedding(const Checkpoint& checkpoint) {
  const ModelConfig& c = checkpoint.config;
  return find_projection(checkpoint.weights, c, c.weight_prefix + "model." + c.embedding, c.vocab_size, c.hidden_size,
                         false);
}

std::string Decoder::numerics() const {
  if (backend_ == Backend::kKernels) {
    return std::string(activations_name(activations_)) + "/kernels/" + kernels::lane_class();
  }
  const bool gpu = mx::default_device() == mx::Device::gpu;
#if defined(__APPLE__)
  const char* const device = "metal";
#else
  const char* const device = "cuda";
#endif
  std::string dtype = kv_dtype_name(gpu ? dtype_ : KvDtype::kF32);
  for (char& c : dtype) c = char(std::tolower(static_cast<unsigned char>(c)));
  return dtype + "/mlx-" + (gpu ? device : "cpu") + "/-";
}

Decoder::Decoder(const Checkpoint& checkpoint)
    : config_(checkpoint.config), backend_(checkpoint.backend), activations_(checkpoint.activations),
      dtype_(checkpoint_dtype(find_embedding(checkpoint))),
      info_(info_of(checkpoint)),
      identity_(identity_of(checkpoint)),
      pack_(open_pack(checkpoint, identity_)),
      ops_(make_ops(checkpoint, dtype_, pack_.get())) {
  cache_layers_ = cache_layers_of(config_);
  state_layout_ = state_layout_of(config_);
  for (size_t offset = 0; const LayerSpec& layer : config_.layers) {
    state_offsets_.push_back(offset);
    if (layer.recurrent) offset += layer.recurrent->shape.state() * sizeof(float);
  }
  const Modules modules(checkpoint, *ops_);
  if (config_.layer_inputs) inputs_ = modules.shared_inputs();
  embedding_ = modules.embedding();
  for (int i = 0; i < info_.n_layers; ++i) layers_.push_back(modules.layer(i));
  final_norm_ = modules.norm("model." + config_.final_norm, config_.hidden_size);
  head_ = modules.head(embedding_);
  PackFile::finish(std::move(pack_));
}

const KvLayout& Decoder::layout_of(const KvAccess& cache) {
  auto known = layouts_.find(cache.format());
  if (known == layouts_.end()) known = layouts_.emplace(cache.format(), kv_layout(cache.format())).first;
  if (known->second != cache.layout() || state_layout_ != cache.state_layout()) {
    throw Error(ErrorCode::kInvalidArgument, "A KV cache of the batch was not made for this model.");
  }
  return known->second;
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
    try {
      return compute(batch);
    } catch (...) {
      for (const ForwardSequence& sequence : batch) sequence.kv->abandon();
      throw;
    }
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
  const KvFormat format = batch.front().kv->format();
  const KvLayout& layout = layout_of(*batch.front().kv);
  for (const ForwardSequence& sequence : batch) {
    if (sequence.kv->format() != format || sequence.kv->layout() != layout) {
      throw Error(ErrorCode::kInvalidArgument,
                  "A KV cache of the batch was not made for this model, or has another format than the first.");
    }
    const auto runs = ops_->reserve(*sequence.kv, int(sequence.tokens.size()));
    progress.push_back({.sequence = &sequence, .runs = runs, .start = sequence.kv->length()});
  }

  // Chunks take the sequences in order, so their logits come in the order of the result.
  std::vector<mx::array> results;
  for (auto next = progress.begin(); next != progress.end();) {
    Batch chunk;
    chunk.kv_layout = &layout;
    chunk.kv_format = format;
    std::vector<int32_t> logit_rows;
    std::vector<std::pair<KvAccess*, int>> advances;
    while (next != progress.end() && int(chunk.tokens.size()) < kChunkRows) {
      const int row = int(chunk.tokens.size());
      const int n = std::min(next->left(), kChunkRows - row);
      const auto tokens = next->sequence->tokens.subspan(size_t(next->done), size_t(n));
      chunk.tokens.insert(chunk.tokens.end(), tokens.begin(), tokens.end());
      chunk.sequences.push_back({.kv = next->sequence->kv, .runs = next->runs, .row = row, .n = n,
                                 .position = next->start + next->done});
      if (!state_layout_.empty()) {
        BatchSequence& sequence = chunk.sequences.back();
        sequence.next_state = sequence.kv->next_state().data();
        // Of the chunk before, where the cache has not advanced.
        const bool goes_on = next->done > 0 && !ops_->advances_per_chunk();
        const std::span<const std::byte> live = sequence.kv->state();
        sequence.state = goes_on ? sequence.next_state : live.empty() ? nullptr : live.data();
      }
      next->done += n;
      const bool last = next->left() == 0 && !next->sequence->no_logits;
      const int first_logit = next->sequence->all_logits ? row : last ? row + n - 1 : row + n;
      for (int i = first_logit; i < row + n; ++i) logit_rows.push_back(i);
      if (ops_->advances_per_chunk()) advances.emplace_back(next->sequence->kv, n);
      if (next->left() > 0) break;
      ++next;
    }

    mx::array hidden = run_layers(chunk);
    const auto evaluate = [&](const mx::array& wanted) {
      std::vector<mx::array> all{wanted};
      for (const auto& [at, part] : chunk.states) all.push_back(part);
      mx::eval(all);
    };
    if (logit_rows.empty()) {
      evaluate(hidden);
    } else {
      if (logit_rows.size() < chunk.tokens.size()) {
        const mx::array rows(logit_rows.data(), {int(logit_rows.size())}, mx::int32);
        // The rows that get no logits are evaluated with them: their keys and values are what they are for.
        hidden = mx::take(hidden, rows, 0, ops_->device());
      }
      results.push_back(logits(hidden));
      evaluate(results.back());
    }
    for (const auto& [at, part] : chunk.states) std::memcpy(at, part.data<float>(), part.nbytes());
    for (const auto& [kv, n] : advances) kv->advance(n);
  }
  mx::array result = results.size() == 1 ? results.front()
                     : results.empty()   ? mx::zeros({0, config_.vocab_size}, mx::float32, ops_->device())
                                         : mx::concatenate(results, 0, ops_->device());
  mx::eval({result});
  // All at the end where the backend allows it, so that an error leaves every sequence where it was.
  if (!ops_->advances_per_chunk()) {
    for (const Progress& p : progress) p.sequence->kv->advance(int(p.sequence->tokens.size()));
  }
  return result;
}

mx::array Decoder::run_layers(Batch& batch) const {
  mx::array x = ops_->embedding(batch.tokens, embedding_);
  if (config_.embedding_scale != 1) x = ops_->scale(x, config_.embedding_scale);
  const std::optional<mx::array> inputs = inputs_ ? std::optional(layer_inputs(batch.tokens, x)) : std::nullopt;
  const auto normed = [&](const mx::array& rows, const Ops::Weight& norm) {
    return norm == nullptr ? rows : ops_->norm(rows, norm);
  };
  for (int i = 0; i < info_.n_layers; ++i) {
    const DecoderLayer& layer = layers_[size_t(i)];
    const mx::array read = normed(x, layer.attention_norm);
    if (layer.output != nullptr) x = add_part(x, mix(read, size_t(i), batch), layer.output, layer.attention_post_norm);
    const mx::array mlp_input = config_.names.parallel ? read : normed(x, layer.mlp_norm);
    if (layer.beside) {
      x = add_output(x, mlp_and_experts(x, layer), layer.mlp_post_norm);
    } else if (layer.experts != nullptr) {
      x = add_output(x, ops_->experts(mlp_input, mlp_input, layer.experts), layer.mlp_post_norm);
    } else if (layer.up != nullptr) {
      x = add_part(x, ops_->relu_squared(ops_->linear(mlp_input, layer.up)), layer.down, layer.mlp_post_norm);
    } else if (layer.down != nullptr) {
      x = add_part(x, ops_->gated(mlp_input, layer.gate_up), layer.down, layer.mlp_post_norm);
    }
    if (layer.inputs) x = add_inputs(x, mx::take(*inputs, i, 1, ops_->device()), *layer.inputs);
    if (layer.scalar != 1) x = ops_->scale(x, layer.scalar);
  }
  return x;
}

mx::array Decoder::mix(const mx::array& x, size_t layer, Batch& batch) const {
  const DecoderLayer& w = layers_[layer];
  if (w.recurrent != nullptr) return ops_->recurrent(x, w.recurrent, state_offsets_[layer], batch);
  const mx::array attended = ops_->attention(x, w.attention, cache_layers_[layer], batch);
  return w.attention_gate == nullptr ? attended : ops_->gate(attended, ops_->linear(x, w.attention_gate));
}

mx::array Decoder::layer_inputs(const std::vector<int32_t>& tokens, const mx::array& x) const {
  const int m = x.shape(0), n = info_.n_layers, size = config_.layer_inputs->size;
  const auto shaped = [&](const mx::array& rows, mx::Shape shape) { return mx::reshape(rows, std::move(shape), ops_->device()); };
  const mx::array projected = ops_->scale(ops_->linear(x, inputs_->projection), 1 / std::sqrt(float(config_.hidden_size)));
  const mx::array own = ops_->norm(shaped(projected, {m * n, size}), inputs_->norm);
  const mx::array table = mx::astype(inputs_->table.rows(tokens), x.dtype(), ops_->device());
  const mx::array sum = ops_->add(own, shaped(ops_->scale(table, config_.layer_inputs->scale), {m * n, size}));
  return shaped(ops_->scale(sum, float(std::numbers::sqrt2 / 2)), {m, n, size});
}

mx::array Decoder::add_inputs(const mx::array& x, const mx::array& inputs, const LayerInputWeights& w) const {
  const mx::array gated = ops_->multiply(ops_->gelu(ops_->linear(x, w.gate)), inputs);
  return ops_->add(x, ops_->norm(ops_->linear(gated, w.projection), w.norm));
}

mx::array Decoder::add_part(const mx::array& x, const mx::array& inner, const Ops::Weight& w,
                            const Ops::Weight& post_norm) const {
  if (post_norm == nullptr && config_.residual_scale == 1) return ops_->linear_add(inner, w, x);
  return add_output(x, ops_->linear(inner, w), post_norm);
}

mx::array Decoder::add_output(const mx::array& x, const mx::array& part, const Ops::Weight& post_norm) const {
  const mx::array output = post_norm == nullptr ? part : ops_->norm(part, post_norm);
  return ops_->add(x, config_.residual_scale == 1 ? output : ops_->scale(output, config_.residual_scale));
}

mx::array Decoder::mlp_and_experts(const mx::array& x, const DecoderLayer& layer) const {
  const mx::array mlp = ops_->linear(ops_->gated(ops_->norm(x, layer.mlp_norm), layer.gate_up), layer.down);
  const float root = std::sqrt(float(config_.hidden_size));
  const mx::array routed = ops_->scale(ops_->norm(x, layer.beside->router_norm), 1 / root);
  const mx::array experts = ops_->experts(ops_->norm(x, layer.beside->norm), routed, layer.experts);
  return ops_->add(ops_->norm(mlp, layer.beside->mlp_post_norm), ops_->norm(experts, layer.beside->post_norm));
}

mx::array Decoder::logits(const mx::array& hidden) const {
  const mx::array all = ops_->head(ops_->norm(hidden, final_norm_), head_);
  return ops_->soft_cap(config_.logit_scale == 1 ? all : ops_->scale(all, config_.logit_scale), config_.logit_softcap);
}

}  // namespace torpor::model
