/// fuzz_seeds DIR: writes small, well-formed agents into the store DIR/store, exports one to DIR/export.safetensors, and some
/// as prompt caches of mlx-lm to DIR/prompt_cache.

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string>

#include "torpor/error.h"
#include "torpor/exchange.h"
#include "torpor/store.h"

namespace {

torpor::KvSnapshot make(int n_tokens, torpor::KvDtype dtype) {
  torpor::KvSnapshot snapshot;
  snapshot.identity.architecture = "llama";
  snapshot.identity.kv = torpor::kv_dtype_name(dtype);
  snapshot.lineage.ranges = {{0, "f32/kernels/l8-fma"}, {256, "f32/kernels/l4"}};
  for (const char* name : {"layer_0_keys", "layer_0_values"}) snapshot.layout.tensors.push_back({name, dtype, 1, 2, 0});
  for (int i = 0; i < n_tokens; ++i) snapshot.tokens.push_back(i % 7);
  for (int done = 0; done < n_tokens; done += torpor::kSegmentTokens) {
    const int n = std::min(torpor::kSegmentTokens, n_tokens - done);
    const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), n);
    const auto buffer = torpor::allocate_heap_buffer(size);
    std::fill_n(buffer.get(), size, std::byte{1});
    snapshot.add_run(n, {buffer.get(), size}, buffer);
  }
  return snapshot;
}

torpor::KvSnapshot with_state(torpor::KvSnapshot snapshot) {
  const auto buffer = torpor::allocate_heap_buffer(6);
  std::fill_n(buffer.get(), 6, std::byte{2});
  snapshot.state = {{"layer_1_ring", "F16", {1, 2}, {buffer.get(), 4}, buffer},
                    {"layer_1_flags", "BOOL", {2}, {buffer.get(), 2}, buffer}};
  return snapshot;
}

/// Of a model with recurrent layers: with the state after `n` tokens, and after the last.
torpor::KvSnapshot with_states(torpor::KvSnapshot snapshot, int64_t n) {
  snapshot.state_layout.tensors = {{"layer_1_conv", torpor::KvDtype::kF32, {2}},
                                   {"layer_1_recurrent", torpor::KvDtype::kF16, {1, 2}}};
  const auto buffer = torpor::allocate_heap_buffer(12);
  std::fill_n(buffer.get(), 12, std::byte{3});
  for (const int64_t position : {n, int64_t(snapshot.tokens.size())}) {
    snapshot.states.push_back(std::make_shared<const torpor::StateCheckpoint>(
        position, std::span<const std::byte>(buffer.get(), 12), buffer));
  }
  return snapshot;
}

/// Rows of a window of 1,024 tokens are kept apart from those of another layer.
torpor::KvSnapshot make_with_window(int n_tokens) {
  torpor::KvSnapshot snapshot = make(n_tokens, torpor::KvDtype::kF16);
  torpor::KvLayout layout = snapshot.layout;
  for (const char* name : {"layer_1_keys", "layer_1_values"}) {
    layout.tensors.push_back({name, torpor::KvDtype::kF16, 1, 2, 1024, true});
  }
  torpor::KvSnapshot with{.identity = snapshot.identity, .lineage = snapshot.lineage, .layout = layout,
                          .tokens = snapshot.tokens};
  for (size_t i = 0; i < snapshot.n_runs(); ++i) {
    const size_t size = layout.offset(layout.tensors.size(), snapshot.run_tokens(i));
    const auto buffer = torpor::allocate_heap_buffer(size);
    std::fill_n(buffer.get(), size, std::byte{1});
    with.add_run(snapshot.run_tokens(i), {buffer.get(), size}, buffer);
  }
  return with;
}

/// Of one layer whose heads have 32 dims, 4 of which are seen behind.
torpor::KvSnapshot make_prompt_cache(const torpor::KvFormat& format, const char* architecture) {
  torpor::KvSnapshot snapshot = make(6, format.dtype);
  snapshot.identity.architecture = architecture;
  snapshot.identity.kv = format.name();
  snapshot.layout.tensors.clear();
  for (const std::string name : {"layer_0_keys", "layer_0_values"}) {
    if (!format.quantized()) {
      snapshot.layout.tensors.push_back({name, format.dtype, 1, 32, 4});
    } else {
      snapshot.layout.tensors.push_back({name, torpor::KvDtype::kU32, 1, format.bits.keys, 4});
      for (const char* part : {"_scales", "_biases"})
        snapshot.layout.tensors.push_back({name + part, format.dtype, 1, 1, 4});
    }
  }
  const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), 6);
  const auto buffer = torpor::allocate_heap_buffer(size);
  std::fill_n(buffer.get(), size, std::byte{1});
  snapshot.add_run(6, {buffer.get(), size}, buffer);
  return snapshot;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fputs("usage: fuzz_seeds DIR\n", stderr);
    return 2;
  }
  try {
    const std::filesystem::path directory = argv[1];
    torpor::Store store(directory / "store");
    const auto save = [&](const char* id, const torpor::KvSnapshot& snapshot) {
      const auto n = std::min<int64_t>(200, int64_t(snapshot.tokens.size()));
      const torpor::AgentNotes notes{{{R"({"role":"user","content":"x"})", 0, n}}, {{"pinned", "true"}}};
      store.save_agent_cache(id, snapshot, "model", {{"k", "v"}}, torpor::Durability::kFull, notes);
    };
    save("empty", make(0, torpor::KvDtype::kF32));
    save("short", make(3, torpor::KvDtype::kF16));
    save("sealed", make(256, torpor::KvDtype::kBF16));
    save("long", make(258, torpor::KvDtype::kF16));
    for (const int n : {200, 270, 310, 350}) save("turns", make(n, torpor::KvDtype::kF16));
    save("state", with_state(make(3, torpor::KvDtype::kF16)));
    save("state-alone", with_state({}));
    store.export_agent("short", directory / "export.safetensors");
    save("states", with_states(make(5, torpor::KvDtype::kF16), 3));
    store.export_agent("states", directory / "export-states.safetensors");
    save("windows", make_with_window(258));
    store.export_agent("windows", directory / "export-windows.safetensors");
    std::filesystem::create_directory(directory / "prompt_cache");
    torpor::Store prompt_caches(directory / "prompt_cache_store");
    const auto write = [&](const std::string& name, const torpor::KvFormat& format, const char* architecture) {
      prompt_caches.save_agent_cache(name, make_prompt_cache(format, architecture), "model");
      const auto rotates = [](const std::string& of) { return of == "gemma3"; };
      const auto path = directory / "prompt_cache" / name;
      torpor::export_prompt_cache(prompt_caches, name, path, rotates, torpor::PromptCacheDialect::kNew);
      torpor::export_prompt_cache(prompt_caches, name, path.string() + "-old", rotates,
                                  torpor::PromptCacheDialect::kOld);
    };
    write("plain", torpor::KvDtype::kBF16, "llama");
    write("quantized", {torpor::KvDtype::kF16, 4, 32}, "llama");
    write("rotating", torpor::KvDtype::kF16, "gemma3");
  } catch (const torpor::Error& error) {
    std::fprintf(stderr, "fuzz_seeds: %s\n", error.what());
    return 1;
  }
  return 0;
}
