"""Loading a 2,000-token agent, side by side with mlx-lm's load_prompt_cache of the same bytes.

    .venv/bin/python bench/load_vs_mlx_lm.py [BUILD] [--agent ID --store DIR]

Torpor's side checks every checksum; mlx-lm's has none to check. Both read from the page cache and end with evaluated arrays
that generation could go on from. Measured twice: with fresh memory, as in a new process that wakes an agent, and with
memory that MLX's allocator recycles from the load before. Runs alternate; the medians and their ratio are printed.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from machine import cpu_name
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".models" / "smollm2-135m"
RUNS = 11


def make_agent(torpor, store):
    """The demo's document, cut to 2,000 tokens with what is generated."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode((ROOT / "examples" / "lighthouse-log.txt").read_text()).ids[:1996]
    subprocess.run([torpor, "run", "--store", store, "--model", MODEL, "--agent", "bench", "--raw", "--prompt-file", "-",
                    "--max-tokens", "4"], input=tokenizer.decode(ids, skip_special_tokens=False).encode(), check=True,
                   stdout=subprocess.DEVNULL)


def to_mlx_lm(exported, path):
    """The exported agent as an mlx-lm prompt cache: the same keys and values, in its own layout."""
    tensors = mx.load(str(exported))
    caches = []
    for i in range(sum(name.endswith("_keys") for name in tensors)):
        cache = KVCache()
        cache.update_and_fetch(tensors[f"layer_{i}_keys"], tensors[f"layer_{i}_values"])
        caches.append(cache)
    save_prompt_cache(str(path), caches)
    return caches[0].offset


def time_mlx_lm(path, memory):
    if memory == "fresh":
        mx.clear_cache()
    start = time.perf_counter()
    caches = load_prompt_cache(str(path))
    mx.eval([(cache.keys, cache.values) for cache in caches])
    return (time.perf_counter() - start) * 1e3, caches[0].offset


def compare(bench, prompt_cache, tokens, memory):
    ours, theirs = [], []
    for run in range(RUNS + 1):
        bench.stdin.write(memory + "\n")
        bench.stdin.flush()
        ms, n = bench.stdout.readline().split()
        other_ms, other_n = time_mlx_lm(prompt_cache, memory)
        assert int(n) == other_n == tokens
        if run > 0:  # the first of each warms the page cache
            ours.append(float(ms))
            theirs.append(other_ms)
    return ours, theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", nargs="?", default=ROOT / "build", type=Path)
    parser.add_argument("--store", type=Path, help="a store that has the agent (default: one is made)")
    parser.add_argument("--agent", default="bench")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="torpor-bench-") as directory:
        directory = Path(directory)
        store = arguments.store or directory / "store"
        torpor = arguments.build / "torpor"
        if arguments.store is None:
            make_agent(torpor, store)
        exported, prompt_cache = directory / "exported.safetensors", directory / "mlx_lm.safetensors"
        subprocess.run([torpor, "export", "--store", store, arguments.agent, exported], check=True)
        tokens = to_mlx_lm(exported, prompt_cache)

        size = exported.stat().st_size / 1e6
        print(f"{tokens} tokens, {size:.1f} MB; {os.cpu_count()} cores, {cpu_name()}; {RUNS} alternating runs, page cache warm")
        with subprocess.Popen([arguments.build / "bench" / "store_bench", store, arguments.agent], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True) as bench:
            for memory in ("fresh", "recycled"):
                ours, theirs = compare(bench, prompt_cache, tokens, memory)
                print(f"{memory} memory")
                for name, times in (("torpor, checksums included", ours), ("mlx-lm load_prompt_cache", theirs)):
                    median = statistics.median(times)
                    print(f"  {name:<28} median {median:7.2f} ms  (min {min(times):.2f}, max {max(times):.2f})  "
                          f"{size / median:.2f} GB/s")
                print(f"  ratio {statistics.median(theirs) / statistics.median(ours):.2f}")
            bench.stdin.close()


if __name__ == "__main__":
    main()
