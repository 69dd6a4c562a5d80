#include "exchange/prompt_cache.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <set>
#include <string_view>

#include "torpor/error.h"

namespace torpor {
namespace {

constexpr std::string_view kKvCache = "KVCache";
constexpr std::string_view kQuantized = "QuantizedKVCache";
constexpr std::string_view kRotating = "RotatingKVCache";
constexpr std::string_view kArrays = "ArraysCache";

/// A number that a cache object holds beside its arrays.
enum class Field { kOffset, kGroup, kBits, kKeep, kMaxSize, kIndex };
struct CacheClass {
  std::string_view name;
  std::vector<Field> scalars;  ///< dialect of 0.32: tensors that follow keys and values, in this order
  std::vector<Field> texts;    ///< dialect up to 0.31: metadata, in this order
};
const CacheClass kClasses[] = {
    {kKvCache, {Field::kOffset}, {}},
    {kQuantized, {Field::kOffset, Field::kGroup, Field::kBits}, {Field::kOffset, Field::kGroup, Field::kBits}},
    {kRotating, {Field::kOffset, Field::kKeep, Field::kMaxSize, Field::kIndex},
     {Field::kKeep, Field::kMaxSize, Field::kOffset, Field::kIndex}},
};

const CacheClass* find_class(std::string_view name) {
  const auto found =
      std::find_if(std::begin(kClasses), std::end(kClasses), [&](const auto& kind) { return kind.name == name; });
  return found == std::end(kClasses) ? nullptr : found;
}

const std::string kDialectMark = "2.0";  // metadata: empty in the dialect of 0.32, else the class of the first layer

std::string at(const std::string& key, size_t i) { return key + "." + std::to_string(i); }
std::string at(size_t i, size_t j) { return at(std::to_string(i), j); }

class Reader {
 public:
  Reader(const SafetensorsHeader& header, const ReadScalar& read_scalar, const std::string& file_name)
      : header_(header), read_scalar_(read_scalar), file_name_(file_name),
        metadata_(header.metadata.begin(), header.metadata.end()), old_(!metadata_.at(kDialectMark).empty()) {
    for (const SafetensorsTensor& tensor : header.tensors) tensors_[tensor.name] = &tensor;
    // Entry k says that tensor `2.k.0` stands for what is no array, and what for.
    for (size_t k = 1; !old_ && metadata_.count(at(2, k) + ".0") != 0; ++k) {
      scalars_[text(at(2, k) + ".0")] = text(at(2, k) + ".1");
    }
  }

  PromptCacheFile read() {
    PromptCacheFile file;
    const std::string classes = old_ ? "2" : "1";
    for (size_t i = 0; metadata_.count(at(classes, i)) != 0; ++i) {
      const std::string& name = text(at(classes, i));
      if (name == kArrays && !old_) {
        read_state(file, i);
        continue;
      }
      const CacheClass* found = find_class(name);
      if (found == nullptr) {
        throw Error(ErrorCode::kIncompatible,
                    "'" + file_name_ + "' keeps layer " + std::to_string(i) + " in a '" + name +
                        "', which Torpor's engine has no use for; the Python module reads it.")
            .with_path(file_name_)
            .with_field("class", "KVCache, RotatingKVCache or QuantizedKVCache", name);
      }
      const KvFormat format = read_layer(file, i, *found);
      if (file.layers.size() == 1) file.format = format;
      if (format != file.format) {
        throw Error(ErrorCode::kIncompatible, "'" + file_name_ + "' keeps layer " + std::to_string(first_) + " as " +
                                                  file.format.name() + " and layer " + std::to_string(i) + " as " +
                                                  format.name() + "; Torpor's engine keeps all alike.")
            .with_path(file_name_)
            .with_field("kv", file.format.name(), format.name());
      }
    }
    if (file.layers.empty()) corrupt("it names no layer");
    if (used_.size() != tensors_.size()) {
      const auto other = std::find_if(tensors_.begin(), tensors_.end(),
                                      [&](const auto& entry) { return used_.count(entry.first) == 0; });
      corrupt("it has a tensor '" + other->first + "' that belongs to no layer");
    }
    return file;
  }

 private:
  [[noreturn]] void corrupt(const std::string& what) const {
    throw Error(ErrorCode::kCorruption,
                "'" + file_name_ + "' is no prompt-cache file of mlx-lm, or is damaged: " + what + ".");
  }

  const std::string& text(const std::string& key) const {
    const auto found = metadata_.find(key);
    if (found == metadata_.end()) corrupt("it lacks the metadata '" + key + "'");
    return found->second;
  }

  const SafetensorsTensor& tensor(const std::string& name) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) corrupt("it lacks the tensor '" + name + "'");
    used_.insert(name);
    return *found->second;
  }

  int32_t scalar(const std::string& name) {
    const SafetensorsTensor& found = tensor(name);
    const auto declared = scalars_.find(name);
    if (declared == scalars_.end() || declared->second != "scalar" || found.dtype != "I32" || !found.shape.empty()) {
      corrupt("'" + name + "' is not a number");
    }
    return read_scalar_(found);
  }

  int32_t number(const std::string& key) const {
    const std::string& digits = text(key);
    int32_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size())
      corrupt("the metadata '" + key + "' is not a number");
    return value;
  }

  std::map<Field, int32_t> fields(size_t layer, const CacheClass& kind) {
    std::map<Field, int32_t> values;
    for (size_t i = 0; !old_ && i < kind.scalars.size(); ++i) values[kind.scalars[i]] = scalar(at(layer, 2 + i));
    for (size_t i = 0; old_ && i < kind.texts.size(); ++i) values[kind.texts[i]] = number(at(at(0, layer), i));
    return values;
  }

  /// Adds a tensor `[1, heads, capacity, dim]` to the layer; gives back its dim.
  int64_t add(PromptCacheLayer& layer, const std::string& name, std::optional<KvDtype>& dtype) {
    const SafetensorsTensor& found = tensor(name);
    const auto own = parse_kv_dtype(found.dtype);
    const auto& shape = found.shape;
    if (shape.size() == 4 && shape[0] > 1) {
      throw Error(ErrorCode::kIncompatible, "'" + file_name_ + "' holds a batch of " + std::to_string(shape[0]) +
                                                " sequences; an agent is one.")
          .with_path(file_name_)
          .with_field("batch", "1", std::to_string(shape[0]));
    }
    // What is not empty is no larger than the file, so each extent is bounded by its size.
    if (!own || shape.size() != 4 || found.size() == 0 || shape[1] > INT32_MAX) {
      corrupt("the tensor '" + name + "' holds no rows");
    }
    if (layer.data.empty()) {
      layer.n_kv_heads = int(shape[1]);
      layer.capacity = int64_t(shape[2]);
    }
    if (layer.n_kv_heads != int(shape[1]) || layer.capacity != int64_t(shape[2]) || (dtype && dtype != own)) {
      corrupt("the tensors of layer " + name.substr(0, name.find('.')) + " do not fit each other");
    }
    dtype = own;
    layer.data.push_back(header_.data_start + found.begin);
    return int64_t(shape[3]);
  }

  KvFormat read_layer(PromptCacheFile& file, size_t i, const CacheClass& kind) {
    PromptCacheLayer& layer = file.layers.emplace_back();
    std::optional<KvDtype> dtype, words;
    std::set<int64_t> dims[2];  // of keys and of values, as each of their tensors has it
    KvFormat format;
    const std::map<Field, int32_t> values = fields(i, kind);
    if (kind.name == kQuantized) {
      const int bits = values.at(Field::kBits);
      format.bits = bits;
      format.group = values.at(Field::kGroup);
      if (!KvFormat::parse(KvFormat(KvDtype::kF16, bits, format.group).name()) || bits == 0) {
        throw Error(ErrorCode::kIncompatible, "'" + file_name_ + "' is quantized to " + std::to_string(bits) +
                                                  " bits in groups of " + std::to_string(format.group) +
                                                  "; Torpor's engine knows 8 and 4 bits in groups of 32, 64 or 128.")
            .with_path(file_name_)
            .with_field("kv", "8 or 4 bits in groups of 32, 64 or 128",
                        std::to_string(bits) + " bits in groups of " + std::to_string(format.group));
      }
      for (const size_t side : {0, 1}) {
        dims[side].insert(add(layer, at(at(i, side), 0), words) * (32 / bits));
        for (const size_t part : {1, 2}) dims[side].insert(add(layer, at(at(i, side), part), dtype) * format.group);
      }
      if (words != KvDtype::kU32) corrupt("layer " + std::to_string(i) + " is not quantized as it says");
    } else {
      for (const size_t side : {0, 1}) dims[side].insert(add(layer, at(i, side), dtype));
    }
    if (dims[0].size() != 1 || dims[1].size() != 1 || dtype == KvDtype::kU32)
      corrupt("the tensors of layer " + std::to_string(i) + " do not fit each other");
    layer.key_dim = *dims[0].begin();
    layer.value_dim = *dims[1].begin();
    format.dtype = *dtype;

    const int64_t n_tokens = values.count(Field::kOffset) != 0 ? values.at(Field::kOffset) : layer.capacity;
    if (n_tokens < 1)
      corrupt("layer " + std::to_string(i) + " says that it holds " + std::to_string(n_tokens) + " tokens");
    if (file.layers.size() == 1) {
      file.n_tokens = n_tokens;
      first_ = i;
    }
    if (n_tokens != file.n_tokens) {
      corrupt("layer " + std::to_string(first_) + " holds " + std::to_string(file.n_tokens) + " tokens, layer " +
              std::to_string(i) + " " + std::to_string(n_tokens));
    }
    if (kind.name == kRotating) {
      rotated_rows(layer, i, n_tokens, values);
    } else if (n_tokens > layer.capacity || (old_ && n_tokens < layer.capacity)) {
      corrupt("layer " + std::to_string(i) + " says that it holds " + std::to_string(n_tokens) + " tokens, and has " +
              std::to_string(layer.capacity) + " rows");
    } else {
      layer.rows = {{0, 0, n_tokens}};
    }
    return format;
  }

  /// Its arrays, then what only batches have: padding and lengths. In the dialect of 0.32.
  void read_state(PromptCacheFile& file, size_t i) {
    const std::string layer = "layer " + std::to_string(i);
    PromptCacheState& state = file.states.emplace_back();
    state.layer = int(i);
    for (size_t j = 0; tensors_.count(at(at(i, 0), j)) != 0; ++j) {
      const SafetensorsTensor& found = tensor(at(at(i, 0), j));
      const auto dtype = parse_kv_dtype(found.dtype);
      if (!dtype || dtype == KvDtype::kU32 || found.size() == 0 || found.shape.size() < 2 || found.shape[0] != 1) {
        corrupt("the tensor '" + found.name + "' is no state of one sequence");
      }
      state.arrays.push_back({*dtype, {found.shape.begin() + 1, found.shape.end()}, header_.data_start + found.begin});
    }
    for (const size_t of_batches : {1, 2}) {
      const std::string& name = tensor(at(i, of_batches)).name;
      const auto declared = scalars_.find(name);
      if (declared == scalars_.end() || declared->second != "none") corrupt(layer + " is of a batch of sequences");
    }
  }

  /// Row `index` is the next to be overwritten once the cache is full.
  void rotated_rows(PromptCacheLayer& layer, size_t i, int64_t n_tokens, const std::map<Field, int32_t>& values) {
    const int64_t keep = values.at(Field::kKeep), max_size = values.at(Field::kMaxSize),
                  index = values.at(Field::kIndex);
    const int64_t capacity = layer.capacity, lost = n_tokens - capacity;
    // Nothing else says where a ring begins; but all of them went round together.
    if (!rotation_) rotation_ = {capacity, values};
    const bool full_ring = lost > 0 && capacity == max_size && index > 0 && index <= capacity;
    const bool in_order = index == std::min(n_tokens, capacity) && (lost <= 0 || capacity >= max_size);
    if (max_size < 1 || keep < 0 || !(full_ring || in_order) || rotation_ != std::pair(capacity, values)) {
      corrupt("the numbers of layer " + std::to_string(i) + " fit neither each other nor its " +
              std::to_string(capacity) + " rows");
    }
    if (lost > 0 && keep > 0) {
      throw Error(ErrorCode::kIncompatible, "'" + file_name_ + "' has forgotten rows of layer " + std::to_string(i) +
                                                " but for the first " + std::to_string(keep) +
                                                " (mlx-lm's max_kv_size), which no "
                                                "model of Torpor's engine can go on from; make it without that bound.")
          .with_path(file_name_)
          .with_field("keep", "0", std::to_string(keep));
    }
    if (lost <= 0) {
      layer.rows = {{0, 0, n_tokens}};
    } else if (index == capacity) {
      layer.rows = {{lost, 0, capacity}};
    } else {
      layer.rows = {{lost, index, capacity - index}, {n_tokens - index, 0, index}};
    }
  }

  const SafetensorsHeader& header_;
  const ReadScalar& read_scalar_;
  const std::string& file_name_;
  const std::map<std::string, std::string> metadata_;
  const bool old_;
  std::map<std::string, std::string> scalars_;
  std::optional<std::pair<int64_t, std::map<Field, int32_t>>> rotation_;  // of the first RotatingKVCache
  std::map<std::string, const SafetensorsTensor*> tensors_;
  std::set<std::string> used_;
  size_t first_ = 0;  // layer with rows
};

}  // namespace

KvLayout by_layers(KvLayout layout) {
  if (!layout.has_apart()) return layout;
  for (KvTensorSpec& tensor : layout.tensors) tensor.apart = false;
  std::ranges::stable_sort(layout.tensors, {}, [](const KvTensorSpec& tensor) { return layer_of(tensor.name); });
  return layout;
}

int layer_of(const std::string& tensor) {
  int layer = 0;
  const size_t at = std::min(tensor.size(), std::string_view("layer_").size());
  std::from_chars(tensor.data() + at, tensor.data() + tensor.size(), layer);
  return layer;
}

bool is_prompt_cache(const SafetensorsHeader& header) { return header.metadata_value(kDialectMark) != nullptr; }

PromptCacheFile parse_prompt_cache(const SafetensorsHeader& header, const ReadScalar& read_scalar,
                                   const std::string& file_name) {
  return Reader(header, read_scalar, file_name).read();
}

bool rotates(const KvTensorSpec& tensor, const KvLayout& layout, bool rotates_windows) {
  return rotates_windows && tensor.window > 0 && layout.tensors.front().dtype != KvDtype::kU32;
}

int64_t first_kept(const KvTensorSpec& tensor, const KvSnapshot& snapshot, bool rotates_windows) {
  if (!rotates(tensor, snapshot.layout, rotates_windows)) return 0;
  return std::max<int64_t>(0, int64_t(snapshot.tokens.size()) - tensor.window);
}

PromptCacheFrame frame_prompt_cache(const KvSnapshot& snapshot, const std::string& model, bool rotates_windows,
                                    PromptCacheDialect dialect) {
  const bool old = dialect == PromptCacheDialect::kOld;
  const KvFormat format = KvFormat::parse(snapshot.identity.kv).value_or(KvFormat());
  const auto& tensors = snapshot.layout.tensors;
  const size_t parts = format.quantized() ? 3 : 1;
  std::vector<SafetensorsTensor> rows, states, numbers;
  PromptCacheFrame frame;
  std::map<int, size_t> of_rows;  // the first tensor of each layer that has some
  for (size_t t = 0; t < tensors.size(); t += 2 * parts) of_rows[layer_of(tensors[t].name)] = t;
  std::map<int, size_t> of_states;  // how many tensors each of the others has
  if (recurs(snapshot)) {
    for (const StateTensorSpec& tensor : snapshot.state_layout.tensors) {
      const int layer = layer_of(tensor.name);
      std::vector<uint64_t> shape{1};
      shape.insert(shape.end(), tensor.shape.begin(), tensor.shape.end());
      if (shape.size() == 4) std::swap(shape[2], shape[3]);
      states.push_back({.name = at(at(size_t(layer), 0), of_states[layer]++), .dtype = "F32", .shape = shape});
    }
  }
  const std::string user = old ? "1" : "0", classes = old ? "2" : "1";
  std::vector<std::pair<std::string, std::string>> metadata = {{user + ".model", model},
                                                               {user + ".tokenizer_config", "{}"}};
  if (!old) metadata.emplace_back(kDialectMark, "");
  const auto declare = [&](const std::string& name, const char* kind) {
    numbers.push_back({.name = name, .dtype = "I32", .shape = {}});
    metadata.emplace_back(at(2, numbers.size()) + ".0", name);
    metadata.emplace_back(at(2, numbers.size()) + ".1", kind);
  };
  for (size_t i = 0; i < of_rows.size() + of_states.size(); ++i) {
    if (of_states.contains(int(i))) {
      metadata.emplace_back(at(classes, i), std::string(kArrays));
      for (const size_t of_batches : {1, 2}) {
        declare(at(i, of_batches), "none");
        numbers.back().dtype = "F32";
        numbers.back().shape = {0};
      }
      continue;
    }
    const size_t first_tensor = of_rows.at(int(i));
    const KvTensorSpec& first = tensors[first_tensor];
    const auto n_tokens = int64_t(snapshot.tokens.size()),
               held = n_tokens - first_kept(first, snapshot, rotates_windows);
    for (size_t t = 0; t < 2 * parts; ++t) {
      const KvTensorSpec& tensor = tensors[first_tensor + t];
      const std::string name = at(i, t / parts);
      rows.push_back({.name = parts == 1 ? name : at(name, t % parts), .dtype = kv_dtype_name(tensor.dtype),
                      .shape = {1, uint64_t(tensor.n_kv_heads), uint64_t(held), uint64_t(tensor.dim)}});
    }
    const std::string_view name = parts == 3                                         ? kQuantized
                                  : rotates(first, snapshot.layout, rotates_windows) ? kRotating
                                                                                     : kKvCache;
    metadata.emplace_back(at(classes, i), std::string(name));
    const std::map<Field, int64_t> values = {{Field::kOffset, n_tokens}, {Field::kGroup, format.group},
                                             {Field::kBits, format.bits.keys},
                                             {Field::kKeep, 0}, {Field::kMaxSize, first.window}, {Field::kIndex, held}};
    const CacheClass& kind = *find_class(name);
    for (size_t k = 0; !old && k < kind.scalars.size(); ++k) {
      declare(at(i, 2 + k), "scalar");
      frame.scalars.push_back(int32_t(values.at(kind.scalars[k])));
    }
    if (old && kind.texts.empty()) metadata.emplace_back(at(0, i), "");
    for (size_t k = 0; old && k < kind.texts.size(); ++k) {
      metadata.emplace_back(at(at(0, i), k), std::to_string(values.at(kind.texts[k])));
    }
  }
  rows.insert(rows.end(), states.begin(), states.end());
  rows.insert(rows.end(), numbers.begin(), numbers.end());
  frame.header = encode_safetensors_header(rows, metadata);
  return frame;
}

}  // namespace torpor
