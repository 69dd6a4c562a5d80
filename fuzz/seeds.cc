/// fuzz_seeds DIR: writes small, well-formed agents into the store DIR/store and exports one to DIR/export.safetensors.

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "torpor/error.h"
#include "torpor/store.h"

namespace {

torpor::KvSnapshot make(int n_tokens, torpor::KvDtype dtype) {
  torpor::KvSnapshot snapshot;
  snapshot.identity.architecture = "llama";
  snapshot.identity.kv = torpor::kv_dtype_name(dtype);
  for (const char* name : {"layer_0_keys", "layer_0_values"}) snapshot.layout.tensors.push_back({name, dtype, 1, 2, 0});
  for (int i = 0; i < n_tokens; ++i) snapshot.tokens.push_back(i % 7);
  for (int done = 0; done < n_tokens; done += torpor::kSegmentTokens) {
    const int n = std::min(torpor::kSegmentTokens, n_tokens - done);
    const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), n);
    const auto buffer = torpor::allocate_heap_buffer(size);
    std::fill_n(buffer.get(), size, std::byte{1});
    snapshot.runs.push_back({n, {buffer.get(), size}, buffer});
  }
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
      store.save_agent_cache(id, snapshot, "model", {{"messages", "[]"}});
    };
    save("empty", make(0, torpor::KvDtype::kF32));
    save("short", make(3, torpor::KvDtype::kF16));
    save("sealed", make(256, torpor::KvDtype::kBF16));
    save("long", make(258, torpor::KvDtype::kF16));
    store.export_agent("short", directory / "export.safetensors");
  } catch (const torpor::Error& error) {
    std::fprintf(stderr, "fuzz_seeds: %s\n", error.what());
    return 1;
  }
  return 0;
}
