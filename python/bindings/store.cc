// torpor._store: caches as the store keeps them, arrays [1, H, S, D] with one row per token. It sees an array as memory
// with a dtype's name and a shape. What they mean to MLX and mlx-lm is torpor/_arrays.py's and torpor/_codec.py's.

#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <tuple>

#include "base/large_pages.h"
#include "base/safetensors.h"
#include "bindings.h"
#include "model/weights.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace nb = nanobind;

namespace torpor::python {
namespace {

using Texts = std::vector<std::pair<std::string, std::string>>;
/// Memory that an array of the caller's has, row-contiguous. It is given back under the GIL.
using Memory = nb::ndarray<nb::ro, nb::device::cpu, nb::c_contig>;
using WritableMemory = nb::ndarray<nb::device::cpu, nb::c_contig>;
using Shape = std::vector<int64_t>;
/// Name, dtype as safetensors calls it, shape.
using Array = std::tuple<std::string, std::string, Shape, Memory>;

KvDtype kv_dtype(const std::string& array, const std::string& dtype) {
  if (const auto known = parse_kv_dtype(dtype)) return *known;
  throw Error(ErrorCode::kInvalidArgument, "The array '" + array + "' is of a dtype that rows can't have.");
}

/// The array's elements.
std::span<const std::byte> bytes_of(const Array& array) {
  const auto& [name, dtype, shape, memory] = array;
  size_t size = safetensors_dtype_size(dtype);
  for (const int64_t n : shape) size *= size_t(n);
  if (size != memory.nbytes()) {
    throw Error(ErrorCode::kInvalidArgument, "The array '" + name + "' has memory of another size than its shape.");
  }
  return {static_cast<const std::byte*>(memory.data()), size};
}

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
BorrowedRows::Run rows_of(const std::vector<Array>& arrays, const KvLayout& layout, int first, int n) {
  BorrowedRows::Run run;
  for (size_t t = 0; t < arrays.size(); ++t) {
    const size_t row = row_bytes(layout.tensors[t]), capacity = size_t(std::get<Shape>(arrays[t])[2]);
    const auto* from = bytes_of(arrays[t]).data() + size_t(first) * row;
    for (int head = 0; head < layout.tensors[t].n_kv_heads; ++head, from += capacity * row) {
      run.pieces.emplace_back(from, size_t(n) * row);
    }
  }
  return run;
}

SaveResult save(Store& store, const std::string& agent_id, const std::vector<Array>& rows,
                const std::vector<Array>& state, const nb::bytes& tokens, const Texts& identity,
                const std::string& model, const Texts& user, const std::vector<std::string>& unchanged,
                const std::string& durability) {
  KvSnapshot snapshot;
  std::tie(snapshot.identity, snapshot.conversation) = split_identity(identity);
  snapshot.tokens.resize(tokens.size() / sizeof(int32_t));
  std::memcpy(snapshot.tokens.data(), tokens.c_str(), snapshot.tokens.size() * sizeof(int32_t));
  const nb::gil_scoped_release release;
  for (const auto& array : rows) {
    const auto& [name, dtype, shape, memory] = array;
    if (shape.size() != 4 || shape[0] != 1 || size_t(shape[2]) < snapshot.tokens.size()) {
      throw Error(ErrorCode::kInvalidArgument, "The array '" + name + "' is not [1, heads, tokens, dim].");
    }
    snapshot.layout.tensors.push_back({name, kv_dtype(name, dtype), int(shape[1]), int(shape[3]), 0});
  }
  for (const auto& array : state) {
    const auto& [name, dtype, shape, memory] = array;
    const auto bytes = bytes_of(array);
    snapshot.state.push_back({name, dtype, {shape.begin(), shape.end()}, bytes, nullptr});
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

/// Allocations of one mapping each lie so far apart at most: what rounds them to pages.
constexpr ptrdiff_t kApart = 64 << 10;

/// Allocations follow each other: a large page under the end of one and the beginning of the next serves both.
void share_large_pages(std::vector<std::span<std::byte>> blocks) {
  std::ranges::sort(blocks, {}, [](const auto& block) { return block.data(); });
  std::span<std::byte> run;
  for (const auto& block : blocks) {
    std::byte* const end = run.data() + run.size();
    if (!run.empty() && block.data() - end <= kApart) {
      run = {run.data(), size_t(block.data() + block.size() - run.data())};
    } else {
      expect_large_pages(run);
      run = block;
    }
  }
  expect_large_pages(run);
}

/// The arrays that an agent's rows go into.
class ArraySink : public RowSink {
 public:
  /// `make_rows(info, [(name, dtype, heads, dim)])` gives the memory of an array `[1, heads, capacity, dim]` for each.
  explicit ArraySink(nb::callable make_rows) : make_rows_(std::move(make_rows)) {}

  void begin(const AgentInfo& info, const KvSnapshot& snapshot) override {
    const nb::gil_scoped_acquire acquire;
    n_tokens_ = int64_t(snapshot.tokens.size());
    nb::list specs;
    for (const KvTensorSpec& spec : snapshot.layout.tensors) {
      specs.append(nb::make_tuple(spec.name, kv_dtype_name(spec.dtype), spec.n_kv_heads, spec.dim));
    }
    const nb::object made = make_rows_(info_dict(info), specs);
    std::vector<std::span<std::byte>> blocks;
    for (const KvTensorSpec& spec : snapshot.layout.tensors) {
      auto memory = nb::cast<WritableMemory>(made[tensors_.size()], false);
      const size_t capacity = memory.nbytes() / (row_bytes(spec) * size_t(spec.n_kv_heads));
      if (int64_t(capacity) < n_tokens_) {
        throw Error(ErrorCode::kInvalidArgument, "The memory for '" + spec.name + "' has no room for its rows.");
      }
      blocks.emplace_back(static_cast<std::byte*>(memory.data()), memory.nbytes());
      tensors_.push_back({spec, capacity, blocks.back().data(), std::move(memory)});
    }
    share_large_pages(std::move(blocks));
    for (size_t t = 0; t < tensors_.size() && n_tokens_ == 0; ++t) place(t, 0, 0);
  }

  Place place(size_t tensor, int64_t first, int n) override {
    const Tensor& to = tensors_[tensor];
    const size_t row = row_bytes(to.spec), stride = to.capacity * row;
    std::byte* rows = to.bytes + size_t(first) * row;
    if (first + n == n_tokens_) {
      for (size_t head = 0; head < size_t(to.spec.n_kv_heads); ++head) {
        std::memset(rows + head * stride + size_t(n) * row, 0, (to.capacity - size_t(n_tokens_)) * row);
      }
    }
    return {rows, stride};
  }

 private:
  struct Tensor {
    KvTensorSpec spec;
    size_t capacity;
    std::byte* bytes;
    WritableMemory memory;
  };

  nb::callable make_rows_;
  int64_t n_tokens_ = 0;
  std::vector<Tensor> tensors_;
};

/// (info, tokens, [(name, dtype, shape)] of state). `make_state(size)` gives memory for each state, in that order.
nb::tuple load(Store& store, const std::string& agent_id, const std::optional<Texts>& expected,
               nb::callable make_rows, nb::callable make_state) {
  ArraySink sink(std::move(make_rows));
  std::vector<WritableMemory> states;
  const auto allocate = [&](size_t size) {
    const nb::gil_scoped_acquire acquire;
    const WritableMemory& memory = states.emplace_back(nb::cast<WritableMemory>(make_state(size), false));
    if (memory.nbytes() < size) throw Error(ErrorCode::kInvalidArgument, "The memory for a state is too small.");
    return std::shared_ptr<std::byte>(static_cast<std::byte*>(memory.data()), [](std::byte*) {});  // it is in `states`
  };
  const LoadedAgent loaded = without_gil([&] {
    std::optional<Identity> identity;
    if (expected) identity = split_identity(*expected).first;
    return store.load_into(agent_id, sink, identity ? &*identity : nullptr, allocate);
  });
  nb::list state;
  for (const KvState& one : loaded.snapshot.state) state.append(nb::make_tuple(one.name, one.dtype, one.shape));
  const nb::bytes tokens(loaded.tokens.data(), loaded.tokens.size() * sizeof(int32_t));
  return nb::make_tuple(info_dict(loaded.info), tokens, state);
}

}  // namespace

void bind_store(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<Store>(module, "Store")
      .def(
          "__init__", [](Store* self, const std::filesystem::path& root) { new (self) Store(root); }, "root"_a,
          nb::sig("def __init__(self, root: str | os.PathLike[str]) -> None"))
      .def("save", &save, "agent_id"_a, nb::arg("rows").noconvert(), nb::arg("state").noconvert(), "tokens"_a,
           "identity"_a, "model"_a, "user"_a, "unchanged"_a, "durability"_a,
           nb::sig("def save(self, agent_id: str, "
                   "rows: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[int], memoryview]], "
                   "state: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[int], memoryview]], "
                   "tokens: bytes, identity: collections.abc.Sequence[tuple[str, str]], model: str, "
                   "user: collections.abc.Sequence[tuple[str, str]], unchanged: collections.abc.Sequence[str], "
                   "durability: str) -> SaveResult"))
      .def("load", &load, "agent_id"_a, "expected"_a.none(), "make_rows"_a, "make_state"_a,
           nb::sig("def load(self, agent_id: str, expected: collections.abc.Sequence[tuple[str, str]] | None, "
                   "make_rows: collections.abc.Callable[..., collections.abc.Sequence[memoryview]], "
                   "make_state: collections.abc.Callable[[int], memoryview]) -> "
                   "tuple[dict[str, typing.Any], bytes, list[tuple[str, str, list[int]]]]"))
      .def(
          "info",
          [](Store& store, const std::string& id) {
            return info_dict(without_gil([&] { return store.agent_info(id); }));
          },
          "agent_id"_a, nb::sig("def info(self, agent_id: str) -> dict[str, typing.Any]"))
      .def("tokens", &Store::agent_tokens, "agent_id"_a, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "list",
          [](Store& store) {
            nb::list out;
            for (const AgentInfo& info : without_gil([&] { return store.list_cached_agents(); }))
              out.append(info_dict(info));
            return out;
          },
          nb::sig("def list(self) -> typing.List[dict[str, typing.Any]]"))
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
      }, nb::sig("def disk_usage(self) -> dict[str, int]"));
  module.attr("UNKNOWN_TOKEN") = kUnknownToken;
  module.def(
      "weights_digest",
      [](const std::filesystem::path& directory) { return model::Weights::open(directory).digest(); }, "directory"_a,
      nb::call_guard<nb::gil_scoped_release>(),
      nb::sig("def weights_digest(directory: str | os.PathLike[str]) -> str"),
      "Of every tensor of a model directory: names, dtypes, shapes, bytes. Reads all, on all cores, and keeps "
      "nothing.");
}

}  // namespace torpor::python

NB_MODULE(_store, module) {
  module.doc() = "The C++ half of torpor's store; use the package's own names.";
  torpor::python::bind_common(module);
  torpor::python::bind_store(module);
}
