/// An embedder: includes every public header, links the whole library, and takes a snapshot through a store.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include <torpor/cache.h>
#include <torpor/engine.h>
#include <torpor/error.h>
#include <torpor/exchange.h>
#include <torpor/generate.h>
#include <torpor/generate_options.h>
#include <torpor/kv_snapshot.h>
#include <torpor/log.h>
#include <torpor/model.h>
#include <torpor/model_info.h>
#include <torpor/store.h>
#include <torpor/text.h>
#include <torpor/version.h>

int64_t turn_without_mlx(const char* model, const char* root);  // without_mlx.cc

/// As another Rust library in the program has it. Torpor's own Rust half keeps its runtime to itself, so this links.
extern "C" void rust_eh_personality() {}

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (!ok) {
    std::fprintf(stderr, "consumer: %s\n", what);
    ++failures;
  }
}

torpor::KvSnapshot make_snapshot(int n_tokens) {
  torpor::KvSnapshot snapshot;
  snapshot.identity.architecture = "llama";
  snapshot.identity.kv = "f32";
  for (const char* name : {"layer_0_keys", "layer_0_values"}) {
    snapshot.layout.tensors.push_back({name, torpor::KvDtype::kF32, 2, 8, 0});
  }
  for (int i = 0; i < n_tokens; ++i) snapshot.tokens.push_back(i);
  for (int done = 0; done < n_tokens; done += torpor::kSegmentTokens) {
    const int n = std::min(torpor::kSegmentTokens, n_tokens - done);
    const size_t size = snapshot.layout.offset(snapshot.layout.tensors.size(), n);
    const auto buffer = torpor::allocate_heap_buffer(size);
    for (size_t i = 0; i < size; ++i) buffer.get()[i] = std::byte(i * 31 + size_t(done));
    snapshot.add_run(n, {buffer.get(), size}, buffer);
  }
  return snapshot;
}

}  // namespace

int main(int, char** argv) {
  try {
    torpor::Store store(argv[1]);
    const torpor::KvSnapshot saved = make_snapshot(300);
    {
      const auto lock = store.lock_agent("embedded");
      store.save_agent_cache("embedded", saved, "no-model");
    }
    const torpor::LoadedAgent loaded = store.load_agent_cache("embedded");
    expect(loaded.snapshot.tokens == saved.tokens, "other tokens came back");
    expect(loaded.snapshot.n_runs() == saved.n_runs(), "another number of runs came back");
    for (size_t i = 0; i < saved.n_runs(); ++i) {
      expect(std::ranges::equal(loaded.snapshot.run_bytes(i), saved.run_bytes(i)), "other bytes came back");
    }
    expect(store.list_cached_agents().size() == 1, "one agent is not listed");

    // The text and model rooms are linked: their errors come back as Torpor's own.
    try {
      torpor::Tokenizer::load(argv[1]);
      expect(false, "a store is no tokenizer");
    } catch (const torpor::Error& error) {
      expect(error.code() == torpor::ErrorCode::kNotFound, "Tokenizer::load gives another error");
    }
    try {
      torpor::Model::load("no/such-model");
      expect(false, "a missing model loads");
    } catch (const torpor::Error& error) {
      expect(error.code() == torpor::ErrorCode::kNotFound, "Model::load gives another error");
    }
    // These are there to be called; without a model only their addresses are taken.
    auto generate = &torpor::CacheExtractor::generate;
    expect(generate != nullptr, "no CacheExtractor");
    auto turn = &turn_without_mlx;
    expect(turn != nullptr, "no Engine");

    auto cache = torpor::KvCache::restore(loaded.snapshot, torpor::Backend::kMlx);
    expect(torpor::get_cache_size(*cache) == 300, "get_cache_size is wrong");
    expect(bool(torpor::validate_cache_structure(*cache)), "validate_cache_structure objects");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "consumer: %s\n", error.what());
    return 1;
  }
  return failures == 0 ? 0 : 1;
}
