// Caches as the store keeps them: arrays [1, H, S, D] with one row per token. What the arrays mean to mlx-lm is
// torpor/_codec.py's.

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <tuple>

#include <mlx/allocator.h>
#include <mlx/array.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "array_memory.h"
#include "base/safetensors.h"
#include "bindings.h"
#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace torpor::python {
namespace {

using Texts = std::vector<std::pair<std::string, std::string>>;

/// What safetensors calls the dtypes that MLX has.
constexpr std::pair<const char*, mx::Dtype::Val> kDtypes[] = {
    {"F32", mx::Dtype::Val::float32}, {"F16", mx::Dtype::Val::float16}, {"BF16", mx::Dtype::Val::bfloat16},
    {"U32", mx::Dtype::Val::uint32},  {"I32", mx::Dtype::Val::int32},   {"U8", mx::Dtype::Val::uint8},
    {"I8", mx::Dtype::Val::int8},     {"U16", mx::Dtype::Val::uint16},  {"I16", mx::Dtype::Val::int16},
    {"U64", mx::Dtype::Val::uint64},  {"I64", mx::Dtype::Val::int64},   {"F64", mx::Dtype::Val::float64},
    {"BOOL", mx::Dtype::Val::bool_},
};

std::string dtype_name(const std::string& array, mx::Dtype dtype) {
  for (const auto& [name, val] : kDtypes) {
    if (val == dtype.val()) return name;
  }
  throw Error(ErrorCode::kInvalidArgument, "The array '" + array + "' is of a dtype that can't be saved.");
}

mx::Dtype mlx_dtype(const std::string& name) {
  for (const auto& [known, val] : kDtypes) {
    if (known == name) return mx::Dtype(val, uint8_t(safetensors_dtype_size(name)));
  }
  throw Error(ErrorCode::kIncompatible, "An array of the dtype '" + name + "' is none that MLX has.");
}

KvDtype kv_dtype(const std::string& array, mx::Dtype dtype) {
  if (const auto known = parse_kv_dtype(dtype_name(array, dtype))) return *known;
  throw Error(ErrorCode::kInvalidArgument, "The array '" + array + "' is of a dtype that rows can't have.");
}

using NamedArrays = std::vector<std::pair<std::string, mx::array>>;

size_t row_bytes(const KvTensorSpec& spec) { return size_t(spec.dim) * kv_dtype_size(spec.dtype); }

/// What a caller describes in one: what must match, and what is recorded.
std::pair<Identity, ConversationIdentity> split_identity(Texts fields) {
  ConversationIdentity conversation;
  for (const auto& [name, value] : fields) {
    if (name == "tokenizer") conversation.tokenizer = value;
    if (name == "chat_template") conversation.chat_template = value;
  }
  std::erase_if(fields, [](const auto& field) { return field.first == "tokenizer" || field.first == "chat_template"; });
  return {Identity::from_fields(fields), conversation};
}

/// Rows [first, first + n) of every array, where they are.
BorrowedRows::Run rows_of(const NamedArrays& arrays, const KvLayout& layout, int first, int n) {
  BorrowedRows::Run run;
  for (size_t t = 0; t < arrays.size(); ++t) {
    const size_t row = row_bytes(layout.tensors[t]), capacity = size_t(arrays[t].second.shape(2));
    const auto* from = arrays[t].second.data<std::byte>() + size_t(first) * row;
    for (int head = 0; head < layout.tensors[t].n_kv_heads; ++head, from += capacity * row) {
      run.pieces.emplace_back(from, size_t(n) * row);
    }
  }
  return run;
}

/// Evaluated, and with nothing between its elements.
void make_plain(NamedArrays& arrays) {
  std::vector<mx::array> lazy;
  for (auto& [name, array] : arrays) {
    if (!array.is_available() || !array.flags().row_contiguous) array = mx::contiguous(array);
    lazy.push_back(array);
  }
  mx::eval(lazy);
}

SaveResult save(Store& store, const std::string& agent_id, NamedArrays rows, NamedArrays state, const nb::bytes& tokens,
                const Texts& identity, const std::string& model, const Texts& user,
                const std::vector<std::string>& unchanged, const std::string& durability) {
  KvSnapshot snapshot;
  std::tie(snapshot.identity, snapshot.conversation) = split_identity(identity);
  snapshot.tokens.resize(tokens.size() / sizeof(int32_t));
  std::memcpy(snapshot.tokens.data(), tokens.c_str(), snapshot.tokens.size() * sizeof(int32_t));
  const nb::gil_scoped_release release;
  for (const auto& [name, array] : rows) {
    if (array.ndim() != 4 || array.shape(0) != 1 || size_t(array.shape(2)) < snapshot.tokens.size()) {
      throw Error(ErrorCode::kInvalidArgument, "The array '" + name + "' is not [1, heads, tokens, dim].");
    }
    snapshot.layout.tensors.push_back({name, kv_dtype(name, array.dtype()), array.shape(1), array.shape(3), 0});
  }
  make_plain(rows);
  make_plain(state);
  for (const auto& [name, array] : state) {
    snapshot.state.push_back({name, dtype_name(name, array.dtype()), {array.shape().begin(), array.shape().end()},
                              {array.data<std::byte>(), array.nbytes()}, nullptr});
  }
  const int n_tokens = int(snapshot.tokens.size());
  BorrowedRows borrowed;
  for (int first = 0; first < n_tokens && !rows.empty(); first += kSegmentTokens) {
    const size_t i = borrowed.runs.size();
    borrowed.runs.push_back(rows_of(rows, snapshot.layout, first, std::min(kSegmentTokens, n_tokens - first)));
    if (i < unchanged.size()) borrowed.runs.back().segment = unchanged[i];
  }
  const auto lock = store.lock_agent(agent_id);
  return store.save_agent_cache(agent_id, snapshot, borrowed, model, user, parse_durability(durability));
}

/// The arrays that an agent's rows go into.
class ArraySink : public RowSink {
 public:
  /// `capacities(info)` gives the third dimension of each array by name; called with the GIL.
  explicit ArraySink(nb::callable capacities) : capacities_(std::move(capacities)) {}

  void begin(const AgentInfo& info, const KvSnapshot& snapshot) override {
    const auto capacities = capacities_of(info);
    n_tokens_ = int64_t(snapshot.tokens.size());
    std::vector<ArrayShape> shapes;
    for (const KvTensorSpec& spec : snapshot.layout.tensors) {
      const auto capacity = capacities.find(spec.name);
      if (capacity == capacities.end() || capacity->second < n_tokens_) {
        throw Error(ErrorCode::kCorruption, "The agent '" + info.agent_id + "' holds the array '" + spec.name +
                                                "', which its description does not name or has no room for.");
      }
      shapes.push_back({{1, spec.n_kv_heads, capacity->second, spec.dim}, mlx_dtype(kv_dtype_name(spec.dtype))});
      tensors_.push_back({spec, size_t(capacity->second)});
    }
    try {
      memory_.emplace(std::move(shapes));
    } catch (const std::bad_alloc&) {
      throw Error(ErrorCode::kResourceExhausted, "Out of memory for the cache of the agent '" + info.agent_id + "'.");
    }
  }

  Place place(size_t tensor, int64_t first, int n) override {
    const Tensor& to = tensors_[tensor];
    const size_t row = row_bytes(to.spec), stride = to.capacity * row;
    std::byte* rows = memory_->bytes(tensor) + size_t(first) * row;
    if (first + n == n_tokens_) {
      for (size_t head = 0; head < size_t(to.spec.n_kv_heads); ++head) {
        std::memset(rows + head * stride + size_t(n) * row, 0, (to.capacity - size_t(n_tokens_)) * row);
      }
    }
    return {rows, stride};
  }

  NamedArrays arrays() {
    NamedArrays named;
    if (!memory_) return named;
    for (size_t t = 0; t < tensors_.size() && n_tokens_ == 0; ++t) place(t, 0, 0);
    std::vector<mx::array> arrays = memory_->arrays();
    for (size_t t = 0; t < arrays.size(); ++t) named.emplace_back(tensors_[t].spec.name, std::move(arrays[t]));
    return named;
  }

 private:
  struct Tensor {
    KvTensorSpec spec;
    size_t capacity;
  };
  std::map<std::string, int> capacities_of(const AgentInfo& info);

  nb::callable capacities_;
  int64_t n_tokens_ = 0;
  std::vector<Tensor> tensors_;
  std::optional<ArrayMemory> memory_;
};

/// What `work` gives, which takes its time, without the GIL.
template <class Work>
auto without_gil(Work work) {
  const nb::gil_scoped_release release;
  return work();
}

nb::dict info_dict(const AgentInfo& info) {
  nb::dict identity, user, out;
  for (const auto& [key, value] : info.identity.fields()) identity[key.c_str()] = value;
  identity["tokenizer"] = info.conversation.tokenizer;
  identity["chat_template"] = info.conversation.chat_template;
  for (const auto& [key, value] : info.user) user[key.c_str()] = value;
  out["agent_id"] = info.agent_id;
  out["model"] = info.model;
  out["hash"] = info.hash;
  out["cache_size"] = info.cache_size;
  out["bytes"] = info.bytes;
  out["created_at"] = info.created_at;
  out["updated_at"] = info.updated_at;
  out["segments"] = info.segments;
  out["identity"] = identity;
  out["user"] = user;
  return out;
}

std::map<std::string, int> ArraySink::capacities_of(const AgentInfo& info) {
  const nb::gil_scoped_acquire acquire;
  return nb::cast<std::map<std::string, int>>(capacities_(info_dict(info)));
}

/// Memory of MLX's that state is read into, to become its arrays.
class StateMemory {
 public:
  BufferAllocator allocator() {
    return [this](size_t size) {
      data_.push_back(std::make_shared<mx::allocator::Data>(mx::allocator::malloc(size)));
      mx::allocator::Buffer buffer = data_.back()->buffer();
      if (buffer.ptr() == nullptr)
        throw Error(ErrorCode::kResourceExhausted, "Out of memory for the state of a cache.");
      return std::shared_ptr<std::byte>(data_.back(), static_cast<std::byte*>(buffer.raw_ptr()));
    };
  }
  /// The array that the i-th buffer holds; once.
  mx::array array(size_t i, const KvState& state) {
    mx::Shape shape;
    for (const uint64_t n : state.shape) {
      if (n > uint64_t(INT_MAX))
        throw Error(ErrorCode::kIncompatible, "The array '" + state.name + "' is larger than MLX can have.");
      shape.push_back(int(n));
    }
    return mx::array(std::move(*data_[i]), shape, mlx_dtype(state.dtype));
  }

 private:
  std::vector<std::shared_ptr<mx::allocator::Data>> data_;
};

/// (info, tokens, arrays by name): of rows each `[1, heads, capacity, dim]`, the rows and then zeros; state as it was.
nb::tuple load(Store& store, const std::string& agent_id, const std::optional<Texts>& expected,
               nb::callable capacities) {
  ArraySink sink(std::move(capacities));
  StateMemory state_memory;
  LoadedAgent loaded = without_gil([&] {
    std::optional<Identity> identity;
    if (expected) identity = split_identity(*expected).first;
    return store.load_into(agent_id, sink, identity ? &*identity : nullptr, state_memory.allocator());
  });
  nb::dict arrays;
  for (auto& [name, array] : sink.arrays()) arrays[name.c_str()] = std::move(array);
  for (size_t i = 0; i < loaded.snapshot.state.size(); ++i) {
    const KvState& state = loaded.snapshot.state[i];
    arrays[state.name.c_str()] = state_memory.array(i, state);
  }
  const nb::bytes tokens(loaded.tokens.data(), loaded.tokens.size() * sizeof(int32_t));
  return nb::make_tuple(info_dict(loaded.info), tokens, std::move(arrays));
}

}  // namespace

Durability parse_durability(const std::string& name) {
  if (name == "full") return Durability::kFull;
  if (name == "rename") return Durability::kRename;
  if (name == "none") return Durability::kNone;
  throw Error(ErrorCode::kInvalidArgument, "There is no durability '" + name + "'; use full, rename or none.");
}

void bind_store(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<SaveResult>(module, "SaveResult")
      .def_ro("bytes_written", &SaveResult::bytes_written)
      .def_ro("segments_written", &SaveResult::segments_written)
      .def_ro("segments_shared", &SaveResult::segments_shared)
      .def_ro("segments", &SaveResult::segments);
  nb::class_<Store>(module, "Store")
      .def(
          "__init__", [](Store* self, const std::filesystem::path& root) { new (self) Store(root); }, "root"_a)
      .def("save", &save, "agent_id"_a, "rows"_a, "state"_a, "tokens"_a, "identity"_a, "model"_a, "user"_a,
           "unchanged"_a, "durability"_a)
      .def("load", &load, "agent_id"_a, "expected"_a.none(), "capacities"_a)
      .def(
          "info",
          [](Store& store, const std::string& id) {
            return info_dict(without_gil([&] { return store.agent_info(id); }));
          },
          "agent_id"_a)
      .def("tokens", &Store::agent_tokens, "agent_id"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("list",
           [](Store& store) {
             nb::list out;
             for (const AgentInfo& info : without_gil([&] { return store.list_cached_agents(); }))
               out.append(info_dict(info));
             return out;
           })
      .def(
          "delete", [](Store& store, const std::string& id) { store.delete_agent_cache(id); }, "agent_id"_a,
          nb::call_guard<nb::gil_scoped_release>())
      .def("disk_usage", [](Store& store) {
        const DiskUsage usage = without_gil([&] { return store.get_cache_disk_usage(); });
        nb::dict out;
        out["agents"] = usage.agents;
        out["agent_bytes"] = usage.agent_bytes;
        out["segments"] = usage.segments;
        out["segment_bytes"] = usage.segment_bytes;
        out["states"] = usage.states;
        out["state_bytes"] = usage.state_bytes;
        out["orphan_bytes"] = usage.orphan_bytes;
        out["total_bytes"] = usage.total_bytes;
        return out;
      });
  module.attr("UNKNOWN_TOKEN") = kUnknownToken;
  module.def("default_store_root", &default_store_root);
}

}  // namespace torpor::python
