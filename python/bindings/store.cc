// Caches as the store keeps them: arrays [1, H, S, D] with one row per token. What the arrays mean to mlx-lm is
// torpor/_codec.py's.

#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include <mlx/allocator.h>
#include <mlx/array.h>

#include "base/hash.h"
#include "bindings.h"
#include "torpor/cache.h"
#include "torpor/error.h"
#include "torpor/store.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace torpor::python {
namespace {

using Texts = std::vector<std::pair<std::string, std::string>>;

KvDtype kv_dtype(const std::string& name, mx::Dtype dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::float32: return KvDtype::kF32;
    case mx::Dtype::Val::float16: return KvDtype::kF16;
    case mx::Dtype::Val::bfloat16: return KvDtype::kBF16;
    case mx::Dtype::Val::uint32: return KvDtype::kU32;
    default: throw Error(ErrorCode::kInvalidArgument, "The array '" + name + "' is of a dtype that rows can't have.");
  }
}

mx::Dtype mlx_dtype(KvDtype dtype) {
  switch (dtype) {
    case KvDtype::kF32: return mx::float32;
    case KvDtype::kF16: return mx::float16;
    case KvDtype::kBF16: return mx::bfloat16;
    case KvDtype::kU32: break;
  }
  return mx::uint32;
}

struct NamedArray {
  std::string name;
  mx::array array;
};

/// Rows [first, first + n) of every array, gathered into one run.
KvRun gather(const std::vector<NamedArray>& arrays, const KvLayout& layout, int first, int n) {
  const size_t size = layout.offset(layout.tensors.size(), n);
  const auto buffer = allocate_heap_buffer(size);
  std::byte* out = buffer.get();
  for (size_t t = 0; t < arrays.size(); ++t) {
    const size_t row = size_t(layout.tensors[t].dim) * kv_dtype_size(layout.tensors[t].dtype);
    const size_t capacity = size_t(arrays[t].array.shape(2));
    const auto* from = arrays[t].array.data<std::byte>();
    for (int head = 0; head < layout.tensors[t].n_kv_heads; ++head, out += row * size_t(n)) {
      std::memcpy(out, from + (size_t(head) * capacity + size_t(first)) * row, row * size_t(n));
    }
  }
  return {n, {buffer.get(), size}, buffer};
}

/// Ids are not known: those of a sealed run are made of its rows' digest, so that two runs share a segment only when their
/// rows are equal. All are negative, which no model's ids are.
void name_unknown_tokens(std::span<int32_t> ids, const KvRun& run) {
  const std::string digest = hash_hex(run.bytes);
  for (size_t i = 0; i < digest.size(); ++i) ids[i] = -1 - digest[i];
}

SaveResult save(Store& store, const std::string& agent_id, const std::vector<std::pair<std::string, mx::array>>& given,
                const std::vector<int32_t>& tokens, const Texts& identity, const std::string& model, const Texts& user,
                const std::vector<std::string>& unchanged, const std::string& durability) {
  nb::gil_scoped_release release;
  KvSnapshot snapshot;
  snapshot.identity = Identity::from_fields(identity);
  snapshot.tokens = tokens;
  std::vector<NamedArray> arrays;
  for (const auto& [name, array] : given) {
    if (!array.is_available() || !array.flags().row_contiguous || array.ndim() != 4 || array.shape(0) != 1 ||
        size_t(array.shape(2)) < tokens.size()) {
      throw Error(ErrorCode::kInvalidArgument, "The array '" + name + "' is not an evaluated, contiguous [1, heads, tokens, dim].");
    }
    snapshot.layout.tensors.push_back({name, kv_dtype(name, array.dtype()), array.shape(1), array.shape(3), 0});
    arrays.push_back({name, array});
  }
  const auto lock = store.lock_agent(agent_id);
  const int n_tokens = int(tokens.size());
  for (int first = 0; first < n_tokens && !arrays.empty(); first += kSegmentTokens) {
    const int n = std::min(kSegmentTokens, n_tokens - first);
    const size_t i = snapshot.runs.size();
    std::optional<KvRun> run;
    if (n == kSegmentTokens && i < unchanged.size()) run = store.map_segment(unchanged[i]);
    if (run && run->bytes.size() != snapshot.layout.offset(snapshot.layout.tensors.size(), n)) run.reset();
    snapshot.runs.push_back(run ? *run : gather(arrays, snapshot.layout, first, n));
    const auto ids = std::span(snapshot.tokens).subspan(size_t(first), size_t(n));
    if (n == kSegmentTokens && ids[0] < 0) name_unknown_tokens(ids, snapshot.runs.back());
  }
  return store.save_agent_cache(agent_id, snapshot, model, user, parse_durability(durability));
}

/// An agent whose rows are checked and mapped; each array is made when asked for.
struct Loaded {
  LoadedAgent agent;

  /// `[1, heads, capacity, dim]`: the rows, then zeros.
  mx::array array(const std::string& name, int capacity) const {
    const KvSnapshot& snapshot = agent.snapshot;
    const auto& tensors = snapshot.layout.tensors;
    const auto spec = std::find_if(tensors.begin(), tensors.end(), [&](const auto& tensor) { return tensor.name == name; });
    const int n_tokens = int(snapshot.tokens.size());
    if (spec == tensors.end() || capacity < n_tokens) {
      throw Error(ErrorCode::kCorruption, "The agent '" + agent.info.agent_id + "' lacks the array '" + name +
                                              "' that its description names.");
    }
    const size_t row = size_t(spec->dim) * kv_dtype_size(spec->dtype), heads = size_t(spec->n_kv_heads);
    mx::allocator::Data data = mx::allocator::malloc(row * heads * size_t(capacity));
    auto* out = static_cast<std::byte*>(data.buffer().raw_ptr());
    {
      nb::gil_scoped_release release;
      int first = 0;
      for (const KvRun& run : snapshot.runs) {
        const std::byte* from = run.bytes.data() + snapshot.layout.offset(size_t(spec - tensors.begin()), run.n_tokens);
        const size_t size = row * size_t(run.n_tokens);
        for (size_t head = 0; head < heads; ++head) {
          std::memcpy(out + (head * size_t(capacity) + size_t(first)) * row, from + head * size, size);
        }
        first += run.n_tokens;
      }
      for (size_t head = 0; head < heads; ++head) {
        std::memset(out + (head * size_t(capacity) + size_t(first)) * row, 0, row * size_t(capacity - first));
      }
    }
    return mx::array(std::move(data), mx::Shape{1, spec->n_kv_heads, capacity, spec->dim}, mlx_dtype(spec->dtype));
  }
};

std::unique_ptr<Loaded> load(Store& store, const std::string& agent_id, const std::optional<Texts>& expected) {
  nb::gil_scoped_release release;
  LoadOptions options;
  std::optional<Identity> identity;
  if (expected) identity = Identity::from_fields(*expected);
  options.expected = identity ? &*identity : nullptr;
  options.map_rows = true;
  return std::make_unique<Loaded>(Loaded{store.load_agent_cache(agent_id, options)});
}

nb::dict info_dict(const AgentInfo& info) {
  nb::dict identity, user, out;
  for (const auto& [key, value] : info.identity.fields()) identity[key.c_str()] = value;
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

}  // namespace

Durability parse_durability(const std::string& name) {
  if (name == "full") return Durability::kFull;
  if (name == "rename") return Durability::kRename;
  if (name == "none") return Durability::kNone;
  throw Error(ErrorCode::kInvalidArgument, "There is no durability '" + name + "'; use full, rename or none.");
}

void bind_store(nb::module_& module) {
  using namespace nb::literals;
  nb::class_<SaveResult>(module, "SaveResult", "What a save wrote.")
      .def_ro("bytes_written", &SaveResult::bytes_written, "Of files written whole: segments, and the agent's own.")
      .def_ro("segments_written", &SaveResult::segments_written, "Runs of 256 tokens that were not on disk yet.")
      .def_ro("segments_shared", &SaveResult::segments_shared,
              "Already on disk, by this agent's last save or another's.")
      .def_ro("segments", &SaveResult::segments, "The names of all, first to last.");
  nb::class_<Loaded>(module, "Loaded")
      .def("array", &Loaded::array, "name"_a, "capacity"_a)
      .def_prop_ro("info", [](const Loaded& loaded) { return info_dict(loaded.agent.info); })
      .def_prop_ro("tokens", [](const Loaded& loaded) { return loaded.agent.snapshot.tokens; })
      .def_prop_ro("damage", [](const Loaded& loaded) { return loaded.agent.damage; });
  nb::class_<Store>(module, "Store")
      .def("__init__", [](Store* self, const std::filesystem::path& root) { new (self) Store(root); }, "root"_a)
      .def("save", &save, "agent_id"_a, "arrays"_a, "tokens"_a, "identity"_a, "model"_a, "user"_a, "unchanged"_a,
           "durability"_a)
      .def("load", &load, "agent_id"_a, "expected"_a.none())
      .def("info", [](Store& store, const std::string& id) {
        AgentInfo info;
        {
          nb::gil_scoped_release release;
          info = store.agent_info(id);
        }
        return info_dict(info);
      }, "agent_id"_a)
      .def("tokens", [](Store& store, const std::string& id) {
        LoadOptions options;
        options.map_rows = true;
        return store.load_agent_cache(id, options).tokens;
      }, "agent_id"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("list", [](Store& store) {
        std::vector<AgentInfo> infos;
        {
          nb::gil_scoped_release release;
          infos = store.list_cached_agents();
        }
        nb::list out;
        for (const AgentInfo& info : infos) out.append(info_dict(info));
        return out;
      })
      .def("delete", &Store::delete_agent_cache, "agent_id"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("disk_usage", [](Store& store) {
        DiskUsage usage;
        {
          nb::gil_scoped_release release;
          usage = store.get_cache_disk_usage();
        }
        nb::dict out;
        out["agents"] = usage.agents;
        out["agent_bytes"] = usage.agent_bytes;
        out["segments"] = usage.segments;
        out["segment_bytes"] = usage.segment_bytes;
        out["orphan_bytes"] = usage.orphan_bytes;
        out["total_bytes"] = usage.total_bytes;
        return out;
      });
  module.def("default_store_root", &default_store_root);
}

}  // namespace torpor::python
