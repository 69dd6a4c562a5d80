"""Saving and loading mlx-lm caches: torpor.CachePersistence beside mlx_lm's save_prompt_cache and load_prompt_cache.

    PYTHONPATH=build/python .venv/bin/python bench/python_vs_mlx_lm.py [--runs 5] [--sizes 47,189,805]

Both save and load the same caches (KVCache, f16, random rows) on the same file system ($TMPDIR), from and to the page cache, in
alternating pairs. It needs up to 30 GB of disk, and on ext4 a disk on which few files were deleted in the last five minutes.
Torpor saves with durability="rename", computes a checksum of every tensor and checks all of them when it loads; mlx-lm has none and
flushes nothing either. Loads end with evaluated arrays. The first token is a row that each layer's `update_and_fetch`
appends, evaluated. What is measured:

- first save: into an empty store, beside a file that is not there yet; with `tokens=`, and without.
- second save: 64 tokens later, over what was saved.
- load, new process: the first thing that a process does after its imports, as when an agent wakes.
- load, same process: over and over, into memory that the load before has let go of.
- load and first token: the same with the first token, and by how much the new process grew at most. The cache has
  spare rows. Of a full one mlx-lm copies all rows for the next token.

Pages that a virtual machine's host has yet to provide cost both sides up to 1 ns a byte, whoever comes first: memory is touched
and let go of before each measurement. So is the disk left to finish before a first save: what earlier ones left in the page cache
would else be written during one of the two. A pair during which others used more than a tenth of the cores is tried again.
"""

import argparse
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from machine import cpu_name  # noqa: E402
from pairs import Others, by_key, least_disturbed, summary  # noqa: E402

# MB -> layers, KV heads, head dim, tokens: SmolLM2-135M twice, and a model of 8 billion parameters (Llama 3.1's shape).
SHAPES = {47: (30, 3, 64, 2048), 189: (30, 3, 64, 8192), 805: (32, 8, 128, 6144)}
NEW_TOKENS = 64
KEPT_BYTES = 12 << 30
PROVIDED_BYTES = 2 << 30
TARGETS = {"first save": 2, "first save, no tokens=": 2, "second save": 20,
           "load, new process": 3, "load, same process": 3,
           "load and first token, new process": 3, "load and first token, same process": 3, "peak memory": 1,
           "full: load and first token, new process": 3, "full: load and first token, same process": 3,
           "full: peak memory": 1}


def provide_memory(size):
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # else what is let go of suits small pages only
        for at in range(0, size, 4096):
            memory[at] = 1


def own_seconds():
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def timed(work):
    start = time.perf_counter()
    result = work()
    return (time.perf_counter() - start) * 1e3, result


def grow(cache, heads, dim, n):
    import mlx.core as mx
    for layer in cache:
        layer.update_and_fetch(*(mx.random.normal((1, heads, n, dim)).astype(mx.float16) for _ in range(2)))
        mx.eval(layer.keys, layer.values)


class Caches:
    """One size's cache, and where either side keeps it."""

    def __init__(self, size, directory):
        from mlx_lm.models.cache import KVCache
        layers, self.heads, self.dim, self.tokens = SHAPES[size]
        self.bytes = layers * 2 * self.heads * self.dim * self.tokens * 2
        self.cache = [KVCache() for _ in range(layers)]
        grow(self.cache, self.heads, self.dim, self.tokens)
        self.stores = directory / "stores"
        self.stores.mkdir()
        self.file = self.store = None

    def first_save(self, tokens):
        import torpor
        from mlx_lm.models.cache import save_prompt_cache
        # ext4 looks long for an inode where many were given back in the five minutes before: what was saved stays as long as it may.
        kept = list(self.stores.glob("*"))
        if 2 * len(kept) * self.bytes > KEPT_BYTES:
            for root in kept:
                shutil.rmtree(root)
        root = Path(tempfile.mkdtemp(dir=self.stores))
        self.file = root / "cache.safetensors"
        self.store = torpor.CachePersistence(root / "store", durability="rename")
        os.sync()
        ids = list(range(self.tokens)) if tokens else None
        provide_memory(PROVIDED_BYTES + 2 * self.bytes)
        ours, _ = timed(lambda: self.store.save_agent_cache("ada", self.cache, tokens=ids))
        provide_memory(PROVIDED_BYTES + 2 * self.bytes)
        theirs, _ = timed(lambda: save_prompt_cache(str(self.file), self.cache))
        return ours, theirs

    def second_save(self):
        from mlx_lm.models.cache import save_prompt_cache
        self.first_save(True)
        grow(self.cache, self.heads, self.dim, NEW_TOKENS)
        ids = list(range(self.tokens + NEW_TOKENS))
        ours, _ = timed(lambda: self.store.save_agent_cache("ada", self.cache, tokens=ids))
        theirs, _ = timed(lambda: save_prompt_cache(str(self.file), self.cache))
        for layer in self.cache:
            layer.trim(NEW_TOKENS)
        return ours, theirs


def memory_mb(field):
    """Of this process, in MB; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(field)), 0)


def load(size, side, file, root, times):
    """In a process of its own: milliseconds of each of so many loads and first tokens, and the MB of the first ones."""
    import mlx.core as mx
    import torpor
    from mlx_lm.models.cache import load_prompt_cache
    layers, heads, dim, tokens = SHAPES[size]

    def theirs():
        cache = load_prompt_cache(file)
        mx.eval([(layer.keys, layer.values) for layer in cache])
        return cache

    def first_token(cache):
        for layer in cache:
            layer.update_and_fetch(row, row)
        mx.eval([(layer.keys, layer.values) for layer in cache])

    work = theirs if side == "mlx-lm" else lambda: torpor.CachePersistence(root).load_agent_cache("ada")[0]
    row = mx.random.normal((1, heads, 1, dim)).astype(mx.float16)
    mx.eval(row)
    provide_memory(PROVIDED_BYTES + int(2.4 * layers * 2 * heads * dim * tokens * 2))
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, peak = memory_mb("VmRSS"), None
    loads, both = [], []
    for _ in range(times):
        ms, cache = timed(work)
        assert cache[0].offset == tokens
        token_ms, _ = timed(lambda: first_token(cache))
        assert cache[0].offset == tokens + 1
        peak = peak or memory_mb("VmHWM") - before
        del cache
        loads.append(ms)
        both.append(ms + token_ms)
    print(json.dumps({"loads": loads, "both": both, "peak": peak}))


def load_in_a_process(caches, size, side, times):
    ended = subprocess.run([sys.executable, __file__, "--load", side, "--sizes", str(size), "--times", str(times),
                            "--file", caches.file, "--store", caches.store.root], capture_output=True, text=True)
    if ended.returncode != 0:
        sys.exit(ended.stderr)
    return json.loads(ended.stdout)


def measure(size, directory, runs):
    caches = Caches(size, directory)

    def attempt(measurements):
        others, before = Others(), own_seconds()
        pairs = measurements()
        return pairs, others.share(own_seconds() - before)

    def saves():
        return {"first save, no tokens=": caches.first_save(False), "first save": caches.first_save(True),
                "second save": caches.second_save()}

    def loads(name=""):
        ours, theirs = (load_in_a_process(caches, size, side, 6) for side in ("torpor", "mlx-lm"))
        pairs = {} if name else {"load, new process": (ours["loads"][0], theirs["loads"][0]),
                                 "load, same process": (ours["loads"][-1], theirs["loads"][-1])}
        for process, i in (("new", 0), ("same", -1)):
            pairs[f"{name}load and first token, {process} process"] = ours["both"][i], theirs["both"][i]
        if ours["peak"]:
            pairs[f"{name}peak memory"] = ours["peak"], theirs["peak"]
        return pairs

    results = by_key(least_disturbed(lambda: attempt(saves), runs))
    caches.first_save(True)
    by_key(least_disturbed(lambda: attempt(loads), runs), results)
    for layer in caches.cache:
        layer.keys, layer.values = layer.keys_and_values()
    caches.first_save(True)
    return by_key(least_disturbed(lambda: attempt(lambda: loads("full: ")), runs), results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", default="47,189,805")
    for hidden in ("--load", "--file", "--store", "--times"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.load:
        load(sizes[0], arguments.load, arguments.file, arguments.store, int(arguments.times))
        return
    print(f"{os.cpu_count()} cores, {cpu_name()}; medians of {arguments.runs} alternating pairs\n")
    print("| | MB | Torpor | mlx-lm | ratio | lowest, highest | others at most | target |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="torpor-bench-") as directory:
        for size in sizes:
            (Path(directory) / str(size)).mkdir()
            for key, pairs in measure(size, Path(directory) / str(size), arguments.runs).items():
                ours, theirs, ratio, low, high = summary(pairs, less_is_better=True)
                share = max(share for _, _, share in pairs)
                unit = "MB" if "memory" in key else "ms"
                print(f"| {key} | {size} | {ours:.1f} {unit} | {theirs:.1f} {unit} | {ratio:.1f} | "
                      f"{low:.1f}, {high:.1f} | {share:.0%} | {TARGETS[key]} |", flush=True)


if __name__ == "__main__":
    main()
