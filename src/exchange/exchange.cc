/// Between agents and mlx-lm's prompt-cache files.

#include "torpor/exchange.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <set>
#include <string_view>

#include "base/env.h"
#include "base/hash.h"
#include "exchange/prompt_cache.h"
#include "store/export.h"
#include "store/temporary_file.h"
#include "store/torpor_file.h"
#include "torpor/error.h"

namespace torpor {
namespace {

struct OpenedPromptCache {
  File handle;
  SafetensorsHeader header;
};

OpenedPromptCache open_prompt_cache(Env& env, const std::filesystem::path& path) {
  File handle = env.open(path, OpenMode::kRead);
  const uint64_t size = handle.stat().size;
  SafetensorsHeader header = parse_safetensors_header(read_header_bytes(handle, size), size, path.string());
  return {std::move(handle), std::move(header)};
}

/// kIncompatible naming what differs.
void check_model(const PromptCacheFile& file, const KvLayout& plain, const CacheModel& model,
                 const std::string& file_name) {
  const auto differs = [&](const std::string& what, int64_t has, int64_t wants) {
    if (has == wants) return;
    throw Error(ErrorCode::kIncompatible, "'" + file_name + "' has " + std::to_string(has) + " " + what +
                                              ", the model '" + model.name + "' " + std::to_string(wants) +
                                              "; it is of another model.")
        .with_path(file_name)
        .with_field(what, std::to_string(wants), std::to_string(has));
  };
  differs("layers", int64_t(file.layers.size()), int64_t(plain.tensors.size() / 2));
  for (size_t i = 0; i < file.layers.size(); ++i) {
    const std::string where = " in layer " + std::to_string(i);
    differs("KV heads" + where, file.layers[i].n_kv_heads, plain.tensors[2 * i].n_kv_heads);
    differs("dims of each key" + where, file.layers[i].key_dim, plain.tensors[2 * i].dim);
    differs("dims of each value" + where, file.layers[i].value_dim, plain.tensors[2 * i + 1].dim);
  }
  if (model.max_context > 0 && file.n_tokens > model.max_context) {
    throw Error(ErrorCode::kIncompatible, "'" + file_name + "' holds " + std::to_string(file.n_tokens) +
                                              " tokens, the model '" + model.name + "' has a context of " +
                                              std::to_string(model.max_context) + ".")
        .with_path(file_name)
        .with_field("tokens", std::to_string(model.max_context), std::to_string(file.n_tokens));
  }
}

/// How few tokens may be kept of the file's so that every layer still has the rows it attends. kIncompatible when even
/// all are too few.
int64_t shortest_cut(const PromptCacheFile& file, const KvLayout& plain, const CacheModel& model,
                     const std::string& file_name) {
  int64_t shortest = 0;
  for (size_t i = 0; i < file.layers.size(); ++i) {
    const int64_t lost = file.layers[i].rows.front().token;
    const KvTensorSpec& tensor = plain.tensors[2 * i];
    if (lost == 0) continue;
    shortest = std::max(shortest, lost + tensor.window);
    if (!rotates(tensor, plain, model.rotates_windows) || shortest > file.n_tokens) {
      throw Error(ErrorCode::kIncompatible, "'" + file_name + "' has forgotten the first " + std::to_string(lost) +
                                                " rows of layer " + std::to_string(i) + ", which the model '" +
                                                model.name + "' still attends; make it without a bound on its size.")
          .with_path(file_name)
          .with_field("rows of layer " + std::to_string(i), std::to_string(file.n_tokens),
                      std::to_string(file.n_tokens - lost));
    }
  }
  return shortest;
}

/// A state's matrices, [head][key dim][value dim], as mlx-lm has them, [head][value dim][key dim]; or the other way
/// round. `shape` is that of `from`.
void transpose(const float* from, const std::vector<int64_t>& shape, float* to) {
  const size_t heads = size_t(shape[0]), rows = size_t(shape[1]), columns = size_t(shape[2]);
  for (size_t head = 0; head < heads; ++head, from += rows * columns, to += rows * columns) {
    for (size_t i = 0; i < rows * columns; ++i) to[i % columns * rows + i / columns] = from[i];
  }
}

/// Reads a file's states. kIncompatible, naming what differs, when they are not those of such a model.
std::shared_ptr<const StateCheckpoint> read_states(const OpenedPromptCache& opened, const PromptCacheFile& file,
                                                   const CacheModel& model, const std::string& file_name) {
  const auto& tensors = model.state_layout.tensors;
  const std::shared_ptr<std::byte> state = allocate_heap_buffer(model.state_layout.bytes());
  size_t t = 0;
  for (const PromptCacheState& layer : file.states) {
    for (const PromptCacheState::Array& array : layer.arrays) {
      std::vector<int64_t> shape = array.shape;
      if (shape.size() == 3) std::swap(shape[1], shape[2]);
      if (t == tensors.size() || layer_of(tensors[t].name) != layer.layer || tensors[t].shape != shape) {
        throw Error(ErrorCode::kIncompatible, "'" + file_name + "' has a state in layer " +
                                                  std::to_string(layer.layer) + " that the model '" + model.name +
                                                  "' has not; it is of another model.")
            .with_path(file_name)
            .with_field("state", "the model's", "layer " + std::to_string(layer.layer));
      }
      const size_t size = kv_dtype_size(array.dtype), count = tensors[t].bytes() / sizeof(float);
      std::vector<std::byte> bytes(count * size);
      opened.handle.read_at(bytes, array.data);
      std::vector<float> values(count);
      for (size_t i = 0; i < count; ++i) values[i] = load_float(bytes.data() + i * size, array.dtype);
      auto* const to = reinterpret_cast<float*>(state.get() + model.state_layout.offset(t));
      if (shape.size() == 3) {
        transpose(values.data(), array.shape, to);
      } else {
        std::ranges::copy(values, to);
      }
      ++t;
    }
  }
  if (t != tensors.size()) {
    throw Error(ErrorCode::kIncompatible, "'" + file_name + "' lacks the state that the model '" + model.name +
                                              "' keeps of " + tensors[t].name + "; it is of another model.")
        .with_path(file_name)
        .with_field("state", tensors[t].name, "");
  }
  if (tensors.empty()) return nullptr;
  return std::make_shared<const StateCheckpoint>(file.n_tokens, std::span(state.get(), model.state_layout.bytes()),
                                                 state);
}

/// Whether a model's layers are all that the snapshot has, as the engine lays them out in this format.
bool is_of_engine(const KvSnapshot& snapshot, const KvFormat& format) {
  const auto& tensors = snapshot.layout.tensors;
  std::vector<std::string> parts = {""};
  if (format.quantized()) parts.insert(parts.end(), {"_scales", "_biases"});
  std::set<int> recurrent;
  for (const StateTensorSpec& tensor : snapshot.state_layout.tensors) {
    if (!recurs(snapshot)) break;
    if (tensor.dtype != KvDtype::kF32 || tensor.shape.size() < 2 || tensor.shape.size() > 3) return false;
    recurrent.insert(layer_of(tensor.name));
  }
  const size_t layers = recurrent.size() + tensors.size() / (2 * parts.size());
  size_t t = 0;
  for (size_t layer = 0; layer < layers; ++layer) {
    if (recurrent.erase(int(layer)) > 0) continue;
    for (const char* side : {"_keys", "_values"}) {
      for (const std::string& part : parts) {
        if (t == tensors.size() || tensors[t].name != "layer_" + std::to_string(layer) + side + part) return false;
        ++t;
      }
    }
  }
  return t == tensors.size() && recurrent.empty();
}

/// mlx-lm's attention takes no quantized rows of these: they have sinks, or latents.
constexpr std::string_view kOfFloatsAlone[] = {"deepseek_v3", "glm4_moe_lite", "gpt_oss", "mistral4"};
/// Of this one mlx-lm keeps no latents, but the keys and values that it makes of them.
constexpr std::string_view kExpanded = "deepseek_v2";

}  // namespace

bool is_prompt_cache(const std::filesystem::path& path) {
  return is_prompt_cache(open_prompt_cache(Env::posix(), path).header);
}

PromptCache read_prompt_cache(const std::filesystem::path& path, const CacheModel& model, Env* env) {
  const std::string file_name = path.string();
  const OpenedPromptCache opened = open_prompt_cache(env != nullptr ? *env : Env::posix(), path);
  if (!is_prompt_cache(opened.header)) {
    throw Error(ErrorCode::kInvalidArgument,
                "'" + file_name + "' is a safetensors file, but no prompt-cache file of mlx-lm.");
  }
  const PromptCacheFile file = parse_prompt_cache(opened.header, [&](const SafetensorsTensor& tensor) {
    int32_t value = 0;
    opened.handle.read_at(std::as_writable_bytes(std::span(&value, 1)), opened.header.data_start + tensor.begin);
    return value;
  }, file_name);
  const KvLayout plain = by_layers(model.kv_layout(file.format.dtype));
  check_model(file, plain, model, file_name);

  PromptCache read;
  read.shortest_cut = shortest_cut(file, plain, model, file_name);
  KvSnapshot& snapshot = read.snapshot;
  snapshot.identity = model.identity;
  snapshot.identity.kv = file.format.name();
  snapshot.conversation = model.conversation;
  snapshot.lineage.ranges = {{0, "mlx-lm"}};  // whatever computed them
  snapshot.layout = by_layers(model.kv_layout(file.format));
  snapshot.tokens.resize(size_t(file.n_tokens));
  const std::vector<std::shared_ptr<std::byte>> buffers = allocate_runs(snapshot);
  if (read.shortest_cut > 0) {
    for (size_t i = 0; i < buffers.size(); ++i) std::memset(buffers[i].get(), 0, snapshot.run_bytes(i).size());
  }
  size_t t = 0;
  for (const PromptCacheLayer& layer : file.layers) {
    for (const uint64_t data : layer.data) {
      const size_t row_size = size_t(snapshot.layout.tensors[t].dim) * kv_dtype_size(snapshot.layout.tensors[t].dtype);
      for (const FileRows& rows : layer.rows) {
        for_each_piece(snapshot.layout, file.n_tokens, t, rows.token, rows.token + rows.n, [&](const Piece& piece) {
          const uint64_t row =
              uint64_t(piece.head) * uint64_t(layer.capacity) + uint64_t(rows.row + piece.token - rows.token);
          opened.handle.read_at({buffers[piece.run].get() + piece.offset, piece.size}, data + row * row_size);
        });
      }
      ++t;
    }
  }
  for (size_t i = 0; i < snapshot.n_runs(); ++i) {
    name_unknown_tokens(std::span(snapshot.tokens).subspan(i * kSegmentTokens, size_t(snapshot.run_tokens(i))),
                        hash_hex(snapshot.run_bytes(i)));
  }
  if (const auto state = read_states(opened, file, model, file_name)) {
    snapshot.state_layout = model.state_layout;
    snapshot.states = {state};
    read.shortest_cut = file.n_tokens;  // what lies before can't be computed again: nobody knows the tokens
  }
  if (const KvLayout own = model.kv_layout(file.format); own != snapshot.layout) {
    snapshot = in_layout(snapshot, own).value();
  }
  return read;
}

void export_prompt_cache(const Store& store, const std::string& id, const std::filesystem::path& path,
                         const RotatesWindows& rotates_windows, PromptCacheDialect dialect,
                         const RestoreKeysOf& restore_of) {
  const auto directory = export_directory(store.env(), store.root(), path);
  LoadedAgent loaded = store.load_agent_cache(id, {.map_rows = true});
  KvSnapshot& snapshot = loaded.snapshot;
  bool lacks_rows = false;
  const auto n_tokens = int64_t(snapshot.tokens.size());
  if (n_tokens == 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "The agent '" + id + "' holds no tokens yet, which no prompt-cache file can say.");
  }
  if (recurs(snapshot) && dialect == PromptCacheDialect::kOld) {
    throw Error(ErrorCode::kIncompatible, "The agent '" + id + "' has recurrent layers, whose state Torpor writes to "
                                          "files of mlx-lm 0.32 alone; export it in that dialect.")
        .with_agent(id);
  }
  if (snapshot.identity.architecture == kExpanded) {
    throw Error(ErrorCode::kIncompatible, "The agent '" + id + "' holds latents, in place of which mlx-lm keeps keys "
                                          "and values for its architecture; export it as Torpor's own.")
        .with_agent(id);
  }
  const bool rotating = rotates_windows(snapshot.identity.architecture);
  if (snapshot.layout.has_apart()) {
    for (size_t i = 0; i < snapshot.sealed.size(); ++i) lacks_rows = lacks_rows || !snapshot.has_window_rows(i);
    snapshot = in_layout(snapshot, by_layers(snapshot.layout)).value();
  }
  const auto format = KvFormat::parse(snapshot.identity.kv);
  if (!format || !is_of_engine(snapshot, *format) || !snapshot.state.empty()) {
    throw Error(ErrorCode::kIncompatible, "The agent '" + id +
                                              "' was not made by Torpor's engine; the Python module writes its "
                                              "prompt-cache file.")
        .with_agent(id)
        .with_field("made_by", "Torpor's engine", "kv '" + snapshot.identity.kv + "'");
  }
  std::vector<std::vector<float>> matrices;  // as mlx-lm has them
  std::vector<std::span<const std::byte>> states;
  for (size_t t = 0; recurs(snapshot) && t < snapshot.state_layout.tensors.size(); ++t) {
    const StateTensorSpec& tensor = snapshot.state_layout.tensors[t];
    std::span bytes = snapshot.states.back()->bytes().subspan(snapshot.state_layout.offset(t), tensor.bytes());
    if (tensor.shape.size() == 3) {
      auto& turned = matrices.emplace_back(bytes.size() / sizeof(float));
      transpose(reinterpret_cast<const float*>(bytes.data()), tensor.shape, turned.data());
      bytes = std::as_bytes(std::span(turned));
    }
    states.push_back(bytes);
  }
  const bool of_floats = std::ranges::find(kOfFloatsAlone, snapshot.identity.architecture) != std::end(kOfFloatsAlone);
  if (format->quantized() &&
      (of_floats || format->bias_free || format->rotated || format->bits.keys != format->bits.values)) {
    const bool needs_model = format->bias_free || format->rotates_keys();
    if (needs_model && !restore_of) {
      throw Error(ErrorCode::kInvalidArgument, "The keys of agent '" + id + "' are kept as '" + format->name() +
                                               "', which only its model can turn back; name the model.")
          .with_agent(id);
    }
    snapshot = float_rows(snapshot, *format, needs_model ? restore_of(loaded.info) : nullptr);
  }
  const auto& tensors = snapshot.layout.tensors;
  const auto is_whole = [&](const KvTensorSpec& tensor) {
    return tensor.window > 0 && !rotates(tensor, snapshot.layout, rotating);
  };
  if (lacks_rows && std::ranges::any_of(tensors, is_whole)) {
    throw Error(ErrorCode::kIncompatible, "The agent '" + id + "' keeps rows of sliding windows for its checkpoints "
                                          "alone, and mlx-lm's cache for these layers would hold all rows; export it "
                                          "as Torpor's own.")
        .with_agent(id);
  }
  const PromptCacheFrame frame = frame_prompt_cache(snapshot, loaded.info.model, rotating, dialect);
  std::vector<std::span<const std::byte>> pieces = {as_bytes_of(frame.header)};
  for (size_t t = 0; t < tensors.size(); ++t) {
    for_each_piece(
        snapshot.layout, n_tokens, t, first_kept(tensors[t], snapshot, rotating), n_tokens,
        [&](const Piece& piece) { pieces.push_back(snapshot.run_bytes(piece.run).subspan(piece.offset, piece.size)); });
  }
  pieces.insert(pieces.end(), states.begin(), states.end());
  pieces.push_back(std::as_bytes(std::span(frame.scalars)));
  write_file(store.env(), directory / path.filename(), pieces, true);
  store.env().sync_directory(directory);
}

}  // namespace torpor
